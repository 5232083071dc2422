"""From what a request says to tokens, and to how the next ones are chosen."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fomoe_io.config import EngineConfig
from fomoe_io.engine import Engine
from fomoe_io.errors import FomoeError, FormatError
from fomoe_io.serve.errors import bad_request, context_exceeded
from fomoe_io.serve.jobs import Known, Run, Work
from fomoe_io.serve.replays import SampledCalls
from fomoe_io.serve.sampling import Choosing
from fomoe_io.serve.schema import Sampled
from fomoe_io.serve.settings import MOST_CHOICES, MOST_MESSAGES, MOST_REPORTED, ServeConfig
from fomoe_io.storage.metadata import Metadata
from fomoe_io.text.chat import TEMPLATE_KEY, ChatTemplate
from fomoe_io.text.generation import last_turn
from fomoe_io.text.grammar import Grammars
from fomoe_io.text.sampler import SamplingConfig
from fomoe_io.text.tool_formats import thoughts_of, tool_format

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For a model without a template, as llama-server does."""

THOUGHT_BEGIN = "<think>"

MOST_BIASES = 4096

Prompt = str | list[int | str | list[int | str]]
"""As bodies have it: text, tokens, both mixed, or several of these."""


class ChatPrompt(NamedTuple):
    """A conversation as the model reads it."""

    text: str
    tokens: list[int]
    is_thinking: bool  # the template has begun the thoughts already
    turn: int | None  # where the last message of the user begins, in tokens
    replayed: Known | None  # the same with calls as the model wrote them: another that may be known better


def calls_file(config: EngineConfig) -> Path | None:
    """Where calls are kept beyond the process: beside the sessions."""
    folder = config.sessions_folder if config.cache_disk_bytes else None
    return folder / "calls.jsonl" if folder is not None and folder.is_dir() else None


class Prompts:
    """What endpoints need to know of the loaded model.

    Raises
    ------
    FormatError
        Its chat template is damaged.

    Parameters
    ----------
    engine : Engine
    config : ServeConfig
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        if config.chosen_sampling is not None:
            own = SamplingConfig.of_model(engine.metadata, **config.chosen_sampling)
            config = replace(config, sampling=own)
        self._config = config
        self.sampling = config.sampling
        self.tokenizer = engine.tokenizer
        self.shape = engine.shape
        self.context_tokens = engine.context_tokens
        self.aliases = [name for name in (config.alias or "").split(",") if name] or [engine.model_name]
        self.name = self.aliases[0]
        self.file_name = engine.store.path.name
        self.bos_text, self.eos_text = (
            "" if token is None else self.tokenizer.token_text(token)
            for token in (self.tokenizer.bos_id, self.tokenizer.eos_id)
        )
        self.template_source = config.chat_template or Metadata(engine.metadata).text(TEMPLATE_KEY, "") or CHATML
        try:
            self._template = ChatTemplate(self.template_source, bos_text=self.bos_text, eos_text=self.eos_text)
        except FormatError as error:
            raise FormatError(error.message, hint="--chat-template chatml, or --chat-template-file FILE") from None

        self.sampled = SampledCalls(calls_file(engine.config))
        self.grammars = Grammars(self.tokenizer, self.shape.vocabulary)
        self.tool_format = tool_format(self.template_source)
        self.thoughts = thoughts_of(self.template_source)

    # ---- prompts ----

    def of_text(self, text: str, *, special: bool = True, add_bos: bool = True) -> list[int]:
        """Tokens of raw text."""
        valid = text.encode("utf-8", "replace").decode()  # JSON can carry half a surrogate pair
        return self.tokenizer.encode(valid, special=special, add_bos=add_bos and self.tokenizer.add_bos)

    def of_parts(self, prompt: str | Sequence[int | str]) -> list[int]:
        """Tokens of text, of token ids, or of both mixed."""
        if isinstance(prompt, str):
            return self.of_text(prompt)
        tokens: list[int] = []
        for part in prompt:
            if not isinstance(part, str | int):
                raise bad_request("prompt mixes tokens and lists", param="prompt")
            if isinstance(part, str):
                tokens += self.of_text(part, add_bos=not tokens)
            else:
                tokens.append(self.checked_token(part))
        return tokens

    def of_several(self, given: Prompt) -> list[list[int]]:
        """Tokens of a text, of tokens (with texts among them), or of several of these."""
        if isinstance(given, str) or any(isinstance(part, int) for part in given):
            return [self.of_parts(given)]  # type: ignore[arg-type]
        return [self.of_parts(part) for part in given]  # type: ignore[arg-type]

    def checked_token(self, token: int) -> int:
        """A token id that the model has."""
        if not 0 <= token < self.shape.vocabulary:
            raise bad_request(f"token {token} is not in 0..{self.shape.vocabulary - 1}")
        return token

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        thinking: bool | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text; `names` are known to the template besides.

        Raises
        ------
        ApiError
            The template refuses it.
        """
        if not messages:
            raise bad_request("messages is empty", param="messages")
        if len(messages) > MOST_MESSAGES:
            raise bad_request(f"{len(messages)} messages, at most {MOST_MESSAGES}", param="messages")
        if messages[-1]["role"] == "assistant":
            raise bad_request("continuing a message of the assistant is not supported", param="messages")
        try:
            return self._rendered(messages, thinking, names)
        except FomoeError as error:
            raise bad_request(error.message, param="messages") from None

    def _rendered(
        self, messages: Sequence[dict[str, Any]], thinking: bool | None, names: Mapping[str, Any] | None
    ) -> str:
        enable = self._config.thinking if thinking is None else thinking
        return self._template.render(list(messages), enable_thinking=enable, names=names)

    def of_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        thinking: bool | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """A conversation as tokens."""
        text = self.render(messages, thinking=thinking, names=names)
        tokens = self.of_text(text, add_bos=not (self.bos_text and text.startswith(self.bos_text)))
        is_thinking = text.rstrip().endswith(THOUGHT_BEGIN)

        def render(other: Sequence[dict[str, Any]]) -> str:
            return self._rendered(other, thinking, names)

        turn = last_turn(render, messages, text, tokens, self.tokenizer)
        begun = text[text.rindex(THOUGHT_BEGIN) :] if is_thinking else ""
        other = self.sampled.replayed(messages, render, begun)
        replayed = None
        if other is not None and other != text:
            found = self.of_text(other, add_bos=not (self.bos_text and other.startswith(self.bos_text)))
            place = last_turn(render, messages, other, found, self.tokenizer)
            replayed = Known(array("i", found), place) if len(found) < self.context_tokens else None
        return ChatPrompt(text, tokens, is_thinking, turn, replayed)

    # ---- work ----

    def work(
        self,
        prompts: Sequence[list[int]],
        choosing: Choosing,
        *,
        choices: int = 1,
        most: int | None = None,
        stops: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        reuse: bool = True,
        is_stream: bool = False,
        chat: ChatPrompt | None = None,
    ) -> Work:
        """What the engine is asked for; each prompt is answered `choices` times.

        Raises
        ------
        ApiError
            A prompt is empty, or fills the context; or too many probabilities are wanted at once.
        """
        if not prompts or not all(prompts):
            raise bad_request("the prompt is empty", param="prompt")
        if len(prompts) * choices > MOST_CHOICES:
            raise bad_request(f"{len(prompts) * choices} answers are wanted, at most {MOST_CHOICES}")
        for tokens in prompts:
            if len(tokens) >= self.context_tokens:
                raise context_exceeded(len(tokens), self.context_tokens)
        known = () if chat is None else (chat.turn, chat.replayed)
        compact = [array("i", tokens) for tokens in prompts]
        runs = [Run(tokens, choosing.of_choice(choice), *known) for tokens in compact for choice in range(choices)]
        wanted, limit = -1 if most is None else most, self._config.most_tokens
        most = limit if wanted < 0 else wanted if limit < 0 else min(wanted, limit)
        room = [self.context_tokens - len(run.tokens) for run in runs]
        reported = sum(n if most < 0 else min(n, most) for n in room) * (choosing.probabilities or 0)
        if reported > MOST_REPORTED and not is_stream:
            raise bad_request(f"up to {reported} probabilities in one answer: ask for fewer tokens, or for a stream")
        words = (stops,) if isinstance(stops, str) else tuple(stops or ())
        return Work(runs, most, tuple(word for word in words if word), ignore_eos, reuse)

    def choosing(self, request: Sampled, probabilities: int | None) -> Choosing:
        """How a request wants its tokens chosen; where it says nothing, as the server was told."""
        c = self._config
        return self.choosing_of(
            {
                "temperature": request.temperature,
                "top_k": None if request.top_k is None else max(request.top_k, 0),
                "top_p": request.top_p,
                "min_p": request.min_p,
                "repeat_penalty": request.repeat_penalty,
                "repeat_last": self.context_tokens if request.repeat_last_n == -1 else request.repeat_last_n,
                "seed": request.seed,
            },
            bias=self._bias(request.logit_bias),
            presence_penalty=c.presence_penalty if request.presence_penalty is None else request.presence_penalty,
            frequency_penalty=c.frequency_penalty if request.frequency_penalty is None else request.frequency_penalty,
            probabilities=probabilities,
        )

    def choosing_of(self, sampling: Mapping[str, Any], **others: Any) -> Choosing:
        """From values of :class:`SamplingConfig`, None where a request says nothing."""
        said = {name: value for name, value in sampling.items() if value is not None}
        if said.get("seed", 0) < 0:
            said["seed"] = None
        penalties = {
            "presence_penalty": self._config.presence_penalty,
            "frequency_penalty": self._config.frequency_penalty,
        }
        try:
            return Choosing(replace(self._config.sampling, **said), **{**penalties, **others})
        except FomoeError as error:
            raise bad_request(error.message) from None

    def _bias(self, wanted: Mapping[str, float] | Sequence[tuple[int | str, float | bool]] | None) -> dict[int, float]:
        """From {"15": -100} or [[15, -1], ["text", false]]: false forbids, a text means each of its tokens."""
        pairs = list(wanted.items()) if isinstance(wanted, Mapping) else list(wanted or ())
        if len(pairs) > MOST_BIASES:
            raise bad_request(f"{len(pairs)} biases, at most {MOST_BIASES}", param="logit_bias")
        found: dict[int, float] = {}
        for key, value in pairs:
            if value is True or not (value is False or math.isfinite(value)):
                raise bad_request(f"{value!r} is no bias", param="logit_bias")
            bias = -math.inf if value is False else float(value)
            is_id = isinstance(key, int) or (key.isascii() and key.lstrip("-").isdigit())
            tokens = [self.checked_token(int(key))] if is_id else self.of_text(str(key), add_bos=False)
            found.update(dict.fromkeys(tokens, bias))
        return found
