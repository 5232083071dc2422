"""Documents that promise what a program says: each message is in the code, each option is one."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fomoe_io.cli.completion import COMMANDS, parser_of, verbs_of

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.M)
FILES = [
    path for folder in ("fomoe_io", "layout_tool") for path in (ROOT / folder).rglob("*.py*") if path.suffix != ".pyc"
]
# neighbouring literals are one text
SOURCE = re.sub(r'"\s*\n?\s*f?"', "", "\n".join(path.read_text() for path in FILES))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_the_codes_own(message: str) -> None:
    pieces = [piece.strip(" ,:;") for piece in message.split("…")]
    for piece in filter(None, pieces):
        assert piece in SOURCE, piece


def test_each_message_has_its_remedy() -> None:
    assert len(MESSAGES) > 20
    for message in MESSAGES:
        text = PAGE.split(f"### `{message}`\n")[1].split("\n#")[0].strip()
        assert len(text) > 20, message


@cache
def known_options() -> set[str]:
    known = {"--completion", "--man"}
    for command in COMMANDS:
        parser = parser_of(command)
        for found in (parser, *verbs_of(parser).values()):
            known.update(found._option_string_actions, getattr(found, "foreign", {}))
    return known


@pytest.mark.parametrize("page", ["run.md", "recipes.md", "troubleshooting.md"])
def test_options_that_are_told_of_exist(page: str) -> None:
    known = known_options()
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", (ROOT / "docs" / page).read_text()))
    assert told <= known, told - known


# ---- every message ----


@cache
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("messages", ROOT / "tools" / "messages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["messages"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


OTHERS_OPTIONS = {"--dim", "--overwrite"}
"""Of programs that advice names besides ours."""


def test_the_page_of_messages_has_all_of_them() -> None:
    found = tool().messages()
    assert len(found) > 300
    page = tool().page()
    for message in found:
        assert message.text.replace("|", "\\|").replace("`", "'") in page
    assert "hooks: [tools/messages.py]" in (ROOT / "mkdocs.yml").read_text()


def test_advice_names_options_that_exist() -> None:
    """What a fix tells to type is understood."""
    known = known_options() | OTHERS_OPTIONS
    for message in tool().messages():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", message.fix):
            assert option in known, (option, message)


# ---- what was promised to newcomers ----


def test_each_line_of_the_first_minutes_has_its_test() -> None:
    text = (ROOT / "docs" / "first-minutes.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line.rpartition(" | ")[2]]
    assert len(rows) > 15
    for row in rows:
        path = ""
        for reference in re.findall(r"`((?:tests/\S+\.py::)?test_\w+)`", row.split(" | ", 1)[1]):
            path, name = reference.split("::") if "::" in reference else (path, reference)
            tree = ast.parse((ROOT / path).read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, reference
