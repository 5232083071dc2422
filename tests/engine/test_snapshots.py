"""A session that was put back stands where it stood: the next logits have the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Session
from fomoe_io.errors import ReadError, UsageError
from tests.tiny_model import Tiny, write_tiny

TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, 299, 40)]
SHAPES = {
    "qwen35moe": Tiny(),
    "qwen3moe": Tiny(architecture="qwen3moe", shared_hidden=0),
    "gpt-oss": Tiny(architecture="gpt-oss", shared_hidden=0),
}


@pytest.fixture(scope="module", params=SHAPES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", SHAPES[request.param], 3)
    with Engine.open(path, EngineConfig(context_tokens=128, threads=2, batch_tokens=8, sessions=2)) as engine:
        yield engine


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    session = engine.session()
    yield session
    session.close()


def answer(session: Session, count: int = 5) -> np.ndarray:
    """Logits of some tokens from here on."""
    return np.stack([session.decode(TOKENS[-1 - i]).copy() for i in range(count)])


def test_a_restored_session_goes_on_to_the_same_bits(engine: Engine, session: Session) -> None:
    session.prefill(TOKENS[:23])
    taken = session.snapshot()
    want = answer(session)
    session.prefill(TOKENS)
    session.restore(taken)
    assert session.position == 23
    np.testing.assert_array_equal(answer(session), want)

    other = engine.session()
    other.prefill(TOKENS[5:30])
    other.restore(taken)
    np.testing.assert_array_equal(answer(other), want)
    other.close()


def test_the_beginning_can_be_restored(session: Session) -> None:
    taken = session.snapshot()
    want = session.prefill(TOKENS)
    session.restore(taken)
    np.testing.assert_array_equal(session.prefill(TOKENS), want)


def test_rows_of_its_own_stay(session: Session) -> None:
    session.prefill(TOKENS[:20])
    recurrent, rows = session.recurrent(), session.rows(0, 20)
    want = answer(session)
    assert rows.shape == (20, session.row_bytes) and recurrent.shape == (session.recurrent_bytes,)
    session.resume(20, recurrent, known=20)
    np.testing.assert_array_equal(answer(session), want)
    session.resume(20, recurrent, [rows[12:15], rows[15:]], known=12)
    np.testing.assert_array_equal(answer(session), want)


def test_attention_alone_can_be_cut_anywhere(session: Session) -> None:
    session.prefill(TOKENS[:11])
    want = answer(session)
    session.reset()
    session.prefill([*TOKENS[:11], *TOKENS])
    if session.recurrent_bytes:
        with pytest.raises(UsageError, match="wound back"):
            session.truncate(11)
        session.truncate(session.position)
        assert session.position == 11 + len(TOKENS)
        session.truncate(0)
        session.prefill(TOKENS[:11])
    else:
        session.truncate(11)
    np.testing.assert_array_equal(answer(session), want)


def test_a_session_that_broke_can_be_put_back(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.prefill(TOKENS[:9])
    taken = session.snapshot()
    want = answer(session)
    session.restore(taken)

    def fail(*_: object) -> None:
        raise ReadError("the drive is gone")

    with monkeypatch.context() as patch, pytest.raises(ReadError):
        patch.setattr(session._backend, "run", fail)
        session.decode(1)
    assert session.is_broken
    with pytest.raises(UsageError, match="reset"):
        session.recurrent()
    np.testing.assert_array_equal(session.rows(0, 9), taken.rows)
    session.restore(taken)
    np.testing.assert_array_equal(answer(session), want)


def test_what_does_not_fit_is_refused(session: Session) -> None:
    session.prefill(TOKENS[:9])
    taken = session.snapshot()
    for call in (
        lambda: session.rows(0, 10),
        lambda: session.rows(-1, 2),
        lambda: session.resume(9, taken.recurrent, known=10),
        lambda: session.resume(129, taken.recurrent, known=9),
        lambda: session.resume(9, np.zeros(1, np.uint8), known=9),
        lambda: session.resume(9, taken.recurrent, [taken.rows[:, :-1]]),
        lambda: session.resume(9, taken.recurrent, [taken.rows[:4]]),
        lambda: session.resume(9, taken.recurrent, [taken.rows, taken.rows]),
    ):
        with pytest.raises(UsageError):
            call()
    session.restore(taken)


def test_pieces_of_a_prompt_count_as_one(session: Session) -> None:
    """How a prompt is cut never decides how it is computed."""
    spans = []
    run = session._backend.run
    session._backend.run = lambda batch, logits: (spans.extend(batch.spans), run(batch, logits))[1]  # type: ignore[method-assign]
    try:
        session.prefill(TOKENS[:10], prompt_tokens=40)
    finally:
        session._backend.run = run  # type: ignore[method-assign]
    assert {span.prompt_tokens for span in spans} == {40}
