"""llama-server's own endpoints: /completion, /tokenize, /detokenize, /apply-template, /props, /slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from fomoe_io.serve.dialect import Answer, Delta, Dialect, Format, Prepared, server_sent
from fomoe_io.serve.jobs import Piece, Progress, Work
from fomoe_io.serve.openai import chat_messages, progress_document
from fomoe_io.serve.prompts import Prompt, Prompts
from fomoe_io.serve.reasoning import reasoning
from fomoe_io.serve.schema import Sampled, read
from fomoe_io.serve.seats import Slot
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.serve.tools import chat_tools, constrained, sampled_form
from fomoe_io.text.sampler import SamplingConfig

PromptParts = str | list[int | str]


class CompletionRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """The body of /completion."""

    prompt: Prompt
    return_tokens: bool = False


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of /tokenize."""

    content: PromptParts
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    model: str = ""


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of /detokenize."""

    tokens: list[int]
    model: str = ""


class TemplateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of /apply-template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    model: str = ""


def completion(body: bytes, prompts: Prompts, config: ServeConfig) -> Prepared:
    """A request of /completion."""
    request = read(body, CompletionRequest)
    several = prompts.of_several(request.prompt)
    work = prompts.work(
        several,
        constrained(
            prompts.choosing(request, request.n_probs or None),
            prompts,
            sampled_form(request),
            ignore_eos=request.ignore_eos,
        ),
        choices=request.n,
        most=request.max_tokens if request.n_predict is None else request.n_predict,
        stops=request.stop,
        ignore_eos=request.ignore_eos,
        reuse=request.cache_prompt,
        is_stream=request.stream,
    )
    form = Format(
        prompts.name,
        prompts.tokenizer,
        has_progress=request.return_progress,
        has_timings=request.timings_per_token,
        choices=request.n,
    )
    if isinstance(request.prompt, str):
        texts = [request.prompt]
    else:
        texts = [prompts.tokenizer.decode(tokens, special=True) for tokens in several]
    return Prepared(work, LlamaCompletion(form, work, texts, request))


def settings_document(work: Work) -> dict[str, Any]:
    """`generation_settings`."""
    choosing = work.runs[0].choosing
    return {
        **sampling_document(choosing.sampling),
        "presence_penalty": choosing.presence_penalty,
        "frequency_penalty": choosing.frequency_penalty,
        "n_predict": work.most,
        "max_tokens": work.most,
        "stop": list(work.stops),
        "ignore_eos": work.ignore_eos,
        "n_probs": choosing.probabilities or 0,
    }


def sampling_document(sampling: SamplingConfig) -> dict[str, Any]:
    """A sampler's settings in llama-server's names."""
    return {
        "seed": -1 if sampling.seed is None else sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": sampling.repeat_last,
    }


class LlamaCompletion(Dialect):
    """Answers of /completion."""

    def __init__(self, form: Format, work: Work, prompts: Sequence[str], request: CompletionRequest) -> None:
        super().__init__(form, is_stream=request.stream)
        self._work = work
        self._prompts = prompts
        self._returns_tokens = request.return_tokens
        self._unsent: list[int] = []

    def progress(self, answer: Answer, progress: Progress) -> Iterable[bytes]:
        """How much of the prompt is read."""
        yield server_sent({**self._partial(answer, "", []), "prompt_progress": progress_document(progress)})

    def piece(self, answer: Answer, piece: Piece, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """A token and its text."""
        text = "".join(delta.text for delta in deltas)
        self._unsent += [piece.token] if piece.token >= 0 else []
        if not text and piece.probability is None:
            return
        chunk = self._partial(answer, text, self._take_unsent())
        if piece.probability is not None:
            chunk["completion_probabilities"] = [self.probability(piece.probability)]
        if self.form.has_timings:
            chunk["timings"] = answer.timings.document()
        yield server_sent(chunk)

    def _partial(self, answer: Answer, text: str, tokens: list[int]) -> dict[str, Any]:
        return {
            "index": answer.index,
            "content": text,
            "tokens": tokens,
            "stop": False,
            "id_slot": 0,
            "tokens_predicted": len(answer.tokens),
            "tokens_evaluated": answer.prompt_tokens,
        }

    def ended(self, answer: Answer, deltas: Sequence[Delta]) -> Iterable[bytes]:
        """The statistics."""
        text = "".join(delta.text for delta in deltas)
        yield server_sent({**self._final(answer), "content": text, "tokens": self._take_unsent()})

    def _take_unsent(self) -> list[int]:
        """Tokens since the last chunk: those that are part of a character, or of what may be a stop word, wait."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def finished(self) -> bytes:
        """Nothing more: the last chunk says so."""
        return b""

    def document(self) -> Any:
        """One object, or a list of them when several answers were asked for."""
        documents = [self._whole(answer) for answer in self.answers]
        return documents[0] if len(documents) == 1 else documents

    def _whole(self, answer: Answer) -> dict[str, Any]:
        found = self._final(answer)
        if answer.probabilities:
            found["completion_probabilities"] = [self.probability(p) for p in answer.probabilities]
        return found

    def _final(self, answer: Answer) -> dict[str, Any]:
        return {
            "index": answer.index,
            "content": answer.text,
            "tokens": answer.tokens if self._returns_tokens else [],
            "id_slot": 0,
            "stop": True,
            "model": self.form.model,
            "tokens_predicted": len(answer.tokens),
            "tokens_evaluated": answer.prompt_tokens,
            "generation_settings": settings_document(self._work),
            "prompt": self._prompts[answer.index // self.form.choices],
            "has_new_line": "\n" in answer.text,
            "truncated": False,
            "stop_type": answer.stop_type,
            "stopping_word": answer.stop_text,
            "tokens_cached": answer.cached_tokens,
            "timings": answer.timings.document(),
        }


# ---- what needs no engine ----


def tokenize(body: bytes, prompts: Prompts) -> dict[str, Any]:
    """/tokenize."""
    request = read(body, TokenizeRequest)
    if isinstance(request.content, str):
        tokens = prompts.of_text(request.content, special=request.parse_special, add_bos=request.add_special)
    else:
        tokens = prompts.of_parts(request.content)
    if not request.with_pieces:
        return {"tokens": tokens}
    return {"tokens": [{"id": token, "piece": _text_or_bytes(prompts, token)} for token in tokens]}


def _text_or_bytes(prompts: Prompts, token: int) -> str | list[int]:
    raw = prompts.tokenizer.decode_bytes(token, special=True)
    try:
        return raw.decode()
    except UnicodeDecodeError:  # part of a character
        return list(raw)


def detokenize(body: bytes, prompts: Prompts) -> dict[str, Any]:
    """/detokenize."""
    tokens = [prompts.checked_token(token) for token in read(body, DetokenizeRequest).tokens]
    return {"content": prompts.tokenizer.decode(tokens, special=True)}


def apply_template(body: bytes, prompts: Prompts) -> dict[str, Any]:
    """/apply-template."""
    request = read(body, TemplateRequest)
    tools = chat_tools(request.tools, None, None)
    thinking, names = reasoning(prompts, request.chat_template_kwargs, request.reasoning_effort, tools)
    return {"prompt": prompts.render(chat_messages(request.messages), thinking=thinking, names=names)}


def props(prompts: Prompts, config: ServeConfig) -> dict[str, Any]:
    """/props."""
    return {
        "default_generation_settings": {
            "params": {
                **sampling_document(prompts.sampling),
                "presence_penalty": config.presence_penalty,
                "frequency_penalty": config.frequency_penalty,
                "n_predict": config.most_tokens,
            },
            "n_ctx": prompts.context_tokens,
        },
        "total_slots": config.parallel,
        "model_alias": prompts.name,
        "model_path": prompts.file_name,
        "chat_template": prompts.template_source,
        "bos_token": prompts.bos_text,
        "eos_token": prompts.eos_text,
        "modalities": {"vision": False, "audio": False},
        "build_info": f"fomoe_io {config.version}",
    }


def models(prompts: Prompts, created: int) -> dict[str, Any]:
    """/v1/models."""
    shape = prompts.shape
    meta = {
        "vocab_type": 2,
        "n_vocab": shape.vocabulary,
        "n_ctx": prompts.context_tokens,
        "n_ctx_train": shape.context_tokens,
        "n_embd": shape.columns,
    }
    card = {
        "id": prompts.name,
        "aliases": prompts.aliases,
        "object": "model",
        "created": created,
        "owned_by": "fomoe_io",
        "meta": meta,
    }
    return {"object": "list", "data": [card]}


def slots(found: Sequence[Slot], context_tokens: int, waiting: int) -> list[dict[str, Any]]:
    """/slots: what each is doing."""
    return [
        {
            "id": number,
            "id_task": slot.job_number,
            "n_ctx": context_tokens,
            "is_processing": slot.is_processing,
            "n_prompt_tokens": slot.prompt_tokens,
            "n_prompt_tokens_cache": slot.cached_tokens,
            "n_prompt_tokens_processed": slot.processed_tokens,
            "n_decoded": slot.generated_tokens,
            "n_waiting": waiting,
            "timings": None if slot.timings is None else slot.timings.document(),
        }
        for number, slot in enumerate(found)
    ]
