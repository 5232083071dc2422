"""A model in three lines: prompts and conversations in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fomoe_io.config import EngineConfig
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.text.chat import ChatTemplate, Message
from fomoe_io.text.generation import Conversation, StopReason, last_turn
from fomoe_io.text.sampler import Sampler, SamplingConfig


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer; `str()` of it is its text.

    Attributes
    ----------
    text : str
    token_ids : list of int
    stop_reason : {"eos", "word", "limit", "context"}
        The model ended it, a stop string came, `max_tokens` were reached, the context is full.
    prompt_tokens : int
        Of the prompt, as the model reads it.
    seed : int
        That repeats it.
    """

    text: str
    token_ids: list[int]
    stop_reason: StopReason
    prompt_tokens: int
    seed: int

    def __str__(self) -> str:
        return self.text


class LLM:
    """A model that is opened once, and answers.

    Parameters
    ----------
    path : str or Path
        A store, or a GGUF file.
    ram, vram : str or int, optional
        Bounds of memory, such as "16G".
    context : int, optional
        Tokens of a prompt and its answer.
    device : str
        As of :class:`EngineConfig`, but "auto": a GPU where there is one.
    sampling : SamplingConfig, optional
        Where a call says nothing; by default what the model asks for, else llama.cpp's.
    **config
        Any other field of :class:`EngineConfig`.

    Raises
    ------
    FomoeError
        FormatError or StoreError for a bad model, BudgetError when `ram` is too small, UsageError for what does not
        go together.

    Examples
    --------
    >>> from fomoe_io import LLM, SamplingConfig
    >>> with LLM("models/fomoe-demo-32x8.Q4_K_M.gguf", ram="256M", context=256) as llm:
    ...     answer = llm.generate("It was a dark and", SamplingConfig(temperature=0), max_tokens=4)
    >>> answer.stop_reason, len(answer.token_ids)
    ('limit', 4)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        ram: str | int | None = None,
        vram: str | int | None = None,
        context: int | None = None,
        device: str = "auto",
        sampling: SamplingConfig | None = None,
        **config: Any,
    ) -> None:
        known = {field.name for field in fields(EngineConfig)}
        for name in config:
            if name not in known:
                raise UsageError(f"LLM has no option {name!r}; others than its own are those of EngineConfig")
        given: dict[str, Any] = {
            "cache_bytes": None, **config,
            "ram_bytes": ram, "vram_bytes": vram, "context_tokens": context, "device": device,
        }  # fmt: skip
        self.engine = Engine.open(path, EngineConfig(**given))
        try:
            self.sampling = sampling or SamplingConfig.of_model(self.engine.metadata)
            self._conversation = Conversation(self.engine.timeline(_warn))
        except BaseException:
            self.engine.close()
            raise
        self._template: ChatTemplate | None = None

    def generate(
        self,
        prompt: str,
        sampling: SamplingConfig | None = None,
        *,
        max_tokens: int = -1,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """Continue a text.

        Parameters
        ----------
        prompt : str
        sampling : SamplingConfig, optional
        max_tokens : int
            -1: until the model ends it, or the context is full.
        stop : str or sequence of str
            End before any of these.

        Raises
        ------
        UsageError
            The prompt is empty or too long, or the engine busy.
        ReadError, ComputeError
        """
        return self._complete(self._tokens(prompt), sampling, max_tokens, stop)

    def chat(
        self,
        messages: str | Sequence[Message],
        sampling: SamplingConfig | None = None,
        *,
        max_tokens: int = -1,
        stop: str | Sequence[str] = (),
        thinking: bool | None = None,
    ) -> Completion:
        """Answer a conversation, as the model's chat template writes it; a text is one question.

        What an earlier call has read is not read again where this conversation continues it.

        Parameters
        ----------
        messages : str or sequence of dict
            {"role": "user" | "assistant" | "system", "content": text}
        thinking : bool, optional
            What the template is told of `enable_thinking`.
        sampling, max_tokens, stop
            As of :meth:`generate`.

        Raises
        ------
        UsageError
            The model has no chat template, too.
        FormatError
            Its template refuses the conversation.
        """
        return self._complete(self._chat_tokens(messages, thinking), sampling, max_tokens, stop)

    def stream(
        self,
        prompt: str | Sequence[Message],
        sampling: SamplingConfig | None = None,
        *,
        max_tokens: int = -1,
        stop: str | Sequence[str] = (),
        thinking: bool | None = None,
    ) -> Iterator[str]:
        """The pieces of an answer as they come: to a text as :meth:`generate`, to messages as :meth:`chat`."""
        tokens, turn = self._tokens(prompt) if isinstance(prompt, str) else self._chat_tokens(prompt, thinking)
        for _, text in self._generate(tokens, turn, Sampler(sampling or self.sampling), max_tokens, stop):
            if text:
                yield text

    def _tokens(self, prompt: str) -> tuple[list[int], None]:
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt is {type(prompt).__name__}, expected a text", hint="chat() takes messages")
        tokenizer = self.engine.tokenizer
        return self._checked(tokenizer.encode(prompt, add_bos=tokenizer.add_bos)), None

    def _chat_tokens(self, messages: str | Sequence[Message], thinking: bool | None) -> tuple[list[int], int | None]:
        """Of a conversation, and where its last question begins."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages or not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise UsageError('messages are dicts with a "role" and a "content", which are texts')
        template, tokenizer = self._chat_template(), self.engine.tokenizer

        def render(messages: Sequence[Message]) -> str:
            return template.render(messages, enable_thinking=thinking)

        text = render(messages)
        tokens = self._checked(tokenizer.encode(text, special=True))
        return tokens, last_turn(render, messages, text, tokens, tokenizer)

    def _chat_template(self) -> ChatTemplate:
        tokenizer = self.engine.tokenizer
        if self._template is None:
            bos, eos = tokenizer.bos_id, tokenizer.eos_id
            self._template = ChatTemplate.from_metadata(
                self.engine.metadata,
                bos_text="" if bos is None else tokenizer.token_text(bos),
                eos_text="" if eos is None else tokenizer.token_text(eos),
            )
        if self._template is None:
            raise UsageError("the model has no chat template", hint="generate(text)")
        return self._template

    def _checked(self, tokens: list[int]) -> list[int]:
        context = self.engine.context_tokens
        if not tokens:
            raise UsageError("the prompt is empty")
        if len(tokens) >= context:
            raise UsageError(f"the prompt's {len(tokens)} tokens leave no room in the context of {context}",
                hint=f"LLM(..., context={len(tokens) + 256})")  # fmt: skip
        return tokens

    def _generate(
        self, tokens: list[int], turn: int | None, sampler: Sampler, max_tokens: int, stop: str | Sequence[str]
    ) -> Iterator[tuple[int, str]]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return self._conversation.generate(tokens, sampler, most=max_tokens, stops=stops, turn=turn)

    def _complete(
        self,
        prompt: tuple[list[int], int | None],
        sampling: SamplingConfig | None,
        max_tokens: int,
        stop: str | Sequence[str],
    ) -> Completion:
        tokens, turn = prompt
        sampler = Sampler(sampling or self.sampling)
        pairs = list(self._generate(tokens, turn, sampler, max_tokens, stop))
        return Completion(
            "".join(text for _, text in pairs),
            [token for token, _ in pairs if token >= 0],
            self._conversation.stop_reason,
            len(tokens),
            sampler.seed,
        )

    def close(self) -> None:
        """Give the memory back.  Idempotent."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
