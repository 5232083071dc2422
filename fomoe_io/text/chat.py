"""Chat templates: the jinja2 text that a GGUF carries, run in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fomoe_io.errors import FormatError

TEMPLATE_KEY = "tokenizer.chat_template"

Message = dict[str, str]
"""{"role": "user" | "assistant" | "system", "content": text}"""


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """Unlike jinja2's own filter, leaves <, > and & alone, as the templates' authors expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """Turns messages into the text that the model was trained on.

    Parameters
    ----------
    source : str
        The template.
    bos_text, eos_text : str
        What `bos_token` and `eos_token` stand for in it.
    """

    def __init__(self, source: str, *, bos_text: str = "", eos_text: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._names = {"bos_token": bos_text, "eos_token": eos_text}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise FormatError(f"the model's chat template is damaged: {error}", hint="--raw") from None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, bos_text: str, eos_text: str) -> ChatTemplate | None:
        """The GGUF's template, None when it has none."""
        source = metadata.get(TEMPLATE_KEY)
        return cls(source, bos_text=bos_text, eos_text=eos_text) if source else None

    def render(self, messages: Sequence[Message], *, enable_thinking: bool | None = None) -> str:
        """The text up to where the assistant's next answer begins.

        Raises
        ------
        FormatError
            The template refuses these messages.
        """
        values: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True, **self._names}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        try:
            return self._template.render(values)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise FormatError(f"the chat template refuses the conversation: {error}", hint="--raw") from None
