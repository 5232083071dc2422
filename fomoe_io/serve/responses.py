"""/v1/responses, without a memory of earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fomoe_io.serve.dialect import Answer, Dialect, Format, Prepared, new_id, server_sent
from fomoe_io.serve.errors import ApiError, bad_request
from fomoe_io.serve.jobs import Piece, Progress
from fomoe_io.serve.openai import chat_messages, progress_document, thinking_of
from fomoe_io.serve.prompts import Prompts
from fomoe_io.serve.schema import Probability, StreamOptions, read
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.serve.thoughts import Part


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body."""

    input: str | list[dict[str, Any]]
    model: str = ""
    instructions: str = ""
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    text: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_progress: bool = False
    timings_per_token: bool = False


def responses(body: bytes, prompts: Prompts, config: ServeConfig) -> Prepared:
    """A request."""
    request = read(body, ResponsesRequest)
    if request.text not in (None, {}, {"format": {"type": "text"}}):
        raise bad_request("text: only the format 'text' is supported", param="text")
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": request.instructions}]
    messages = messages if request.instructions else []
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += [_message(number, item) for number, item in enumerate(request.input)]
    prompt = prompts.of_chat(chat_messages(messages), thinking=thinking_of(request.chat_template_kwargs))
    choosing = prompts.choosing_of({"temperature": request.temperature, "top_p": request.top_p})
    work = prompts.work([prompt.tokens], choosing, most=request.max_output_tokens, turn=prompt.turn)
    form = Format(
        prompts.name,
        prompts.tokenizer,
        is_thinking=prompt.is_thinking,
        splits_thoughts=config.splits_thoughts,
        has_progress=request.return_progress,
        has_timings=request.timings_per_token,
    )
    return Prepared(work, Responses(form, request, choosing.sampling.temperature, choosing.sampling.top_p))


def _message(number: int, item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind != "message":
        raise bad_request(
            f"input[{number}]: items of type {kind!r} are not supported, only messages are", param="input"
        )
    return {name: value for name, value in item.items() if name not in ("type", "status", "id")}


class Responses(Dialect):
    """A response, or its events: an item of thoughts if there are any, and a message."""

    def __init__(self, form: Format, request: ResponsesRequest, temperature: float, top_p: float) -> None:
        super().__init__(form, is_stream=request.stream)
        self.id = new_id("resp_")
        self._request = request
        self._temperature, self._top_p = temperature, top_p
        self._ids = {"thought": new_id("rs_"), "text": new_id("msg_")}
        self._open: str | None = None
        self._items: list[dict[str, Any]] = []
        self._written = ""
        self._number = -1

    # ---- the stream ----

    def _event(self, kind: str, **values: Any) -> bytes:
        self._number += 1
        return server_sent({"type": kind, "sequence_number": self._number, **values}, kind)

    def started(self, answer: Answer) -> Iterable[bytes]:
        """created, in_progress."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))

    def progress(self, answer: Answer, progress: Progress) -> Iterable[bytes]:
        """in_progress again, with how much of the prompt is read."""
        response = self._response("in_progress", [], None)
        yield self._event("response.in_progress", response=response, prompt_progress=progress_document(progress))

    def piece(self, answer: Answer, piece: Piece, parts: Sequence[Part]) -> Iterable[bytes]:
        """Deltas."""
        for part in parts:
            if self._open != part.kind:
                yield from self._close_item("completed")
                yield from self._open_item(part.kind)
            self._written += part.text
            yield self._event(
                f"response.{_name(part.kind)}.delta",
                **self._place(),
                delta=part.text,
                **self._extra(),
                **self._timings(answer),
            )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._ids[self._open or "text"], "output_index": len(self._items), "content_index": 0}

    def _extra(self) -> dict[str, Any]:
        return {"logprobs": []} if self._open == "text" else {}

    def _open_item(self, kind: str) -> Iterable[bytes]:
        self._open, self._written = kind, ""
        item = {**self._item(kind, "", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=len(self._items), item=item)
        yield self._event("response.content_part.added", **self._place(), part=_part(kind, ""))

    def _close_item(self, status: str) -> Iterable[bytes]:
        if self._open is None:
            return
        kind, text = self._open, self._written
        yield self._event(f"response.{_name(kind)}.done", **self._place(), text=text, **self._extra())
        yield self._event("response.content_part.done", **self._place(), part=_part(kind, text))
        item = self._item(kind, text, status)
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None

    def ended(self, answer: Answer, parts: Sequence[Part]) -> Iterable[bytes]:
        """completed, or incomplete."""
        rest = Piece(answer.index, -1, "", None, answer.timings)
        yield from self.piece(answer, rest, parts or ([] if self._items or self._open else [Part("text", "")]))
        status = _status(answer)
        yield from self._close_item(status)
        response = self._response(status, self._items, answer)
        yield self._event(f"response.{status}", response=response, **self._timings(answer))

    def _timings(self, answer: Answer) -> dict[str, Any]:
        return {"timings": answer.timings.document()} if self.form.has_timings else {}

    def finished(self) -> bytes:
        """Nothing more."""
        return b""

    def failed(self, error: ApiError) -> bytes:
        """response.failed."""
        response = self._response("failed", self._items, None)
        response["error"] = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    # ---- the whole ----

    def document(self) -> dict[str, Any]:
        """The response."""
        answer = self.answers[0]
        status = _status(answer)
        items = [self._item("thought", answer.thoughts, "completed")] if answer.thoughts else []
        if answer.text or not items:
            items.append(self._item("text", answer.text, status))
        return self._response(status, items, answer)

    def _item(self, kind: str, text: str, status: str) -> dict[str, Any]:
        common = {"id": self._ids[kind], "status": status, "content": [_part(kind, text)]}
        if kind == "thought":
            return {"type": "reasoning", "summary": [], **common}
        return {"type": "message", "role": "assistant", **common}

    def _response(self, status: str, items: list[dict[str, Any]], answer: Answer | None) -> dict[str, Any]:
        is_cut = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.form.model,
            "output": items,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": self._request.instructions or None,
            "max_output_tokens": self._request.max_output_tokens,
            "temperature": self._temperature,
            "top_p": self._top_p,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "previous_response_id": None,
            "usage": None if answer is None else _usage(answer),
        }


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": len(answer.tokens),
        "output_tokens_details": {"reasoning_tokens": answer.thought_tokens},
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
    }


def _status(answer: Answer) -> str:
    return "incomplete" if answer.stop_type == "limit" else "completed"


def _name(kind: str) -> str:
    return "reasoning_text" if kind == "thought" else "output_text"


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "thought":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
