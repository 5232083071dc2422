"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fomoe_io.serve.dialect import Answer, Dialect, Format, Prepared, new_id, server_sent
from fomoe_io.serve.errors import ApiError, bad_request
from fomoe_io.serve.jobs import Piece
from fomoe_io.serve.prompts import ChatPrompt, Prompts
from fomoe_io.serve.schema import Probability, read
from fomoe_io.serve.settings import MOST_STOPS, ServeConfig
from fomoe_io.serve.thoughts import Part

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

BILLING_LINE = re.compile(r"^x-anthropic-billing-header:[^\n]*\n?", re.MULTILINE)
"""Some coding agents put a line that changes with every request in front of the system text; with it, no prompt would
begin as the one before it, and all would be read anew."""


class CountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/messages/count_tokens."""

    messages: list[dict[str, Any]]
    model: str = ""
    system: str | list[dict[str, Any]] = ""
    thinking: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None
    top_p: Probability | None = None
    stop_sequences: Annotated[list[str], Meta(max_length=MOST_STOPS)] = []


def error_document(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's form."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message, **error.extra}}


def messages(body: bytes, prompts: Prompts, config: ServeConfig) -> Prepared:
    """A request of /v1/messages."""
    request = read(body, MessagesRequest)
    prompt = _prompt(request, prompts)
    choosing = prompts.choosing_of({"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p})
    work = prompts.work(
        [prompt.tokens], choosing, most=request.max_tokens, stops=request.stop_sequences, turn=prompt.turn
    )
    form = Format(
        prompts.name, prompts.tokenizer, is_thinking=prompt.is_thinking, splits_thoughts=config.splits_thoughts
    )
    return Prepared(work, Messages(form, is_stream=request.stream))


def count_tokens(body: bytes, prompts: Prompts) -> dict[str, Any]:
    """/v1/messages/count_tokens."""
    return {"input_tokens": len(_prompt(read(body, CountRequest), prompts).tokens)}


def _prompt(request: CountRequest, prompts: Prompts) -> ChatPrompt:
    system = BILLING_LINE.sub("", _text_and_thoughts(request.system, "system")[0])
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for number, message in enumerate(request.messages):
        role, where = message.get("role"), f"messages[{number}]"
        if role not in ("user", "assistant"):
            raise bad_request(f"{where}: role {role!r} is not supported (user, assistant)")
        unknown = sorted(message.keys() - {"role", "content"})
        if unknown:
            raise bad_request(f"{where}.{unknown[0]} is not supported")
        text, thoughts = _text_and_thoughts(message.get("content"), where)
        found.append({"role": role, "content": text} | ({"reasoning_content": thoughts} if thoughts else {}))
    return prompts.of_chat(found, thinking=_thinking(request.thinking))


def _text_and_thoughts(content: Any, where: str) -> tuple[str, str]:
    """Of a string, or of blocks."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise bad_request(f"{where}: content is neither text nor a list of blocks")
    texts, thoughts = [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        else:
            raise bad_request(f"{where}: content of type {kind!r} is not supported, only text and thinking are")
    return "".join(texts), "".join(thoughts)


def _thinking(wanted: Mapping[str, Any] | None) -> bool | None:
    """`thinking`, which is on or off: its budget only bounds what the answer's own bound bounds as well."""
    if wanted is None:
        return None
    kind = wanted.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise bad_request(f"thinking of type {kind!r} is not supported")
    return str(kind) != "disabled"


class Messages(Dialect):
    """A message, or its events."""

    def __init__(self, form: Format, *, is_stream: bool) -> None:
        super().__init__(form, is_stream=is_stream)
        self.id = new_id("msg_")
        self._blocks = 0
        self._open: str | None = None

    def started(self, answer: Answer) -> Iterable[bytes]:
        """message_start."""
        message = {**self._message(answer, [], None, None), "usage": self._usage(answer, 0)}
        yield _event("message_start", message=message)
        yield _event("ping")

    def piece(self, answer: Answer, piece: Piece, parts: Sequence[Part]) -> Iterable[bytes]:
        """Deltas, in a block for thoughts and one for text."""
        for part in parts:
            if self._open != part.kind:
                yield from self._close_block()
                self._open = part.kind
                yield _event("content_block_start", index=self._blocks, content_block=_block(part.kind, ""))
            delta = (
                {"type": "thinking_delta", "thinking": part.text}
                if part.kind == "thought"
                else {"type": "text_delta", "text": part.text}
            )
            yield _event("content_block_delta", index=self._blocks, delta=delta)

    def _close_block(self) -> Iterable[bytes]:
        if self._open is None:
            return
        if self._open == "thought":
            yield _event("content_block_delta", index=self._blocks, delta={"type": "signature_delta", "signature": ""})
        yield _event("content_block_stop", index=self._blocks)
        self._blocks += 1
        self._open = None

    def ended(self, answer: Answer, parts: Sequence[Part]) -> Iterable[bytes]:
        """message_delta and message_stop."""
        rest = Piece(answer.index, -1, "", None, answer.timings)
        yield from self.piece(answer, rest, parts or ([] if self._blocks or self._open else [Part("text", "")]))
        yield from self._close_block()
        reason, word = _stop_reason(answer)
        yield _event(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": word},
            usage=self._usage(answer, len(answer.tokens)),
        )
        yield _event("message_stop")

    def finished(self) -> bytes:
        """Nothing more."""
        return b""

    def failed(self, error: ApiError) -> bytes:
        """An event of its own."""
        return server_sent(error_document(error), "error")

    def error_document(self, error: ApiError) -> dict[str, Any]:
        """In Anthropic's form."""
        return error_document(error)

    def document(self) -> dict[str, Any]:
        """The message."""
        answer = self.answers[0]
        content = [_block("thought", answer.thoughts)] if answer.thoughts else []
        if answer.text or not content:
            content.append(_block("text", answer.text))
        message = self._message(answer, content, *_stop_reason(answer))
        return {**message, "usage": self._usage(answer, len(answer.tokens))}

    def _message(self, answer: Answer, content: list[Any], reason: str | None, word: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.form.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": word,
        }

    def _usage(self, answer: Answer, output_tokens: int) -> dict[str, int]:
        """Cached tokens are not among the input tokens, in Anthropic's way of counting."""
        return {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens,
            "cache_read_input_tokens": answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": output_tokens,
        }


def _event(kind: str, **values: Any) -> bytes:
    return server_sent({"type": kind, **values}, kind)


def _block(kind: str, text: str) -> dict[str, Any]:
    if kind == "thought":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _stop_reason(answer: Answer) -> tuple[str, str | None]:
    if answer.stop_type == "word":
        return "stop_sequence", answer.stop_text
    return ("max_tokens" if answer.stop_type == "limit" else "end_turn"), None
