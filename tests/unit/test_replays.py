"""Calls as the model wrote them, in histories that a template would write in another way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec")

from fomoe_io.errors import FormatError
from fomoe_io.serve import replays
from fomoe_io.serve.replays import Sampled, SampledCalls

CALL = '<tool_call>{"name":"f"}</tool_call>'
ASK = {"role": "user", "content": "?"}


def turn(*ids: str) -> list[dict[str, Any]]:
    """A call and its result."""
    calls = [{"id": i, "function": {"name": "f", "arguments": {}}} for i in ids]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "ok"}]


def render(messages: Sequence[dict[str, Any]]) -> str:
    return "".join(f"{m['role']}:{m['content']}{'CALL' if m.get('tool_calls') else ''};" for m in messages)


def test_known_calls_are_written_as_they_were() -> None:
    sampled = SampledCalls()
    assert sampled.replayed([ASK, *turn("a")], render, "") is None
    sampled.add(["a"], Sampled(CALL, False))
    sampled.add(["b", "c"], Sampled(CALL * 2, False))
    found = sampled.replayed([ASK, *turn("a"), *turn("b", "c"), *turn("d")], render, "")
    assert found == f"user:?;assistant:{CALL};tool:ok;assistant:{CALL * 2};tool:ok;assistant:CALL;tool:ok;"
    assert sampled.replayed([ASK, *turn("a", "b")], render, "") is None  # of two answers
    assert sampled.replayed([ASK, {"role": "assistant", "content": "hm"}], render, "") is None


def test_earlier_thoughts_are_left_to_the_template() -> None:
    sampled = SampledCalls()
    sampled.add(["a"], Sampled(f"hm</think>{CALL}", True))
    assert sampled.replayed([ASK, *turn("a"), ASK], render, "<think>\n") is None
    assert sampled.replayed([ASK, *turn("a")], render, "<think>\n") == (
        f"user:?;assistant:<think>\nhm</think>{CALL};tool:ok;"
    )


def test_a_template_that_refuses_or_repeats() -> None:
    sampled = SampledCalls()
    sampled.add(["a"], Sampled(CALL, False))

    def refuse(messages: Sequence[dict[str, Any]]) -> str:
        raise FormatError("no call before this result")

    assert sampled.replayed([ASK, *turn("a")], refuse, "") is None
    assert sampled.replayed([ASK, *turn("a")], lambda messages: 2 * render(messages), "") is None


def test_they_survive_the_process_and_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calls.jsonl"
    first = SampledCalls(path)
    first.add(["a"], Sampled("é" + CALL, True))
    with path.open("ab") as stream:
        stream.write(b'{"ids": 3}\nnoise\n[]\n{"ids": ["x"], "thinking": 1, "text": 5}\n{"ids": ["c"], "te')
    (message,) = turn("a")[:1]
    assert SampledCalls(path).of(message) == Sampled("é" + CALL, True)
    assert len(path.read_bytes().splitlines()) == 1
    monkeypatch.setattr(replays, "MOST_BYTES", 1000)
    for number in range(200):
        first.add([f"n{number}"], Sampled(CALL, False))
    assert path.stat().st_size < 3000 and first.of(message) is None
    assert SampledCalls(path).of(turn("n199")[0]) == Sampled(CALL, False)
    unwritable = SampledCalls(tmp_path / "nothing" / "calls.jsonl")
    unwritable.add(["a"], Sampled(CALL, False))
    assert unwritable.of(message) == Sampled(CALL, False)
