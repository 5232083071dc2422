"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta

from fomoe_io.serve.dialect import FINGERPRINT, Answer, Delta, Dialect, Format, Prepared, Section, new_id, server_sent
from fomoe_io.serve.errors import bad_request
from fomoe_io.serve.jobs import Piece, Progress
from fomoe_io.serve.prompts import Prompt, Prompts
from fomoe_io.serve.reasoning import reasoning
from fomoe_io.serve.sampling import Probability
from fomoe_io.serve.schema import Sampled, StreamOptions, read
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.serve.tools import (
    call_reading,
    calls_of_message,
    chat_constrained,
    chat_tools,
    constrained,
    one_form,
    response_form,
    sampled_form,
)

DONE = b"data: [DONE]\n\n"

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MESSAGE_FIELDS = frozenset({"role", "content", "name", "reasoning_content"})
MORE_FIELDS = {"assistant": frozenset({"tool_calls"}), "tool": frozenset({"tool_call_id"})}
TEXT_PARTS = ("text", "input_text", "output_text")

Count = Annotated[int, Meta(ge=-1)]


class ChatRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning_format: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None


class CompletionRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/completions."""

    prompt: Prompt
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None


# ---- messages ----


def plain_text(content: Any, where: str) -> str:
    """The text of a message's content: a string, or parts of text.

    Raises
    ------
    ApiError
        Pictures and the like.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where}.content is neither text nor a list of parts", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise bad_request(f"{where}: content of type {kind!r} is not supported, only text is", param="messages")
        texts.append(part["text"])
    return "".join(texts)


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates take them.

    Raises
    ------
    ApiError
        Naming what is not supported.
    """
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        said = {name: value for name, value in message.items() if value is not None and value != []}
        role = said.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise bad_request(f"{where}: role {role!r} is not supported ({', '.join(ROLES)})", param="messages")
        unknown = sorted(said.keys() - MESSAGE_FIELDS - MORE_FIELDS.get(role, frozenset()))
        if unknown:
            raise bad_request(f"{where}.{unknown[0]} is not supported", param="messages")
        converted: dict[str, Any] = {"role": ROLES[role], "content": plain_text(said.get("content", ""), where)}
        converted |= {name: str(said[name]) for name in ("name", "reasoning_content", "tool_call_id") if name in said}
        if "tool_calls" in said:
            converted["tool_calls"] = calls_of_message(said["tool_calls"], where)
        found.append(converted)
    return found


# ---- requests ----


def chat(body: bytes, prompts: Prompts, config: ServeConfig) -> Prepared:
    """A request of /v1/chat/completions."""
    request = read(body, ChatRequest)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.reasoning_format not in (None, "none", "auto", "deepseek"):
        raise bad_request(f"reasoning_format {request.reasoning_format!r} is not supported", param="reasoning_format")
    splits = config.splits_thoughts if request.reasoning_format is None else request.reasoning_format != "none"
    tools = chat_tools(request.tools, request.tool_choice, request.parallel_tool_calls)
    calls = call_reading(prompts, tools, splits_thoughts=splits)
    thinking, names = reasoning(prompts, request.chat_template_kwargs, request.reasoning_effort, tools)
    prompt = prompts.of_chat(chat_messages(request.messages), thinking=thinking, names=names)
    form = one_form([response_form(request.response_format), sampled_form(request)])
    alternatives = (request.top_logprobs or request.n_probs or 0) if request.logprobs else request.n_probs or None
    most = next((m for m in (request.max_completion_tokens, request.max_tokens) if m is not None), request.n_predict)
    choosing = prompts.choosing(request, alternatives)
    work = prompts.work(
        [prompt.tokens],
        chat_constrained(choosing, prompts, prompt, tools, form, ignore_eos=request.ignore_eos),
        chat=prompt,
        choices=request.n,
        most=most,
        stops=request.stop,
        ignore_eos=request.ignore_eos,
        reuse=request.cache_prompt,
        is_stream=request.stream,
    )
    written = _format(prompts, request, request.stream_options)
    written = written._replace(is_thinking=prompt.is_thinking, splits_thoughts=splits, calls=calls)
    return Prepared(work, Chat(written, is_stream=request.stream))


def completions(body: bytes, prompts: Prompts, config: ServeConfig) -> Prepared:
    """A request of /v1/completions."""
    request = read(body, CompletionRequest)
    work = prompts.work(
        prompts.of_several(request.prompt),
        constrained(
            prompts.choosing(request, request.logprobs if request.logprobs is not None else request.n_probs or None),
            prompts,
            sampled_form(request),
            ignore_eos=request.ignore_eos,
        ),
        choices=request.n,
        most=request.n_predict if request.max_tokens is None else request.max_tokens,
        stops=request.stop,
        ignore_eos=request.ignore_eos,
        reuse=request.cache_prompt,
        is_stream=request.stream,
    )
    return Prepared(work, Completion(_format(prompts, request, request.stream_options), is_stream=request.stream))


def _format(prompts: Prompts, request: Sampled, options: StreamOptions | None) -> Format:
    return Format(
        prompts.name,
        prompts.tokenizer,
        has_progress=request.return_progress,
        has_timings=request.timings_per_token,
        has_usage=options is not None and options.include_usage,
        choices=request.n,
    )


# ---- answers ----


class OpenAI(Dialect):
    """What both endpoints have in common."""

    prefix, kind = "", ""

    def __init__(self, form: Format, *, is_stream: bool) -> None:
        super().__init__(form, is_stream=is_stream)
        self.id = new_id(self.prefix)

    def _envelope(self, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.form.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **others,
        }

    def _chunk(self, choice: dict[str, Any], **others: Any) -> bytes:
        return server_sent(self._envelope([choice], **others))

    def finished(self) -> bytes:
        """The usage where it was asked for, and the end."""
        if not self.form.has_usage:
            return DONE
        timings = self.answers[-1].timings.document()
        return server_sent(self._envelope([], usage=self.usage(), timings=timings)) + DONE

    def failed(self, error: Any) -> bytes:
        """An error, and the end."""
        return super().failed(error) + DONE

    def _timings(self, answer: Answer) -> dict[str, Any]:
        return {"timings": answer.timings.document()} if self.form.has_timings else {}


class Chat(OpenAI):
    """chat.completion and its chunks."""

    prefix = "chatcmpl-"

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Of the object."""
        return "chat.completion.chunk" if self.is_stream else "chat.completion"

    def started(self, answer: Answer) -> Iterable[bytes]:
        """The role."""
        yield self._delta(answer, {"role": "assistant", "content": None})

    def progress(self, answer: Answer, progress: Progress) -> Iterable[bytes]:
        """How much of the prompt is read."""
        yield self._delta(answer, {}, prompt_progress=progress_document(progress))

    def piece(self, answer: Answer, piece: Piece, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """A delta for each stretch of text; a probability goes with the first."""
        said = [_said(delta) for delta in deltas]
        logprobs = None
        if piece.probability is not None:
            logprobs = {"content": [self.probability(piece.probability)], "refusal": None}
            said = said or [{}]
        for number, delta in enumerate(said):
            yield self._delta(answer, delta, logprobs=None if number else logprobs, **self._timings(answer))

    def ended(self, answer: Answer, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """The reason."""
        for delta in deltas:
            yield self._delta(answer, _said(delta))
        choice = {"index": answer.index, "delta": {}, "logprobs": None, "finish_reason": answer.finish_reason}
        yield self._chunk(choice, timings=answer.timings.document())

    def _delta(self, answer: Answer, delta: dict[str, Any], *, logprobs: Any = None, **others: Any) -> bytes:
        choice = {"index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._chunk(choice, **others)

    def document(self) -> dict[str, Any]:
        """chat.completion."""
        timings = self.answers[-1].timings.document()
        return self._envelope([self._choice(answer) for answer in self.answers], usage=self.usage(), timings=timings)

    def _choice(self, answer: Answer) -> dict[str, Any]:
        calls = answer.calls
        message: dict[str, Any] = {"role": "assistant", "content": (answer.text or None) if calls else answer.text}
        if answer.thoughts:
            message["reasoning_content"] = answer.thoughts
        if calls:
            message["tool_calls"] = [_call(section, section.text) for section in calls]
        content = [self.probability(probability) for probability in answer.probabilities]
        return {
            "index": answer.index,
            "message": message,
            "logprobs": {"content": content, "refusal": None} if content else None,
            "finish_reason": answer.finish_reason,
        }


class Completion(OpenAI):
    """text_completion."""

    prefix, kind = "cmpl-", "text_completion"

    def __init__(self, form: Format, *, is_stream: bool) -> None:
        super().__init__(form, is_stream=is_stream)
        self._offset = 0

    def started(self, answer: Answer) -> Iterable[bytes]:
        """Offsets count from the answer's beginning."""
        self._offset = 0
        return ()

    def progress(self, answer: Answer, progress: Progress) -> Iterable[bytes]:
        """How much of the prompt is read."""
        yield self._text(answer, "", prompt_progress=progress_document(progress))

    def piece(self, answer: Answer, piece: Piece, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """Text."""
        text = "".join(delta.text for delta in deltas)
        if text or piece.probability is not None:
            found = [] if piece.probability is None else [piece.probability]
            yield self._text(answer, text, self._logprobs(found), **self._timings(answer))

    def ended(self, answer: Answer, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """The reason."""
        text = "".join(delta.text for delta in deltas)
        choice = {"index": answer.index, "text": text, "logprobs": None, "finish_reason": answer.finish_reason}
        yield self._chunk(choice, timings=answer.timings.document())

    def _text(self, answer: Answer, text: str, logprobs: Any = None, **others: Any) -> bytes:
        choice = {"index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": None}
        return self._chunk(choice, **others)

    def document(self) -> dict[str, Any]:
        """text_completion."""
        timings = self.answers[-1].timings.document()
        return self._envelope([self._choice(answer) for answer in self.answers], usage=self.usage(), timings=timings)

    def _choice(self, answer: Answer) -> dict[str, Any]:
        self._offset = 0
        return {
            "index": answer.index,
            "text": answer.text,
            "logprobs": self._logprobs(answer.probabilities),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, probabilities: Sequence[Probability]) -> dict[str, Any] | None:
        """The older form: parallel lists."""
        if not probabilities:
            return None
        texts = [self.token_text(p.token)[0] for p in probabilities]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [p.logprob for p in probabilities],
            "top_logprobs": [{self.token_text(token)[0]: logprob for token, logprob in p.top} for p in probabilities],
            "text_offset": offsets,
        }


def _said(delta: Delta) -> dict[str, Any]:
    if delta.kind == "call":
        return {"tool_calls": [{"index": delta.call, **_call(delta.section, "")}]}
    if delta.kind == "arguments":
        return {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.text}}]}
    return {"reasoning_content" if delta.kind == "thought" else "content": delta.text}


def _call(section: Section, arguments: str) -> dict[str, Any]:
    return {"id": section.id, "type": "function", "function": {"name": section.name, "arguments": arguments}}


def progress_document(progress: Progress) -> dict[str, Any]:
    """llama-server's `prompt_progress`."""
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(1e3 * progress.seconds),
    }
