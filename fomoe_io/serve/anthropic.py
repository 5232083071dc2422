"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fomoe_io.serve.dialect import Answer, Delta, Dialect, Format, Prepared, Section, new_id, server_sent
from fomoe_io.serve.errors import ApiError, bad_request
from fomoe_io.serve.jobs import Piece
from fomoe_io.serve.prompts import ChatPrompt, Prompts
from fomoe_io.serve.reasoning import reasoning
from fomoe_io.serve.schema import Probability, read
from fomoe_io.serve.settings import MOST_STOPS, ServeConfig
from fomoe_io.serve.tools import Tools, call_reading, chat_call, chat_constrained, chat_tools, response_form

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
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


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
    tools = _tools(request)
    calls = call_reading(prompts, tools, splits_thoughts=config.splits_thoughts)
    prompt = _prompt(request, prompts, tools)
    choosing = prompts.choosing_of({"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p})
    form = response_form((request.output_config or {}).get("format"))
    choosing = chat_constrained(choosing, prompts, prompt, tools, form)
    work = prompts.work([prompt.tokens], choosing, most=request.max_tokens, stops=request.stop_sequences, chat=prompt)
    written = Format(
        prompts.name,
        prompts.tokenizer,
        is_thinking=prompt.is_thinking,
        splits_thoughts=config.splits_thoughts,
        calls=calls,
    )
    return Prepared(work, Messages(written, is_stream=request.stream))


def count_tokens(body: bytes, prompts: Prompts) -> dict[str, Any]:
    """/v1/messages/count_tokens."""
    request = read(body, CountRequest)
    tools = _tools(request)
    call_reading(prompts, tools, splits_thoughts=True)
    return {"input_tokens": len(_prompt(request, prompts, tools).tokens)}


# ---- requests ----

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _tools(request: CountRequest) -> Tools | None:
    """Tools in the form of OpenAI's chat, which templates take."""
    found = []
    for number, tool in enumerate(request.tools or ()):
        kind = tool.get("type") or "custom"
        if kind != "custom":
            raise bad_request(f"tools[{number}]: tools of type {kind!r} are not supported, only custom ones are")
        unknown = sorted(tool.keys() - {"type", "name", "description", "input_schema", "cache_control", "strict"})
        if unknown:
            raise bad_request(f"tools[{number}].{unknown[0]} is not supported")
        function = {"name": tool.get("name"), "description": tool.get("description") or ""}
        function |= {"parameters": tool.get("input_schema")} | ({"strict": True} if tool.get("strict") else {})
        found.append({"type": "function", "function": function})
    wanted = request.tool_choice or {"type": "auto"}
    kind, parallel = wanted.get("type"), not wanted.get("disable_parallel_tool_use")
    unknown = sorted(wanted.keys() - {"type", "name", "disable_parallel_tool_use"})
    if unknown or not isinstance(kind, str) or kind not in (*CHOICES, "tool"):
        raise bad_request(f"tool_choice: {unknown[0] if unknown else kind!r} is not supported")
    named = {"type": "function", "function": {"name": wanted.get("name")}}
    return chat_tools(found, CHOICES.get(kind, named), parallel)


def _prompt(request: CountRequest, prompts: Prompts, tools: Tools | None) -> ChatPrompt:
    system = BILLING_LINE.sub("", _blocks(request.system, "system", ("text",))["text"])
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for number, message in enumerate(request.messages):
        found += _converted(message, f"messages[{number}]")
    options = request.output_config or {}
    unknown = sorted(options.keys() - {"format", "effort"})
    if unknown:
        raise bad_request(f"output_config.{unknown[0]} is not supported")
    effort = options.get("effort")
    if not (effort is None or isinstance(effort, str)):
        raise bad_request("output_config.effort is no text")
    thinking, names = reasoning(prompts, _thinking(request.thinking), effort, tools)
    return prompts.of_chat(found, thinking=thinking, names=names)


KINDS_OF = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


def _converted(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A message in the form of OpenAI's chat: results of tools are messages of their own, before what is said."""
    role = message.get("role")
    if not isinstance(role, str) or role not in KINDS_OF:
        raise bad_request(f"{where}: role {role!r} is not supported (user, assistant)")
    unknown = sorted(message.keys() - {"role", "content"})
    if unknown:
        raise bad_request(f"{where}.{unknown[0]} is not supported")
    blocks = _blocks(message.get("content"), where, KINDS_OF[role])
    found: dict[str, Any] = {"role": role, "content": blocks["text"]}
    if blocks["thinking"]:
        found["reasoning_content"] = blocks["thinking"]
    if blocks["tool_use"]:
        found["tool_calls"] = blocks["tool_use"]
    is_said = role == "assistant" or blocks["text"] or not blocks["tool_result"]
    return [*blocks["tool_result"], *([found] if is_said else [])]


def _blocks(content: Any, where: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Of a string, or of blocks: texts and thoughts joined, calls and results in OpenAI's form."""
    found: dict[str, Any] = {"text": "", "thinking": "", "tool_use": [], "tool_result": []}
    if isinstance(content, str):
        return found | {"text": content}
    if not isinstance(content, list):
        raise bad_request(f"{where}: content is neither text nor a list of blocks")
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in kinds:
            raise bad_request(f"{where}: content of type {kind!r} is not supported, only {', '.join(kinds)}")
        if kind in ("text", "thinking") and isinstance(block.get(kind), str):
            found[kind] += block[kind]
        elif kind == "tool_use" and isinstance(block.get("name"), str) and isinstance(block.get("input"), dict):
            found[kind].append(chat_call(str(block.get("id", "")), block["name"], block["input"]))
        elif kind == "tool_result" and isinstance(block.get("tool_use_id"), str):
            text = _blocks(block.get("content") or "", f"{where}: tool_result", ("text",))["text"]
            found[kind].append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
        else:
            raise bad_request(f"{where}: a block of type {kind!r} lacks what belongs to it")
    return found


def _thinking(wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    """`thinking`, which is on or off: its budget only bounds what the answer's own bound bounds as well."""
    if wanted is None:
        return {}
    kind = wanted.get("type")
    unknown = sorted(wanted.keys() - {"type", "budget_tokens", "display"})
    if unknown:
        raise bad_request(f"thinking.{unknown[0]} is not supported")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise bad_request(f"thinking of type {kind!r} is not supported")
    return {"enable_thinking": str(kind) != "disabled"}


class Messages(Dialect):
    """A message, or its events."""

    def __init__(self, form: Format, *, is_stream: bool) -> None:
        super().__init__(form, is_stream=is_stream)
        self.id = new_id("msg_")
        self._blocks = 0
        self._open: Section | None = None

    def started(self, answer: Answer) -> Iterable[bytes]:
        """message_start."""
        message = {**self._message(answer, [], None, None), "usage": self._usage(answer, 0)}
        yield _event("message_start", message=message)
        yield _event("ping")

    def piece(self, answer: Answer, piece: Piece, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """Deltas, in a block for thoughts, one for text, and one for each call."""
        for delta in deltas:
            if self._open is not delta.section:
                yield from self._close_block()
                self._open = delta.section
                block = _block(Section(delta.section.kind, name=delta.section.name, id=delta.section.id))
                yield _event("content_block_start", index=self._blocks, content_block=block)
            if delta.kind != "call":
                yield _event("content_block_delta", index=self._blocks, delta=_delta(delta))

    def _close_block(self) -> Iterable[bytes]:
        if self._open is None:
            return
        if self._open.kind == "thought":
            yield _event("content_block_delta", index=self._blocks, delta={"type": "signature_delta", "signature": ""})
        yield _event("content_block_stop", index=self._blocks)
        self._blocks += 1
        self._open = None

    def ended(self, answer: Answer, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """message_delta and message_stop."""
        if not answer.sections:  # nothing is said in so many words
            deltas = [Delta("text", "", Section("text"), 0)]
        yield from self.piece(answer, Piece(answer.index, -1, "", None, answer.timings), deltas)
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
        content = [_block(section) for section in answer.sections or [Section("text")]]
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


def _block(section: Section) -> dict[str, Any]:
    if section.kind == "thought":
        return {"type": "thinking", "thinking": section.text, "signature": ""}
    if section.kind == "text":
        return {"type": "text", "text": section.text}
    if section.arguments is None:  # cut short: what can't be run is only shown
        return {"type": "text", "text": f"{section.name}({section.text}"}
    return {"type": "tool_use", "id": section.id, "name": section.name, "input": section.arguments}


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.kind == "thought":
        return {"type": "thinking_delta", "thinking": delta.text}
    if delta.kind == "arguments":
        return {"type": "input_json_delta", "partial_json": delta.text}
    return {"type": "text_delta", "text": delta.text}


def _stop_reason(answer: Answer) -> tuple[str, str | None]:
    if answer.stop_type == "word":
        return "stop_sequence", answer.stop_text
    return {"length": "max_tokens", "tool_calls": "tool_use"}.get(answer.finish_reason, "end_turn"), None
