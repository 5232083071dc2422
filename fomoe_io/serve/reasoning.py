"""How a request has the model think, and what else its template is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fomoe_io.serve.errors import bad_request
from fomoe_io.serve.prompts import Prompts
from fomoe_io.serve.tools import Tools

EFFORTS = {"none": "low", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high",
           "max": "high"}  # fmt: skip
"""`reasoning_effort` -> what a template with levels is told."""

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


def reasoning(
    prompts: Prompts, arguments: Mapping[str, Any] | None, effort: str | None, tools: Tools | None = None
) -> tuple[bool | None, dict[str, Any]]:
    """`enable_thinking` of the template, and its other names.

    Parameters
    ----------
    prompts : Prompts
    arguments : mapping of str to Any or None
        `chat_template_kwargs`: names that the template uses.
    effort : str or None
        `reasoning_effort`: a level where the template knows levels, else thoughts (none: no thoughts).
    tools : Tools or None

    Raises
    ------
    ApiError
        Naming what the template does not know, or a contradiction.
    """
    names = dict(arguments or {})
    thinking = names.pop("enable_thinking", None)
    if not (thinking is None or isinstance(thinking, bool)):
        raise bad_request("chat_template_kwargs.enable_thinking is no boolean", param="chat_template_kwargs")
    for name in names:
        if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", prompts.template_source):
            raise bad_request(
                f"chat_template_kwargs: {name} is not supported, or not used by the model's template",
                param="chat_template_kwargs",
            )
    if effort is not None:
        thinking = _effort(prompts, names, thinking, effort)
    return thinking, names | ({"tools": list(tools.listed)} if tools is not None else {})


def _effort(prompts: Prompts, names: dict[str, Any], thinking: bool | None, effort: str) -> bool | None:
    """Put a level among the names, or turn thoughts on or off."""
    if effort not in EFFORTS:
        raise bad_request(f"reasoning_effort {effort!r} is not supported ({', '.join(EFFORTS)})",
            param="reasoning_effort")  # fmt: skip
    is_off = effort == "none" and "enable_thinking" in prompts.template_source
    if "reasoning_effort" in prompts.template_source and not is_off:
        if effort == "none":
            raise bad_request("reasoning_effort: this model always thinks, low is the least", param="reasoning_effort")
        names.setdefault("reasoning_effort", EFFORTS[effort])
        return thinking
    wanted = effort != "none"
    if thinking is not None and thinking != wanted:
        raise bad_request("reasoning_effort and enable_thinking contradict each other", param="reasoning_effort")
    return wanted
