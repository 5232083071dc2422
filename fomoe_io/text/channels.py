"""Answers in channels (gpt-oss): what a history takes of one, and what its template calls a thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fomoe_io.text.tool_parser import HarmonyParser

BEGIN = "<|channel|>"


def said(answer: str) -> str:
    """An answer without its channels' names and thoughts; the answer itself where it has no channels.

    The template of gpt-oss refuses a history whose contents have channels.
    """
    if BEGIN not in answer:
        return answer
    parser = HarmonyParser()
    return "".join(part.text for part in [*parser.add(answer), *parser.finish()] if part.kind == "text")


def with_thinking(source: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Thoughts before a call by the name that gpt-oss' template (its `source`) has for them, and in place of a content.

    It takes a call's content for the thought, and one of both alone; thoughts before an answer it leaves out.
    """
    renamed = [dict(message) for message in messages]
    for message in renamed if "message.thinking" in source else []:
        if message.get("tool_calls") and message.get("reasoning_content"):
            message["thinking"] = message["reasoning_content"]
            message["content"] = ""
    return renamed
