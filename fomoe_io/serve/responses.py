"""/v1/responses, without a memory of earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fomoe_io.serve.dialect import Answer, Delta, Dialect, Format, Prepared, Section, new_id, server_sent
from fomoe_io.serve.errors import ApiError, bad_request
from fomoe_io.serve.jobs import Piece, Progress
from fomoe_io.serve.openai import chat_messages, progress_document
from fomoe_io.serve.prompts import Prompts
from fomoe_io.serve.reasoning import reasoning
from fomoe_io.serve.schema import Probability, StreamOptions, read
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.serve.tools import Tools, call_reading, chat_constrained, chat_tools, response_form


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
    reasoning: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    return_progress: bool = False
    timings_per_token: bool = False


def responses(body: bytes, prompts: Prompts, config: ServeConfig) -> Prepared:
    """A request."""
    request = read(body, ResponsesRequest)
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": request.instructions}]
    messages = messages if request.instructions else []
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += _messages(request.input)
    tools, form = _tools(request), response_form(_text_format(request.text), schema_key=None)
    calls = call_reading(prompts, tools, splits_thoughts=config.splits_thoughts)
    thinking, names = reasoning(prompts, request.chat_template_kwargs, _effort(request.reasoning), tools)
    prompt = prompts.of_chat(chat_messages(messages), thinking=thinking, names=names)
    choosing = prompts.choosing_of({"temperature": request.temperature, "top_p": request.top_p})
    choosing = chat_constrained(choosing, prompts, prompt, tools, form)
    work = prompts.work([prompt.tokens], choosing, most=request.max_output_tokens, chat=prompt)
    written = Format(
        prompts.name,
        prompts.tokenizer,
        is_thinking=prompt.is_thinking,
        splits_thoughts=config.splits_thoughts,
        has_progress=request.return_progress,
        has_timings=request.timings_per_token,
        calls=calls,
    )
    return Prepared(work, Responses(written, request, choosing.sampling.temperature, choosing.sampling.top_p))


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages of a chat: thoughts and calls that follow each other are one message's."""
    found: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, while nobody else has said anything
    for number, item in enumerate(items):
        message = _message(number, item)
        if message["role"] != "assistant":
            turn = None
        elif turn is None or ("content" in message and ("content" in turn or "tool_calls" in turn)):
            turn = message
        else:
            calls = [*turn.get("tool_calls", []), *message.get("tool_calls", [])]
            turn.update(message | ({"tool_calls": calls} if calls else {}))
            continue
        found.append(message)
    return found


def _message(number: int, item: Mapping[str, Any]) -> dict[str, Any]:
    kind, where = item.get("type", "message"), f"input[{number}]"
    said = {name: value for name, value in item.items() if name not in ("type", "status", "id")}
    if kind == "message":
        return {"role": None} | said
    if kind == "function_call":
        function = {"name": said.get("name"), "arguments": said.get("arguments", "")}
        call = {"id": said.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": said.get("call_id"), "content": said.get("output", "")}
    if kind == "reasoning":
        parts = said.get("content") or []
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise bad_request(f"{where}: a reasoning item has contents that are no texts", param="input")
        return {"role": "assistant", "reasoning_content": "".join(map(str, texts))}
    raise bad_request(f"{where}: items of type {kind!r} are not supported", param="input")


def _tools(request: ResponsesRequest) -> Tools | None:
    """Tools and the choice in the form of OpenAI's chat."""
    found = []
    for number, tool in enumerate(request.tools or ()):
        if tool.get("type") != "function":
            kind = tool.get("type")
            raise bad_request(
                f"tools[{number}]: tools of type {kind!r} are not supported, only functions", param="tools"
            )
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        found.append({"type": "function", "function": function})
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return chat_tools(found, choice, request.parallel_tool_calls)


def _text_format(text: Mapping[str, Any] | None) -> Any:
    """`text.format`."""
    rest = {name: value for name, value in (text or {}).items() if value is not None}
    found = rest.pop("format", None)
    if rest.pop("verbosity", "medium") != "medium" or rest:
        raise bad_request("text: only format is supported", param="text")
    return found


def _effort(wanted: Mapping[str, Any] | None) -> str | None:
    """`reasoning.effort`; a summary that is left to the server is none, as the thoughts themselves come."""
    rest = {name: value for name, value in (wanted or {}).items() if value is not None}
    effort = rest.pop("effort", None)
    if rest.pop("summary", "auto") != "auto" or rest or not (effort is None or isinstance(effort, str)):
        raise bad_request("reasoning: only effort and summary: auto are supported", param="reasoning")
    return effort


class Responses(Dialect):
    """A response, or its events: an item of thoughts if there are any, a message, and an item for each call."""

    def __init__(self, form: Format, request: ResponsesRequest, temperature: float, top_p: float) -> None:
        super().__init__(form, is_stream=request.stream)
        self.id = new_id("resp_")
        self._request = request
        self._temperature, self._top_p = temperature, top_p
        self._ids: list[str] = []
        self._open: Section | None = None
        self._items: list[dict[str, Any]] = []
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

    def piece(self, answer: Answer, piece: Piece, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """Deltas."""
        for delta in deltas:
            if self._open is not delta.section:
                yield from self._close_item("completed")
                yield from self._open_item(delta.section)
            if delta.kind != "call":
                yield self._event(
                    f"response.{NAMES[delta.section.kind]}.delta",
                    **self._place(delta.section),
                    delta=delta.text,
                    **_extra(delta.section),
                    **self._timings(answer),
                )

    def _place(self, section: Section) -> dict[str, Any]:
        place = len(self._items)
        found = {"item_id": self._id(place, section), "output_index": place}
        return found if section.kind == "call" else {**found, "content_index": 0}

    def _open_item(self, section: Section) -> Iterable[bytes]:
        self._open = section
        place = len(self._items)
        empty = Section(section.kind, name=section.name, id=section.id)
        item = self._item(place, empty, "in_progress") | ({} if section.kind == "call" else {"content": []})
        yield self._event("response.output_item.added", output_index=place, item=item)
        if section.kind != "call":
            yield self._event("response.content_part.added", **self._place(section), part=_part(empty))

    def _close_item(self, status: str) -> Iterable[bytes]:
        section, self._open = self._open, None
        if section is None:
            return
        if section.kind == "call":
            kind = "response.function_call_arguments.done"
            yield self._event(kind, **self._place(section), name=section.name, arguments=section.text)
        else:
            kind = f"response.{NAMES[section.kind]}.done"
            yield self._event(kind, **self._place(section), text=section.text, **_extra(section))
            yield self._event("response.content_part.done", **self._place(section), part=_part(section))
        item = self._item(len(self._items), section, status)
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)

    def ended(self, answer: Answer, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """completed, or incomplete."""
        if not answer.sections:
            deltas = [Delta("text", "", Section("text"), 0)]
        yield from self.piece(answer, Piece(answer.index, -1, "", None, answer.timings), deltas)
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
        sections = answer.sections or [Section("text")]
        items = [self._item(place, section, "completed") for place, section in enumerate(sections)]
        items[-1]["status"] = status
        return self._response(status, items, answer)

    def _id(self, place: int, section: Section) -> str:
        while len(self._ids) <= place:
            self._ids.append(new_id({"thought": "rs_", "text": "msg_", "call": "fc_"}[section.kind]))
        return self._ids[place]

    def _item(self, place: int, section: Section, status: str) -> dict[str, Any]:
        common = {"id": self._id(place, section), "status": status}
        if section.kind == "call":
            call = {"call_id": section.id, "name": section.name, "arguments": section.text}
            return {"type": "function_call", **common, **call}
        content = [_part(section)]
        if section.kind == "thought":
            return {"type": "reasoning", "summary": [], **common, "content": content}
        return {"type": "message", "role": "assistant", **common, "content": content}

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
            "parallel_tool_calls": self._request.parallel_tool_calls is not False,
            "tool_choice": self._request.tool_choice or "auto",
            "tools": self._request.tools or [],
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


NAMES = {"thought": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}
"""Of events."""


def _extra(section: Section) -> dict[str, Any]:
    return {"logprobs": []} if section.kind == "text" else {}


def _part(section: Section) -> dict[str, Any]:
    if section.kind == "thought":
        return {"type": "reasoning_text", "text": section.text}
    return {"type": "output_text", "text": section.text, "annotations": [], "logprobs": []}
