"""Answers in channels (gpt-oss): what a history takes of one."""

from __future__ import annotations

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
