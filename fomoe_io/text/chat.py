"""Chat templates: the jinja2 text that a GGUF carries, run in a sandbox with bounds of time and memory."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fomoe_io.errors import FormatError
from fomoe_io.storage.metadata import Metadata

TEMPLATE_KEY = "tokenizer.chat_template"

Message = dict[str, Any]
"""{"role": "user" | "assistant" | "system" | "tool", "content": text}; an assistant's may have "tool_calls" in OpenAI's
form, with arguments as an object."""

MOST_SECONDS = 10.0
"""Of a template's run; real ones take milliseconds."""
START_SECONDS = 60.0
"""Of its process's start, a tenth of a second unless the machine is very busy."""

_WORKER = Path(__file__).with_name("template_worker.py")
_PROBE = "fomoe probe"
_THINKING = "message.thinking"
"""What templates of gpt-oss call the thoughts before a call."""
_CALL_PROBE = {"fomoe_probe": "fomoe value"}


class _Worker:
    """The process that runs a template; see template_worker.py."""

    def __init__(self, source: str) -> None:
        # its imports are found without the site module, whose start costs as much as jinja2's
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(_WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0,
            start_new_session=True,  # Ctrl-C is ours
        )  # fmt: skip
        self.stop = weakref.finalize(self, _end, self._process)
        try:
            self.ask({"source": ""}, START_SECONDS)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            raise _failure(f"can't be run: its process did not start ({type(error).__name__})") from None
        try:
            self.ask({"source": source})
        except RuntimeError as error:
            raise _failure(f"is damaged: {error}") from None

    def ask(self, request: Mapping[str, Any], seconds: float | None = None) -> str:
        """The answer's text.

        Raises
        ------
        RuntimeError
            The template fails, and why.
        TimeoutError, EOFError
            The process has not answered, and is ended.
        """
        end = time.monotonic() + (seconds or MOST_SECONDS)
        try:
            answer = json.loads(self._exchange(json.dumps(request).encode() + b"\n", end))
        except BaseException:  # also Ctrl-C: what it would answer later is nobody's
            self.stop()
            raise
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return str(answer["text"])

    def _exchange(self, question: bytes, end: float) -> bytes:
        """Both ways at once, as neither side's pipe holds everything."""
        assert self._process.stdin is not None and self._process.stdout is not None
        to, source = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(to, False)
        left, answer = memoryview(question), bytearray()
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(to, select.POLLOUT)
        while not answer.endswith(b"\n"):
            events = poll.poll(max(0.0, end - time.monotonic()) * 1000)
            if not events:
                raise TimeoutError
            for descriptor, _ in events:
                if descriptor == source:
                    piece = os.read(source, 1 << 20)
                    if not piece:
                        raise EOFError
                    answer += piece
                elif left:
                    try:
                        left = left[os.write(to, left) :]
                    except BrokenPipeError:
                        raise EOFError from None
                if not left and descriptor == to:
                    poll.unregister(to)
        return bytes(answer)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


class ChatTemplate:
    """Turns messages into the text that the model was trained on.

    Parameters
    ----------
    source : str
        The template.
    bos_text, eos_text : str
        What `bos_token` and `eos_token` stand for in it.

    Raises
    ------
    FormatError
        It is no template, or can't be run here.
    """

    def __init__(self, source: str, *, bos_text: str = "", eos_text: str = "") -> None:
        self._source = source
        # tools and documents: templates ask whether they are none, which an undefined name is not
        self._names = {"bos_token": bos_text, "eos_token": eos_text, "tools": None, "documents": None}
        self._worker: _Worker | None = None
        self._takes_parts: bool | None = None
        self._takes_json: bool | None = None
        self._lock = threading.Lock()  # one question at a time
        with _bounds():
            self._started()

    @property
    def source(self) -> str:
        """The template itself."""
        return self._source

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, bos_text: str, eos_text: str) -> ChatTemplate | None:
        """The GGUF's template, None when it has none.

        Raises
        ------
        FormatError
        """
        source = Metadata(metadata).text(TEMPLATE_KEY, None)
        return cls(source, bos_text=bos_text, eos_text=eos_text) if source else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        enable_thinking: bool | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> str:
        """The text up to where the assistant's next answer begins; `names` are known to the template besides.

        Raises
        ------
        FormatError
            The template refuses these messages, fails, or takes too long or too much memory.
        """
        values: dict[str, Any] = {"add_generation_prompt": True, **self._names, **(names or {})}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        try:
            if any(message.get("tool_calls") for message in messages):
                messages = _with_thinking(messages) if _THINKING in self._source else messages
                if self._takes_json is None:
                    self._takes_json = self._probe_calls(values)
                messages = _with_json(messages) if self._takes_json else messages
            if self._takes_parts is None:
                self._takes_parts = self._probe(messages, values)
            return self._run({**values, "messages": _with_parts(messages) if self._takes_parts else list(messages)})
        except RuntimeError as error:
            raise _failure(f"refuses the conversation: {error}") from None

    def _probe(self, messages: Sequence[Message], values: Mapping[str, Any]) -> bool | None:
        """Whether contents must be lists of parts, as some templates want them: a text fails there, or is left out.

        None when neither form comes through, which may be the conversation's fault.
        """
        texts = [{**message, "content": _PROBE} for message in messages]
        for takes_parts in (False, True):
            with suppress(RuntimeError):
                if _PROBE in self._run({**values, "messages": _with_parts(texts) if takes_parts else texts}):
                    return takes_parts
        return None

    def _probe_calls(self, values: Mapping[str, Any]) -> bool:
        """Whether arguments of calls must be JSON texts: objects fail there, or are written as Python has them.

        Most templates go through an object's keys, or write it with `tojson`; some put it between other texts.
        """
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": _CALL_PROBE}}
        talk: list[Message] = [
            {"role": "user", "content": _PROBE}, {"role": "assistant", "content": "", "tool_calls": [call]}
        ]  # fmt: skip
        key = next(iter(_CALL_PROBE))
        for takes_json in (False, True):
            with suppress(RuntimeError):
                text = self._run({**values, "messages": _with_json(talk) if takes_json else talk})
                if key in text and f"'{key}'" not in text:
                    return takes_json
        return False

    def _started(self) -> _Worker:
        if self._worker is None or not self._worker.stop.alive:
            self._worker = _Worker(self._source)
        return self._worker

    def _run(self, values: Mapping[str, Any]) -> str:
        with self._lock, _bounds():
            return self._started().ask({"values": values})


def _with_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _with_thinking(messages: Sequence[Message]) -> list[Message]:
    """Beside a text, thoughts of a call are refused by these templates."""
    return [
        {**message, "thinking": message["reasoning_content"]}
        if message.get("tool_calls") and message.get("reasoning_content") and not message["content"] else message
        for message in messages
    ]  # fmt: skip


def _with_json(messages: Sequence[Message]) -> list[Message]:
    return [
        {**message, "tool_calls": [_call_with_json(call) for call in message["tool_calls"]]}
        if message.get("tool_calls") else message
        for message in messages
    ]  # fmt: skip


def _call_with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


@contextmanager
def _bounds() -> Iterator[None]:
    """What went beyond them becomes an error of the template."""
    try:
        yield
    except TimeoutError:
        raise _failure(f"takes more than {MOST_SECONDS:g} s") from None
    except EOFError:
        raise _failure("takes more memory or stack than its process may") from None
    except OSError as error:
        raise _failure(f"can't be run: no process for it ({error.strerror})") from None


def _failure(what: str) -> FormatError:
    return FormatError(f"the model's chat template {what}", hint="--raw")
