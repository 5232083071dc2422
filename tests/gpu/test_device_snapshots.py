"""The rules of tests/engine/test_snapshots.py on a GPU (a double)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Session
from tests.fake_hip.build import Fake
from tests.tiny_model import Tiny, write_tiny

TOKENS = [3, 141, 59, 26, 5, 35, 89, 79]
WIDE = Tiny(columns=256, head_columns=64, rotated=32, state_columns=64, hidden=256, shared_hidden=256)
SHAPES = {
    "qwen35moe": WIDE,
    "qwen3moe": Tiny(architecture="qwen3moe", columns=256, head_columns=64, rotated=64, hidden=256, shared_hidden=0),
}


@pytest.fixture(params=SHAPES)
def session(request: pytest.FixtureRequest, fake: Fake, tmp_path: Path) -> Iterator[Session]:
    path = write_tiny(tmp_path / "tiny.gguf", SHAPES[request.param], 3)
    with Engine.open(path, EngineConfig(context_tokens=64, device="hip", batch_tokens=4, threads=1)) as engine:
        yield engine.session()


def answer(session: Session) -> np.ndarray:
    """Logits of some tokens from here on."""
    return np.stack([session.decode(token).copy() for token in TOKENS[:3]])


def test_a_restored_session_goes_on_to_the_same_bits(session: Session) -> None:
    beginning = session.snapshot()
    session.prefill(TOKENS)
    taken = session.snapshot()
    assert taken.rows.shape == (8, session.row_bytes) and taken.rows.any()
    assert taken.recurrent.shape == (session.recurrent_bytes,) and taken.recurrent.any() == bool(
        session.recurrent_bytes
    )
    want = answer(session)
    session.prefill(TOKENS[::-1])
    session.restore(taken)
    np.testing.assert_array_equal(answer(session), want)
    session.reset()
    session.prefill(TOKENS[:3])
    session.resume(8, taken.recurrent, [taken.rows[3:5], taken.rows[5:]], known=3)
    np.testing.assert_array_equal(answer(session), want)
    session.restore(beginning)
    session.prefill(TOKENS)
    np.testing.assert_array_equal(answer(session), want)


def test_a_state_larger_than_its_way(session: Session) -> None:
    """Staging memory holds a part of a state: nothing depends on how much."""
    copies = session._state._copies[0]  # type: ignore[attr-defined]
    copies._staging = copies._staging[:100]
    session.prefill(TOKENS)
    taken = session.snapshot()
    want = answer(session)
    session.reset()
    session.restore(taken)
    np.testing.assert_array_equal(answer(session), want)


def test_attention_alone_can_be_cut_anywhere(session: Session) -> None:
    if session.recurrent_bytes:
        pytest.skip("it is recurrent")
    session.prefill(TOKENS[:5])
    want = answer(session)
    session.truncate(5)
    np.testing.assert_array_equal(answer(session), want)


def test_a_helper_between_two_turns(fake: Fake, tmp_path: Path) -> None:
    """What `fomoe_io.kept` does with these: tests/engine/test_kept.py."""
    path = write_tiny(tmp_path / "tiny.gguf", WIDE, 3)
    how = {"context_tokens": 128, "device": "hip", "batch_tokens": 16, "threads": 1, "cache_bytes": "16M"}
    main, helper = [*TOKENS * 5], [*TOKENS[::-1] * 3]
    with Engine.open(path, EngineConfig(**how)) as engine:  # type: ignore[arg-type]
        timeline, found = engine.timeline(), []
        for prompt in (main, helper, [*main, *TOKENS]):
            tokens = timeline.begin(prompt)
            found.append(len(tokens) - len(timeline.tokens))
            logits = timeline.read(tokens[len(timeline.tokens) :]).copy()
            timeline.end()
        assert found == [len(main), len(helper), len(TOKENS) + 4]  # from 4 tokens before the first prompt's end
        timeline.begin([*main, *TOKENS], reuse=False)
        np.testing.assert_allclose(timeline.read([*main, *TOKENS]), logits, rtol=2e-3, atol=2e-3)
