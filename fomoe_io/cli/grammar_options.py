"""--grammar and --json-schema: answers that keep to a form."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fomoe_io.cli.chat import Chat
from fomoe_io.cli.common import decoded
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.text.grammar import Constraint, Form, Grammars, check_package, grammar_form, json_form
from fomoe_io.text.tool_formats import thoughts_of, with_thoughts

NAMES = {
    "grammar": "--grammar",
    "grammar_file": "--grammar-file",
    "json_schema": "--json-schema",
    "json_schema_file": "--json-schema-file",
}


def add_grammar_options(group: Any) -> None:
    """The four of llama-cli."""
    group.add_argument("--grammar", metavar="GBNF", help="hold answers to a grammar in llama.cpp's GBNF")
    group.add_argument("--grammar-file", type=Path, metavar="FILE", help="the same, from a file")
    group.add_argument("-j", "--json-schema", metavar="JSON", help="hold answers to a JSON schema; {} is any JSON")
    group.add_argument("-jf", "--json-schema-file", type=Path, metavar="FILE", help="the same, from a file")


def answer_form(options: argparse.Namespace) -> Form | None:
    """What answers are held to.

    Raises
    ------
    UsageError, OSError
        Two are given, one is wrong, or the package for it is missing.
    """
    given = [name for name in NAMES if getattr(options, name) is not None]
    if not given:
        return None
    if len(given) > 1 or options.ignore_eos:
        names = [NAMES[name] for name in given] + ["--ignore-eos"] * options.ignore_eos
        raise UsageError(f"{' and '.join(names)} exclude each other")
    value = getattr(options, given[0])
    text = decoded(value.read_bytes()) if isinstance(value, Path) else value
    check_package()
    return grammar_form(text) if given[0].startswith("grammar") else json_form(_schema(text, NAMES[given[0]]))


def _schema(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UsageError(f"{name} is no JSON object", hint="""--json-schema '{"type": "object"}'""") from None
    return found


class AnswerGrammar:
    """Starts a grammar for each answer of a run; thoughts come before it, and are free.

    Parameters
    ----------
    engine : Engine
    form : Form or None

    Raises
    ------
    UsageError
        The form can't be followed.
    """

    def __init__(self, engine: Engine, form: Form | None) -> None:
        self._form = form
        self._grammars = Grammars(engine.tokenizer, engine.shape.vocabulary)
        if form is not None:
            self._grammars.compiled(form)

    def start(self, chat: Chat) -> Constraint | None:
        """For an answer to what the chat has asked."""
        if self._form is None:
            return None
        thoughts = None if chat.template is None else thoughts_of(chat.template.source)
        form = with_thoughts(self._form, thoughts, chat.asked, has_begun=chat.is_thinking)
        return self._grammars.compiled(form).start()
