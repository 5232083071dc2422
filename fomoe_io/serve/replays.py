"""Calls of functions as the model wrote them: a template writes them in its own way, and all would be read anew."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fomoe_io.errors import FomoeError
from fomoe_io.system.files import write_atomically

MOST_BYTES = 4 << 20
"""Of the texts, in memory and in the file."""

_MARK = "fomoe-call-{}-0d1f"


class Sampled(NamedTuple):
    """An answer's text, and whether the template had begun its thoughts."""

    text: str
    is_thinking: bool


class SampledCalls:
    """The latest answers with calls, by the calls' ids; from any thread.

    Parameters
    ----------
    path : Path or None
        A file that keeps them beyond the process.  What is wrong with it costs reading a conversation again at worst.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._lock = path, threading.Lock()
        self._answers: dict[str, Sampled] = {}
        self._held_bytes = self._file_bytes = 0
        if path is not None:
            self._load(path)

    def _load(self, path: Path) -> None:
        with suppress(OSError):
            for line in path.read_bytes()[-2 * MOST_BYTES :].splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    found = json.loads(line)
                    ids, text = [str(i) for i in found["ids"]], found["text"]
                    if isinstance(text, str):
                        self._take(ids, Sampled(text, bool(found["thinking"])))
            self._rewrite(path)

    def _rewrite(self, path: Path) -> None:
        together: dict[Sampled, list[str]] = {}
        for identity, sampled in self._answers.items():
            together.setdefault(sampled, []).append(identity)
        data = b"".join(_line(ids, sampled) for sampled, ids in together.items())
        write_atomically(path, data)
        self._file_bytes = len(data)

    def _take(self, ids: Sequence[str], sampled: Sampled) -> None:
        for identity in ids:
            self._answers[identity] = sampled
            self._held_bytes += len(sampled.text)
        while self._held_bytes > MOST_BYTES:
            self._held_bytes -= len(self._answers.pop(next(iter(self._answers))).text)

    def add(self, ids: Sequence[str], sampled: Sampled) -> None:
        """An answer with calls of these ids."""
        with self._lock:
            self._take(ids, sampled)
            if self._path is None:
                return
            with suppress(OSError):
                line = _line(ids, sampled)
                with self._path.open("ab") as stream:
                    stream.write(line)
                self._file_bytes += len(line)
                if self._file_bytes > 2 * MOST_BYTES:
                    self._rewrite(self._path)

    def of(self, message: dict[str, Any]) -> Sampled | None:
        """The answer that a message of the assistant stands for, by the ids of its calls."""
        ids = [call.get("id") for call in message.get("tool_calls") or ()]
        with self._lock:
            found = {self._answers.get(identity) for identity in ids} if ids else {None}
        return found.pop() if len(found) == 1 else None

    def replayed(
        self, messages: Sequence[dict[str, Any]], render: Callable[[Sequence[dict[str, Any]]], str], begun: str
    ) -> str | None:
        """A conversation's text with calls as they were written; None where there are none, or it can't be told.

        Thoughts of answers before the user's last message are the template's to leave out: those are left to it.

        Parameters
        ----------
        messages : sequence of dict
        render : callable
            Makes a text of them.
        begun : str
            What the template begins thoughts with.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        marked, texts = list(messages), {}
        for i, message in enumerate(messages):
            sampled = self.of(message)
            if sampled is None or (i < last and (sampled.is_thinking or "</think>" in sampled.text)):
                continue
            mark = _MARK.format(i)
            texts[mark] = (begun if sampled.is_thinking else "") + sampled.text
            marked[i] = {"role": "assistant", "content": mark}
        if not texts:
            return None
        try:
            text = render(marked)
        except FomoeError:
            return None
        if any(text.count(mark) != 1 for mark in texts):
            return None
        for mark, sampled_text in texts.items():
            text = text.replace(mark, sampled_text)
        return text


def _line(ids: Sequence[str], sampled: Sampled) -> bytes:
    found = {"ids": list(ids), "thinking": sampled.is_thinking, "text": sampled.text}
    return json.dumps(found, ensure_ascii=True).encode() + b"\n"
