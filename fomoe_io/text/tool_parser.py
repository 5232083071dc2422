"""Finding calls of functions in what a model writes, while it still writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fomoe_io.text.tool_formats import ToolFormat, is_text


class Part(NamedTuple):
    """A stretch of an answer: of thoughts, of text, the name of a function called, or of its arguments as JSON."""

    kind: Literal["thought", "text", "call", "arguments"]
    text: str


class JsonScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._is_escaped = False

    def take(self, text: str) -> int | None:
        """Characters until the object's end; None where all of them are within it."""
        for place, character in enumerate(text):
            if self._in_text:
                self._in_text = self._is_escaped or character != '"'
                self._is_escaped = not self._is_escaped and character == "\\"
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


class CallParser:
    """Tells calls from text, in a format of :data:`fomoe_io.text.tool_formats.FORMATS`.

    What can't be read as a call stays text.  A call that is cut short keeps the arguments that came: they are no JSON.

    Parameters
    ----------
    known : ToolFormat
    schemas : mapping of str to mapping
        Function -> the schema of its arguments, by which formats of tags tell texts from other values.
    """

    def __init__(self, known: ToolFormat, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._format = known
        self._schemas = schemas
        self._held = ""
        self._raw = ""  # of a call whose name is not known yet
        self._has_called = False
        self._step = self._text
        self._parts: list[Part] = []

    def add(self, text: str) -> list[Part]:
        """What is known after this text."""
        self._held += text
        while self._step():
            pass
        return self._taken()

    def finish(self) -> list[Part]:
        """What was held back in vain."""
        is_head = self._step == self._head
        if is_head and not self._read_whole(self._held):
            self._say("text", self._format.begin + self._held)
        elif self._step == self._text and (self._held.strip() or not self._has_called):
            self._say("text", self._held)
        elif self._step == self._value and self._is_text:
            self._say("arguments", _escaped(self._held))
        self._held = ""
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _say(self, kind: Literal["text", "call", "arguments"], text: str) -> None:
        if text or kind == "call":
            self._parts.append(Part(kind, text))

    # ---- steps: each takes something off what is held, or waits for more (False) ----

    def _text(self) -> bool:
        """Blanks before a call belong to it."""
        before, found, after = self._held.partition(self._format.begin)
        if found:
            self._say("text", before.rstrip())
            self._held, self._step = after, self._head
            return True
        sure = before[: len(before) - overlap(before, self._format.begin)].rstrip()
        if sure:
            self._say("text", sure)
            self._held = self._held[len(sure) :]
        return False

    def _head(self) -> bool:
        match = self._format.head.match(self._held)
        if match:
            self._call(match[1].strip())
            self._held = self._held[match.end() :]
            return True
        whole, found, after = self._held.partition(self._format.end)
        if not found:
            return False
        if not self._read_whole(whole):
            self._say("text", self._format.begin + whole + self._format.end)
        self._held, self._step = after, self._text
        return True

    def _call(self, name: str) -> None:
        self._say("call", name)
        self._has_called = True
        self._scanner, self._keys = JsonScanner(), 0
        self._properties = self._schemas.get(name, {}).get("properties") or {}
        self._step = self._json if self._format.parameter is None else self._parameter

    def _read_whole(self, text: str) -> bool:
        """A call in JSON whose parts are not in the usual order."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False
        if self._format.parameter is not None or not isinstance(name, str) or not isinstance(arguments, dict):
            return False
        self._call(name)
        self._say("arguments", json.dumps(arguments, ensure_ascii=False))
        return True

    def _json(self) -> bool:
        end = self._scanner.take(self._held)
        self._say("arguments", self._held[:end])
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._step = self._after
        return end is not None

    def _parameter(self) -> bool:
        assert self._format.parameter is not None
        match = self._format.parameter.match(self._held)
        if match:
            key = match[1].strip()
            self._say("arguments", f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: ")
            self._keys += 1
            self._is_text, self._is_begun = is_text(self._properties.get(key)), False
            self._held, self._step = self._held[match.end() :], self._value
            return True
        match = self._format.tail.match(self._held)
        if match or self._format.end in self._held:
            self._say("arguments", "}" if self._keys else "{}")
            self._held = self._held[match.end() if match else 0 :]
            self._step = self._after
            return True
        return False

    def _value(self) -> bool:
        if not self._is_begun:
            if self._format.is_padded and not self._held:
                return False
            self._is_begun = True
            if self._format.is_padded:
                self._held = self._held.removeprefix("\n")
            if self._is_text:
                self._say("arguments", '"')
        value, found, after = self._held.partition(self._format.value_end)
        if found:
            value = value.removesuffix("\n") if self._format.is_padded else value
            self._say("arguments", _escaped(value) + '"' if self._is_text else _as_json(value))
            self._held, self._step = after, self._parameter
            return True
        if self._is_text:
            keep = overlap(value, self._format.value_end)
            keep += self._format.is_padded and value[: len(value) - keep].endswith("\n")
            sure = value[: len(value) - keep]
            self._say("arguments", _escaped(sure))
            self._held = value[len(sure) :]
        return False

    def _after(self) -> bool:
        """Another call of the same section, or its end; what else stands there says nothing."""
        match = self._format.head.match(self._held)
        before, found, after = self._held.partition(self._format.end)
        if match and match.end() <= len(before):
            self._call(match[1].strip())
            self._held = self._held[match.end() :]
            return True
        if found:
            self._held, self._step = after, self._text
        return bool(found)


def overlap(text: str, word: str) -> int:
    """Characters at the end of a text that may become a word."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(value: str) -> str:
    """A value that is no text by its schema, or of which the schema says nothing: JSON if it can be read as such."""
    try:
        return json.dumps(json.loads(value), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)


class HarmonyParser:
    """The channels of gpt-oss: analysis is thought, what is addressed to a function a call, all else text."""

    _ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
    _MESSAGE = "<|message|>"
    _RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)")

    def __init__(self) -> None:
        self._held = ""
        self._kind: Literal["thought", "text", "arguments"] | None = None  # None: a header
        self._is_first = True

    @property
    def is_thinking(self) -> bool:
        """Whether the model is at its thoughts now."""
        return self._kind == "thought"

    def add(self, text: str) -> list[Part]:
        """What is known after this text."""
        self._held += text
        parts: list[Part] = []
        while self._header(parts) if self._kind is None else self._content(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back in vain: of a header nothing."""
        held, self._held = self._held, ""
        return [Part(self._kind, held)] if held and self._kind is not None else []

    def _header(self, parts: list[Part]) -> bool:
        begun, begins = self._held.lstrip(), ("<|channel|>", "to=")
        if self._is_first and not any(begun.startswith(text) or text.startswith(begun) for text in begins):
            self._kind = "text"  # no channels at all
            return True
        header, found, after = self._held.partition(self._MESSAGE)
        if not found:
            return False
        recipient = self._RECIPIENT.search(header)
        self._kind = "arguments" if recipient else "thought" if "<|channel|>analysis" in header else "text"
        if recipient:
            parts.append(Part("call", recipient[1]))
        self._held, self._is_first = after, False
        return True

    def _content(self, parts: list[Part]) -> bool:
        assert self._kind is not None
        place = min((self._held.find(end) for end in self._ENDS if end in self._held), default=-1)
        if place < 0:
            keep = max(overlap(self._held, end) for end in self._ENDS)
            sure = self._held[: len(self._held) - keep]
            self._held = self._held[len(sure) :]
        else:
            sure = self._held[:place]
            self._held = self._held[place:]
        if sure:
            parts.append(Part(self._kind, sure))
        if place < 0:
            return False
        self._kind, self._is_first = None, False
        return True
