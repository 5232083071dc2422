"""Thoughts are told from text however the stream is cut."""

from __future__ import annotations

import pytest

from fomoe_io.serve.thoughts import ThoughtSplitter

ANALYSIS, ANSWER = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"


def split(text: str, size: int, **options: bool) -> tuple[str, str]:
    splitter = ThoughtSplitter(**options)
    parts = [part for i in range(0, len(text), size) for part in splitter.add(text[i : i + size])] + splitter.finish()
    assert all(part.text for part in parts)
    thought, said = ("".join(part.text for part in parts if part.kind == kind) for kind in ("thought", "text"))
    return thought, said


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "is_thinking", "want"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, ("hm", "yes")),
        ("hm </thin <b>\n\nso\n</think>\n\nyes\n\nno\n", True, ("hm </thin <b>\n\nso", "yes\n\nno\n")),
        ("no thoughts <think>here</think>", False, ("", "no thoughts <think>here</think>")),
        ("\n\nplain", False, ("", "\n\nplain")),
        ("<thin", False, ("", "<thin")),
        ("cut short", True, ("cut short", "")),
        ("</think>\n\nyes", True, ("", "yes")),
        ("<think></think>x", False, ("", "x")),
        ("", False, ("", "")),
        (f"{ANALYSIS}hm <|end|> so{ANSWER}yes", False, ("hm <|end|> so", "yes")),
        (f"{ANALYSIS}cut <|end|><|start|>", False, ("cut <|end|><|start|>", "")),
        ("<|channel|>final<|message|>yes", False, ("", "yes")),
        ("<|channel|>commentary to=f<|message|>{}", False, ("", "<|channel|>commentary to=f<|message|>{}")),
    ],
)
def test_split(text: str, is_thinking: bool, want: tuple[str, str], size: int) -> None:
    assert split(text, size, is_thinking=is_thinking) == want


def test_everything_is_text_where_nothing_is_split() -> None:
    assert split("<think>a</think>b", 3, splits=False) == ("", "<think>a</think>b")
