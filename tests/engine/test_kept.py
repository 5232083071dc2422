"""What sessions have read is not read again, wherever a prompt goes on from it, and answers are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.kept import folder as folders
from fomoe_io.kept.pieces import BLOCK_TOKENS
from fomoe_io.kept.timeline import APART_TOKENS, BEFORE_END_TOKENS, Timeline
from tests.tiny_model import Tiny, write_tiny

random = np.random.default_rng(7)
MAIN = [int(t) for t in random.integers(0, 256, 700)]
HELPER = [int(t) for t in random.integers(0, 256, 60)]
SHAPES = {"qwen35moe": Tiny(), "qwen3moe": Tiny(architecture="qwen3moe", shared_hidden=0)}
CONFIG = EngineConfig(context_tokens=1024, threads=2, batch_tokens=64, cache_bytes="16M", sessions=2)


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", SHAPES[request.param], 3)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine.open(model, CONFIG) as engine:
        yield engine


@pytest.fixture
def timeline(engine: Engine) -> Iterator[Timeline]:
    timeline = engine.timeline()
    yield timeline
    timeline.close()


@pytest.fixture
def reopened(model: Path) -> Iterator[Callable[..., Timeline]]:
    """Opens what a process has after a restart, with sessions kept in a folder."""
    with contextlib.ExitStack() as stack:

        def reopen(path: Path, notes: list[str] | None = None, **how: Any) -> Timeline:
            values = {"cache_folder": path, "cache_disk_bytes": 64 << 20, **how}
            engine = stack.enter_context(Engine.open(model, dataclasses.replace(CONFIG, **values)))
            return engine.timeline(notes.append if notes is not None else pytest.fail)

        yield reopen


def turn(timeline: Timeline, prompt: list[int], answers: int = 6, **how: Any) -> tuple[int, list[int]]:
    """(tokens of the prompt that were read, greedy answer)"""
    tokens = timeline.begin(prompt, **how)
    unread = len(tokens) - len(timeline.tokens)
    logits = timeline.read(tokens[len(timeline.tokens) :])
    answer = []
    for _ in range(answers):
        answer.append(int(logits.argmax()))
        logits = timeline.decode(answer[-1])
    timeline.end()
    return unread, answer


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Callable[..., list[int]]]:
    """The answer to a prompt that nothing was read before."""
    with Engine.open(model, dataclasses.replace(CONFIG, cache_bytes=0)) as engine:
        session = engine.session()

        known: dict[tuple[int, ...], list[int]] = {}

        def answer(prompt: list[int]) -> list[int]:
            if (key := tuple(prompt)) not in known:
                session.reset()
                logits, found = session.prefill(prompt), []
                for _ in range(6):
                    found.append(int(logits.argmax()))
                    logits = session.decode(found[-1])
                known[key] = found
            return known[key]

        yield answer


@pytest.fixture
def recurrent(model: Path) -> None:
    """One kind of model is enough."""
    if "qwen35moe" not in str(model.read_bytes()[:500]):
        pytest.skip("as for the other")


def slack(timeline: Timeline) -> int:
    """What the last tokens of a prompt may cost again."""
    return 1 if timeline.kept.can_cut else BEFORE_END_TOKENS


def test_a_prompt_that_goes_on_costs_what_is_new(timeline: Timeline, alone: Any) -> None:
    unread, answer = turn(timeline, MAIN)
    assert unread == len(MAIN) and answer == alone(MAIN)
    longer = [*MAIN, *answer, *HELPER]
    unread, again = turn(timeline, longer)
    assert unread == len(HELPER) and again == alone(longer)


def test_the_same_prompt_again(timeline: Timeline, alone: Any) -> None:
    want = turn(timeline, MAIN)[1]
    unread, again = turn(timeline, MAIN)
    assert unread == slack(timeline) and again == want == alone(MAIN)


def test_a_helper_does_not_evict_the_main_session(timeline: Timeline, alone: Any) -> None:
    answer = turn(timeline, MAIN, answers=20)[1]
    for number in range(4):
        helper = [number, *HELPER]
        assert turn(timeline, helper)[1] == alone(helper)
    longer = [*MAIN, *answer, *HELPER]
    unread, again = turn(timeline, longer)
    assert unread == len(HELPER) and again == alone(longer)


def test_a_history_that_changes_after_the_last_user_message(timeline: Timeline, alone: Any) -> None:
    """Thoughts are dropped: the prefix ends where the user's last message begins, or near the prompt's end."""
    start = 600
    turn(timeline, MAIN, answers=40, turn=start)
    other = [*MAIN[:start], *HELPER]
    unread, answer = turn(timeline, other)
    assert unread == len(HELPER) and answer == alone(other)
    other = [*MAIN[:-BEFORE_END_TOKENS], *HELPER]
    unread, answer = turn(timeline, other)
    assert unread == len(HELPER) and answer == alone(other)


def test_a_long_prompt_has_places_on_its_way(timeline: Timeline, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fomoe_io.kept.timeline.EVERY_TOKENS", 200)
    turn(timeline, MAIN)
    other = [*MAIN[:450], *HELPER]
    unread, answer = turn(timeline, other)
    assert unread == len(HELPER) + (0 if timeline.kept.can_cut else 50) and answer == alone(other)


def test_two_prompts_take_turns(timeline: Timeline, alone: Any) -> None:
    first, second = MAIN[:500], [*MAIN[:300], *MAIN[:-250:-1]]
    turn(timeline, first), turn(timeline, second)
    for _ in range(2):
        for prompt in (first, second):
            unread, answer = turn(timeline, prompt)
            assert unread == slack(timeline) and answer == alone(prompt)


def test_nothing_known_may_count(timeline: Timeline, alone: Any) -> None:
    turn(timeline, MAIN)
    unread, answer = turn(timeline, MAIN, reuse=False)
    assert unread == len(MAIN) and answer == alone(MAIN)
    assert turn(timeline, MAIN)[0] == slack(timeline)


@pytest.mark.parametrize("cache_bytes", [0, "4500k", "5M", "6M"])
def test_little_memory_costs_reading_again_at_worst(model: Path, alone: Any, cache_bytes: Any) -> None:
    with Engine.open(model, dataclasses.replace(CONFIG, cache_bytes=cache_bytes)) as engine:
        timeline = engine.timeline()
        for prompt in (MAIN, HELPER, MAIN, [*MAIN[:300], *HELPER], MAIN, HELPER, MAIN[:400]):
            assert turn(timeline, prompt)[1] == alone(prompt)
            assert timeline.kept.held_bytes <= max(0, engine.budgets.kept_bytes)
            assert timeline.kept.held_bytes == sum(p.memory_bytes for p in timeline.kept.root.below())


def test_an_interrupted_prompt_is_known_as_far_as_it_was_read(timeline: Timeline, alone: Any) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 320:
            raise Stop

    tokens = timeline.begin(MAIN)
    with pytest.raises(Stop):
        timeline.read(tokens, stop)
    timeline.end()
    unread, answer = turn(timeline, MAIN)
    assert unread == len(MAIN) - 320 and answer == alone(MAIN)


# ---- what was sampled ----


def test_a_repeated_answer_keeps_its_tokens(timeline: Timeline, alone: Any) -> None:
    """The vocabulary merges `Ġ t`: an answer of both apart is one token when it is encoded again."""
    space, letter, merged = (timeline.tokenizer.encode(text)[0] for text in (" ", "t", " t"))
    assert len({space, letter, merged}) == 3
    tokens = timeline.begin(HELPER)
    timeline.read(tokens)
    for token in (space, letter):
        timeline.decode(token)
    timeline.end()
    encoded, sampled = [*HELPER, merged, *MAIN[:50]], [*HELPER, space, letter, *MAIN[:50]]
    assert timeline.unread(encoded) == 50
    unread, answer = turn(timeline, encoded)
    assert unread == 50 and answer == alone(sampled)
    assert list(timeline.tokens[: len(sampled)]) == sampled
    turn(timeline, MAIN)  # and from what is kept
    for prompt in (encoded, [*encoded[:-9], *HELPER]):
        unread, answer = turn(timeline, prompt)
        assert unread <= 111 and answer == alone([*HELPER, space, letter, *prompt[61:]])


def test_a_repeated_answer_after_a_restart(recurrent: None, reopened: Any, alone: Any, tmp_path: Path) -> None:
    timeline = reopened(tmp_path)
    space, letter, merged = (timeline.tokenizer.encode(text)[0] for text in (" ", "t", " t"))
    timeline.read(timeline.begin(MAIN[:400]))
    for token in [space, letter] * 40:
        timeline.decode(token)
    timeline.end()
    unread, answer = turn(reopened(tmp_path), [*MAIN[:400], *[merged] * 40, *HELPER])
    assert unread == len(HELPER) and answer == alone([*MAIN[:400], *[space, letter] * 40, *HELPER])


def test_a_seam_within_a_token_is_no_repetition(timeline: Timeline, alone: Any) -> None:
    space, merged = (timeline.tokenizer.encode(text)[0] for text in (" ", " t"))
    tokens = timeline.begin(HELPER)
    timeline.read(tokens)
    timeline.decode(space)
    timeline.end()
    prompt = [*HELPER, merged, *MAIN[:50]]
    unread, answer = turn(timeline, prompt)
    assert answer == alone(prompt) and unread <= 50 + 1 + slack(timeline)


# ---- the drive ----


def test_it_survives_a_restart(reopened: Any, alone: Any, tmp_path: Path) -> None:
    timeline = reopened(tmp_path)
    answer = turn(timeline, MAIN, answers=70, turn=600)[1]
    turn(timeline, HELPER)
    assert list(tmp_path.iterdir())  # nothing is left to be done: the process may be killed here
    again = reopened(tmp_path)
    longer = [*MAIN, *answer, *HELPER]
    unread, found = turn(again, longer)
    assert unread == len(HELPER) and found == alone(longer)
    other = [*MAIN[:600], *HELPER]
    unread, found = turn(reopened(tmp_path), other)
    assert unread == len(HELPER) and found == alone(other)


def test_a_restart_with_other_bounds(reopened: Any, alone: Any, tmp_path: Path) -> None:
    turn(reopened(tmp_path), MAIN)
    timeline = reopened(tmp_path, cache_bytes="5M", context_tokens=800, threads=1)
    unread, answer = turn(timeline, MAIN)
    assert unread <= 64 and answer == alone(MAIN)


def test_other_arithmetic_is_foreign(recurrent: None, reopened: Any, alone: Any, tmp_path: Path) -> None:
    turn(reopened(tmp_path), MAIN)
    other = reopened(tmp_path, activations="float32")
    assert turn(other, MAIN)[0] == len(MAIN)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", ["head", "rows", "end", "short", "empty", "foreign", "gone", "noise"])
def test_a_file_that_is_wrong_costs_reading_again(
    recurrent: None, reopened: Any, alone: Any, tmp_path: Path, harm: str
) -> None:
    turn(reopened(tmp_path), MAIN)
    for path in tmp_path.iterdir():
        if harm == "head":
            flip(path, 30)
        elif harm == "rows":
            flip(path, 8192 + 100)
        elif harm == "end":
            flip(path, path.stat().st_size - 4096)
        elif harm == "short":
            path.write_bytes(path.read_bytes()[:-4096])
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm == "foreign":
            data = path.read_bytes()
            path.write_bytes(b"GGUF" + data[4:])
        elif harm == "gone":
            path.unlink()
        else:
            path.write_bytes(random.bytes(path.stat().st_size))
    notes: list[str] = []
    timeline = reopened(tmp_path, notes)
    unread, answer = turn(timeline, MAIN)
    assert unread > 64 and answer == alone(MAIN)
    assert (harm == "gone") == (not notes) and all("\n" not in note and "not used" in note for note in notes)
    for _ in range(2):  # what turned out to be wrong is written anew
        unread, answer = turn(reopened(tmp_path, notes), MAIN)
        assert answer == alone(MAIN)
    assert unread <= 64


def test_a_file_of_another_model_under_our_name(recurrent: None, reopened: Any, alone: Any, tmp_path: Path) -> None:
    first = reopened(tmp_path)
    turn(first, MAIN)
    for path in tmp_path.iterdir():
        path.rename(path.with_name("0" * 16 + path.name[16:]))
    notes: list[str] = []
    second = reopened(tmp_path, notes)
    assert turn(second, MAIN)[0] == len(MAIN) and not notes  # other models' files are none of ours
    for path in list(tmp_path.iterdir()):
        if path.name.startswith("0" * 16):
            path.rename(path.with_name(first.kept.form.fingerprint[:15] + "x" + path.name[16:]))
    form = dataclasses.replace(first.kept.form, fingerprint=first.kept.form.fingerprint[:15] + "x" + "0" * 16)
    found = folders.Folder(tmp_path, 64 << 20, form.fingerprint, notes.append).scan()
    assert not found and notes and all("another model" in note for note in notes)


@pytest.mark.parametrize("number", [28, 5, 30])
def test_a_drive_that_refuses_to_write(
    recurrent: None, reopened: Any, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import os

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    notes: list[str] = []
    timeline = reopened(tmp_path, notes)
    with monkeypatch.context() as patch:
        patch.setattr("fomoe_io.kept.piece_file.os.pwrite", refuse)
        for prompt in (MAIN, HELPER, MAIN):
            assert turn(timeline, prompt)[1] == alone(prompt)
    assert len(notes) == 1 and os.strerror(number) in notes[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "readonly"])
def test_a_folder_that_can_not_be_used(recurrent: None, reopened: Any, alone: Any, tmp_path: Path, kind: str) -> None:
    path, notes = tmp_path / "kept", []
    if kind == "file":
        path.write_text("")
    else:
        path = Path("/proc/fomoe-kept")
    timeline = reopened(path, notes)
    assert turn(timeline, MAIN)[1] == alone(MAIN)
    assert turn(timeline, MAIN)[0] == slack(timeline)
    assert len(notes) == 1 and str(path) in notes[0]


def test_the_bound_of_the_drive_holds(recurrent: None, reopened: Any, alone: Any, tmp_path: Path) -> None:
    most = 3 << 19
    timeline = reopened(tmp_path, cache_disk_bytes=most)
    for number in range(5):
        prompt = [number, *MAIN]
        assert turn(timeline, prompt)[1] == alone(prompt)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= most
    unread, answer = turn(reopened(tmp_path), [4, *MAIN])  # the last is there
    assert unread <= 64 and answer == alone([4, *MAIN])


def test_files_that_vanish_meanwhile(recurrent: None, reopened: Any, alone: Any, tmp_path: Path) -> None:
    """Another process makes room."""
    turn(reopened(tmp_path), MAIN)
    timeline = reopened(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    unread, answer = turn(timeline, MAIN)
    assert unread == len(MAIN) and answer == alone(MAIN)


def test_what_a_killed_writer_has_left_is_removed(recurrent: None, reopened: Any, tmp_path: Path) -> None:
    turn(reopened(tmp_path), MAIN)
    files = set(tmp_path.iterdir())
    (tmp_path / f".{next(iter(files)).name}.123-00ff.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"somebody else's")
    reopened(tmp_path)
    assert set(tmp_path.iterdir()) == files | {tmp_path / ".mine.tmp"}


KILLED = """
import os, signal, sys
from pathlib import Path
from fomoe_io import Engine
from tests.engine.test_kept import CONFIG, MAIN, turn
import dataclasses
writes = int(sys.argv[3])
sync = os.fsync
def fsync(descriptor):
    global writes
    writes -= 1
    if not writes:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = fsync
config = dataclasses.replace(CONFIG, cache_folder=Path(sys.argv[2]), cache_disk_bytes=64 << 20)
with Engine.open(sys.argv[1], config) as engine:
    turn(engine.timeline(), MAIN, answers=60, turn=300)
"""


def test_killed_while_it_writes(recurrent: None, model: Path, reopened: Any, alone: Any, tmp_path: Path) -> None:
    """Each piece that was written is whole, and what was being written is gone."""
    root = Path(__file__).resolve().parent.parent.parent
    known = []
    for writes in (1, 3, 5):
        path = tmp_path / str(writes)
        command = [sys.executable, "-c", KILLED, str(model), str(path), str(writes)]
        assert subprocess.run(command, cwd=root, timeout=60).returncode == -signal.SIGKILL
        assert any(file.name.endswith(".tmp") for file in path.iterdir())
        unread, answer = turn(reopened(path), MAIN)
        assert answer == alone(MAIN) and not any(file.name.endswith(".tmp") for file in path.iterdir())
        known.append(len(MAIN) - unread)
    assert known[0] == 0 < known[-1]


# ---- one file ----


def test_a_session_in_a_file(timeline: Timeline, alone: Any, tmp_path: Path) -> None:
    answer = turn(timeline, MAIN)[1]
    saved, size = timeline.save(tmp_path / "slot")
    assert saved == len(MAIN) + 6 and size == (tmp_path / "slot").stat().st_size
    turn(timeline, HELPER)
    assert timeline.load(tmp_path / "slot") == (saved, size)
    longer = [*MAIN, *answer, *HELPER]
    unread, found = turn(timeline, longer)
    assert unread == len(HELPER) and found == alone(longer)


def test_a_session_in_a_damaged_file(recurrent: None, timeline: Timeline, alone: Any, tmp_path: Path) -> None:
    from fomoe_io.errors import FomoeError

    turn(timeline, MAIN)
    timeline.save(tmp_path / "slot")
    good = (tmp_path / "slot").read_bytes()
    for place in (0, 20, 4096, len(good) // 2, len(good) - 4096):
        (tmp_path / "slot").write_bytes(good)
        flip(tmp_path / "slot", place)
        with pytest.raises(FomoeError):
            timeline.load(tmp_path / "slot")
        assert turn(timeline, HELPER)[1] == alone(HELPER)
    (tmp_path / "slot").write_bytes(good[:-4096])
    with pytest.raises(FomoeError, match="bytes"):
        timeline.load(tmp_path / "slot")
    assert APART_TOKENS < BLOCK_TOKENS and array("i").itemsize == 4


def give_up(timeline: Timeline, tokens: list[int]) -> None:
    """A run that ends before its time."""
    gate = timeline.session._gate
    gate.on_look = Mock(side_effect=InterruptedError)
    try:
        with pytest.raises(InterruptedError):
            for _ in range(100):  # it looks every 50 ms
                timeline.read(tokens)
    finally:
        gate.on_look = None


def test_a_run_that_is_given_up_costs_what_it_read(engine: Engine, timeline: Timeline) -> None:
    prompt = MAIN[:400]
    timeline.begin(prompt)
    timeline.read(prompt[:100])
    timeline.stand_by()
    held = timeline.kept.held_bytes
    timeline.read(prompt[100:150])
    timeline.stand_by()
    assert timeline.kept.held_bytes == held  # the earlier place has gone
    timeline.end()
    timeline.begin(prompt)
    timeline.read(prompt[150:200])
    timeline.stand_by()
    give_up(timeline, prompt[200:264])
    read = len(timeline.tokens)
    timeline.end()
    assert timeline.is_sound == timeline.kept.can_cut and 200 <= read < 400
    again = MAIN[:200] + HELPER
    assert timeline.unread(again) == len(HELPER)
    timeline.begin(again)
    np.testing.assert_array_equal(timeline.read(HELPER), engine.timeline().read(again))


def test_a_place_for_the_moment_makes_nothing_leave(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline.begin(MAIN[:150])
    timeline.read(MAIN[:100])
    timeline.checkpoint()
    kept, place = timeline.kept, timeline.kept.find(array("i", MAIN), 100)
    monkeypatch.setattr(kept, "_most_bytes", kept.held_bytes)
    timeline.read(MAIN[100:150])
    timeline.stand_by()
    assert place is not None and kept.find(array("i", MAIN), 200) == place
