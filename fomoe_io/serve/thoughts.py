"""Telling a model's thoughts from what it says, while the text is still coming."""

from __future__ import annotations

from typing import Protocol

from fomoe_io.text.tool_parser import CallParser, Part

BEGIN, END = "<think>", "</think>"
ENDS = {
    BEGIN: END,
    # of gpt-oss, whose answers have channels
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
}
"""What thoughts begin with -> what ends them."""

FINAL = "<|channel|>final<|message|>"
"""What an answer without thoughts begins with, of gpt-oss."""


class Splitter(Protocol):
    """Takes an answer's text and gives its parts."""

    @property
    def is_thinking(self) -> bool:
        """Whether the model is at its thoughts now."""

    def add(self, text: str) -> list[Part]:
        """What is known after this text."""

    def finish(self) -> list[Part]:
        """What was held back in vain."""


class ThoughtSplitter:
    """Splits the thoughts at the beginning of an answer, between `<think>` and `</think>` or as ENDS has it, off.

    Parameters
    ----------
    is_thinking : bool
        The prompt ends with `<think>`.
    splits : bool
        False takes everything for text.
    """

    def __init__(self, *, is_thinking: bool = False, splits: bool = True) -> None:
        self._state = "text" if not splits else "thought" if is_thinking else "start"
        self._held, self._end = "", END
        self._is_first = True  # of its kind: leading line ends are the template's, not the model's

    @property
    def is_thinking(self) -> bool:
        """Whether the model is at its thoughts now."""
        return self._state == "thought"

    def add(self, text: str) -> list[Part]:
        """What is known after this text."""
        if self._state == "text" and not self._held and not self._is_first:
            return [Part("text", text)] if text else []
        self._held += text
        parts: list[Part] = []
        if self._state == "start":
            self._start()
        if self._state == "thought":
            parts += self._thought()
        if self._state == "text":
            parts += self._text()
        return parts

    def finish(self) -> list[Part]:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return [Part("thought" if self._state == "thought" else "text", held)] if held else []

    def _start(self) -> None:
        begun = self._held.lstrip()
        for begin, end in ENDS.items():
            if begun.startswith(begin):
                self._state, self._held, self._end = "thought", begun[len(begin) :], end
                return
        if begun.startswith(FINAL):
            self._state, self._held = "text", begun[len(FINAL) :]
        elif not any(begin.startswith(begun) for begin in (*ENDS, FINAL)):
            self._state, self._is_first = "text", False

    def _thought(self) -> list[Part]:
        if self._is_first:
            self._held = self._held.lstrip("\n")
            self._is_first = not self._held
        place, end = self._held.find(self._end), self._end
        if place >= 0:
            thought, self._held = self._held[:place], self._held[place + len(end) :]
            self._state, self._is_first = "text", True
            return [Part("thought", thought.rstrip("\n"))] if thought.rstrip("\n") else []
        # what may become the end, with the line ends before it
        keep = next((n for n in range(len(end) - 1, 0, -1) if self._held.endswith(end[:n])), 0)
        sure = self._held[: len(self._held) - keep].rstrip("\n")
        self._held = self._held[len(sure) :]
        return [Part("thought", sure)] if sure else []

    def _text(self) -> list[Part]:
        if self._is_first:
            self._held = self._held.lstrip("\n")
            self._is_first = not self._held
        said, self._held = self._held, ""
        return [Part("text", said)] if said else []


class CallSplitter:
    """Splits off thoughts, and calls from what comes after them.

    Parameters
    ----------
    thoughts : ThoughtSplitter
    parser : CallParser
    """

    def __init__(self, thoughts: ThoughtSplitter, parser: CallParser) -> None:
        self._thoughts = thoughts
        self._parser = parser

    @property
    def is_thinking(self) -> bool:
        """Whether the model is at its thoughts now."""
        return self._thoughts.is_thinking

    def add(self, text: str) -> list[Part]:
        """What is known after this text."""
        return self._parsed(self._thoughts.add(text))

    def finish(self) -> list[Part]:
        """What was held back in vain."""
        return self._parsed(self._thoughts.finish()) + self._parser.finish()

    def _parsed(self, parts: list[Part]) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            found += [part] if part.kind == "thought" else self._parser.add(part.text)
        return found
