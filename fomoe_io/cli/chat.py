"""A conversation: its history as the model's template writes it, or raw text, and what the next prompt's tokens are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.serve.thoughts import BEGIN
from fomoe_io.stats import write_json
from fomoe_io.text.channels import said
from fomoe_io.text.chat import ChatTemplate, Message
from fomoe_io.text.generation import last_turn

_MARK = "fomoe-answer-0d1f"
"""Stands for an answer in a rendered history, to find what the template writes after it."""


@dataclass(slots=True)
class Answer:
    """What was generated so far."""

    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    stop_reason: str = "interrupted"

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


def message(role: str, text: str) -> Message:
    """One of a history."""
    return {"role": role, "content": text}


class Chat:
    """Text in, tokens out.

    Parameters
    ----------
    engine : Engine
    raw : bool
        No template: the history is one text.
    system : str or None
    template : str or None
        Instead of the model's.
    thinking : bool or None
        What the template is told of `enable_thinking`.
    names : mapping
        Given to the template besides (`--chat-template-kwargs`).
    keeps_thoughts : bool
        Continue with the answers as they were generated, also where the template would leave out their thoughts.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        raw: bool = False,
        system: str | None = None,
        template: str | None = None,
        thinking: bool | None = None,
        names: Mapping[str, Any] | None = None,
        keeps_thoughts: bool = False,
    ) -> None:
        tokenizer = engine.tokenizer
        self._tokenizer = tokenizer
        self._system = system
        self.thinking = thinking
        self._names = dict(names or {})
        self._keeps_thoughts = keeps_thoughts
        self.template = None if raw else _template(engine, template)
        if self.template is None and system is not None:
            raise UsageError("a system message needs a chat template, and this run has none", hint="leave out --system")
        self.reset()

    def reset(self) -> None:
        """Start the conversation afresh."""
        self.messages: list[Message] = [message("system", self._system)] if self._system else []
        self._tokens: list[int] = []
        self._text = self._asked = ""
        self._last: tuple[str, list[int]] | None = None
        self.is_thinking = False
        self.turn: int | None = None  # where the last question begins in its tokens

    @property
    def asked(self) -> str:
        """The text up to where the next answer begins; none without a template."""
        return self._asked

    @property
    def turns(self) -> int:
        """Questions answered."""
        return sum(m["role"] == "assistant" for m in self.messages)

    def ask(self, text: str) -> list[int]:
        """All tokens of the conversation with this question at its end, which :meth:`answered` makes part of it."""
        tokenizer = self._tokenizer
        if self.template is None:
            self.turn = len(self._tokens)
            return [*self._tokens, *tokenizer.encode(text, add_bos=tokenizer.add_bos and not self._tokens)]
        messages = [*self.messages, message("user", text)]
        self._asked = self._render(messages)
        self.is_thinking = self._asked.rstrip().endswith(BEGIN)
        tokens = self._tokens_of(text)
        self.turn = last_turn(self._render, messages, self._asked, tokens, tokenizer)
        return tokens

    def _tokens_of(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        if self._text and self._asked.startswith(self._text):  # the same text: keep its tokens as they were generated
            return [*self._tokens, *tokenizer.encode(self._asked[len(self._text) :], special=True)]
        if self._text and self._keeps_thoughts:
            tail = self._after_answer(text)
            if tail is not None:
                self._asked = self._text + tail
                return [*self._tokens, *tokenizer.encode(tail, special=True)]
        return tokenizer.encode(self._asked, special=True)

    def answered(self, question: str, tokens: list[int], answer: Answer) -> None:
        """Remember a question, the tokens that :meth:`ask` gave for it, and the answer."""
        self._last = (question, self._tokens)
        self._tokens = [*tokens, *answer.ids]
        self.messages += [message("user", question), message("assistant", said(answer.text))]
        is_whole = answer.stop_reason != "word"  # a stop string's tokens were read, and are no part of the text
        self._text = self._asked + answer.text if is_whole else ""

    def take_back(self) -> str | None:
        """Forget the last answer and its question, which is returned; None when there is none."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self._text = ""
        self._tokens, self._last = self._last[1] if self._last else [], None
        return question

    def _render(self, messages: list[Message]) -> str:
        assert self.template is not None
        return self.template.render(messages, enable_thinking=self.thinking, names=self._names)

    def _after_answer(self, question: str) -> str | None:
        """What the template writes between the last answer and the next one; None where that can't be told."""
        history = [*self.messages[:-1], message("assistant", _MARK), message("user", question)]
        _, found, tail = self._render(history).partition(_MARK)
        return tail if found and _MARK not in tail else None

    # ---- files ----

    def save(self, path: Path) -> None:
        """Write the conversation.

        Raises
        ------
        UsageError
            It is one text without messages.
        OSError
        """
        if self.template is None:
            raise UsageError("a conversation without a chat template has no messages to save")
        write_json(path, {"messages": self.messages})

    def load(self, path: Path) -> None:
        """Go on with a conversation that was saved.

        Raises
        ------
        UsageError
            The file holds none.
        OSError
        """
        if self.template is None:
            raise UsageError("a conversation without a chat template has no messages to load")
        try:
            found = json.loads(path.read_bytes())
            messages = found["messages"] if isinstance(found, dict) else found  # or the list alone, as APIs take it
            loaded = [message(str(m["role"]), m["content"]) for m in messages]
            if not loaded or not all(isinstance(m["content"], str) for m in loaded):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{path} is no conversation", hint="a file of /save") from None
        self.reset()
        self.messages = loaded


def _template(engine: Engine, source: str | None) -> ChatTemplate | None:
    tokenizer = engine.tokenizer
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    texts = {
        "bos_text": "" if bos is None else tokenizer.token_text(bos),
        "eos_text": "" if eos is None else tokenizer.token_text(eos),
    }
    return ChatTemplate(source, **texts) if source else ChatTemplate.from_metadata(engine.metadata, **texts)
