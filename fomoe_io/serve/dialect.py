"""What the dialects have in common: events of a job become an answer, and an answer becomes JSON."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

from fomoe_io.serve.errors import ApiError
from fomoe_io.serve.jobs import Ended, Event, Piece, Progress, Started, StopType, Timings, Work
from fomoe_io.serve.replays import Sampled
from fomoe_io.serve.sampling import Probability
from fomoe_io.serve.tools import CallReading, splitter
from fomoe_io.text.tokenizer import Tokenizer
from fomoe_io.text.tool_parser import Part

_ENCODER = msgspec.json.Encoder()
FINGERPRINT = "fomoe_io"
NO_TIMINGS = Timings(0, 0, 0.0, 0, 0.0)


def to_json(value: Any) -> bytes:
    """JSON; what is not finite becomes null."""
    return _ENCODER.encode(value)


def server_sent(value: Any, event: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + to_json(value) + b"\n\n"


def new_id(prefix: str) -> str:
    """An id that nobody else has."""
    return prefix + secrets.token_hex(16)


@dataclass(slots=True)
class Section:
    """Thoughts, text, or a call of a function, whose arguments are the text."""

    kind: Literal["thought", "text", "call"]
    text: str = ""
    name: str = ""
    id: str = ""

    @property
    def arguments(self) -> dict[str, Any] | None:
        """Of a call; None where they are no JSON object."""
        try:
            found = msgspec.json.decode(self.text.encode("utf-8", "replace") or b"{}")
        except (msgspec.DecodeError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


class Delta(NamedTuple):
    """A part that has come, and where it went: its section, and how many calls there were before that."""

    kind: Literal["thought", "text", "call", "arguments"]
    text: str
    section: Section
    call: int


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come; `sampled` is its text as the model wrote it, with thoughts and calls."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    sections: list[Section] = field(default_factory=list)
    sampled: list[str] = field(default_factory=list)
    thought_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    probabilities: list[Probability] = field(default_factory=list)
    stop_type: StopType = "limit"
    stop_text: str = ""
    timings: Timings = NO_TIMINGS

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(section.text for section in self.sections if section.kind == "text")

    @property
    def thoughts(self) -> str:
        """What was thought before."""
        return "".join(section.text for section in self.sections if section.kind == "thought")

    @property
    def calls(self) -> list[Section]:
        """Functions that it calls."""
        return [section for section in self.sections if section.kind == "call"]

    @property
    def finish_reason(self) -> str:
        """In OpenAI's words."""
        if self.stop_type == "limit":
            return "length"
        return "tool_calls" if self.calls else "stop"

    def add(self, part: Part) -> Delta:
        """Take what has come; what a stream says of it."""
        if part.kind == "call":
            self.sections.append(Section("call", name=part.text, id=new_id("call_")))
        elif part.kind != "arguments" and not (self.sections and self.sections[-1].kind == part.kind):
            self.sections.append(Section(part.kind, part.text))
        else:
            self.sections[-1].text += part.text
        return Delta(part.kind, part.text, self.sections[-1], len(self.calls) - 1)


class Format(NamedTuple):
    """What an answer's form depends on beside the dialect.

    Attributes
    ----------
    model : str
    tokenizer : Tokenizer
    is_thinking, splits_thoughts : bool
    has_progress, has_timings : bool
        In the stream: `return_progress` and `timings_per_token`.
    has_usage : bool
        In the stream.
    choices : int
    calls : CallReading or None
        How functions are called, where they may be.
    """

    model: str
    tokenizer: Tokenizer
    is_thinking: bool = False
    splits_thoughts: bool = False
    has_progress: bool = False
    has_timings: bool = False
    has_usage: bool = False
    choices: int = 1
    calls: CallReading | None = None


class Dialect(ABC):
    """Writes one request's answers; `frames` while they come, or `document` at the end."""

    def __init__(self, form: Format, *, is_stream: bool) -> None:
        self.form = form
        self.is_stream = is_stream
        self.created = int(time.time())
        self.answers: list[Answer] = []

    def frames(self, event: Event) -> bytes:
        """Take an event; what a stream says to it."""
        written: Iterable[bytes] = ()
        if isinstance(event, Started):
            form = self.form
            self._splitter = splitter(
                is_thinking=form.is_thinking, splits_thoughts=form.splits_thoughts, calls=form.calls
            )
            self.answers.append(Answer(event.run, event.prompt_tokens, event.cached_tokens))
            written = self.started(self.answers[-1])
        elif isinstance(event, Progress):
            written = self.progress(self.answers[-1], event) if self.form.has_progress else ()
        elif isinstance(event, Piece):
            written = self.piece(self.answers[-1], event, self._collect(event))
        elif isinstance(event, Ended):
            answer = self.answers[-1]
            deltas = [answer.add(part) for part in self._splitter.finish()]
            answer.stop_type, answer.stop_text, answer.timings = event.stop_type, event.stop_text, event.timings
            self._remember(answer)
            written = self.ended(answer, deltas)
        return b"".join(written) if self.is_stream else b""

    def _remember(self, answer: Answer) -> None:
        """An answer with calls, as the model wrote it."""
        calls = self.form.calls
        if answer.calls and calls is not None and calls.sampled is not None:
            text = self.form.tokenizer.decode(answer.tokens, special=True)
            calls.sampled.add([call.id for call in answer.calls], Sampled(text, self.form.is_thinking))

    def _collect(self, piece: Piece) -> Sequence[Delta]:
        answer, was_thinking = self.answers[-1], self._splitter.is_thinking
        deltas = [answer.add(part) for part in self._splitter.add(piece.text)]
        answer.sampled.append(piece.text)
        if piece.token >= 0:
            answer.tokens.append(piece.token)
            answer.thought_tokens += was_thinking or self._splitter.is_thinking
        if piece.probability is not None and not self.is_stream:
            answer.probabilities.append(piece.probability)
        answer.timings = piece.timings
        return deltas

    # ---- what a stream says; called only in order, and lazily ----

    def started(self, answer: Answer) -> Iterable[bytes]:
        """An answer's prompt has come to the engine."""
        return ()

    def progress(self, answer: Answer, progress: Progress) -> Iterable[bytes]:
        """A piece of a prompt was read."""
        return ()

    @abstractmethod
    def piece(self, answer: Answer, piece: Piece, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """A token came."""

    @abstractmethod
    def ended(self, answer: Answer, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """An answer is complete."""

    @abstractmethod
    def finished(self) -> bytes:
        """All are."""

    def failed(self, error: ApiError) -> bytes:
        """It went wrong on the way."""
        return server_sent(self.error_document(error))

    # ---- without a stream ----

    @abstractmethod
    def document(self) -> Any:
        """The whole response."""

    def error_document(self, error: ApiError) -> dict[str, Any]:
        """The body of an error."""
        return error.document()

    # ---- parts that several dialects share ----

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; one that is answered several times counts once."""
        return sum(answer.prompt_tokens for answer in self.answers if answer.index % self.form.choices == 0)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, not read again."""
        return sum(answer.cached_tokens for answer in self.answers if answer.index % self.form.choices == 0)

    @property
    def completion_tokens(self) -> int:
        """Of all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(answer.thought_tokens for answer in self.answers)},
        }

    def probability(self, probability: Probability) -> dict[str, Any]:
        """A chosen token with its alternatives, as OpenAI's chat and llama.cpp have it."""
        top = [self._token(token, logprob) for token, logprob in probability.top]
        return {**self._token(probability.token, probability.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.token_text(token)
        return {"id": token, "token": text, "bytes": raw, "logprob": logprob}

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """A token's text, and its bytes: of a part of a character only these are true."""
        raw = self.form.tokenizer.decode_bytes(token, special=True)
        return raw.decode("utf-8", "replace"), list(raw)


class Prepared(NamedTuple):
    """A request that is ready for the queue."""

    work: Work
    dialect: Dialect
