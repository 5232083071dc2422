"""Documents that promise what a program says: each message is in the code, each option is one."""

from __future__ import annotations

import re
from pathlib import Path

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


@pytest.mark.parametrize("page", ["run.md", "recipes.md", "troubleshooting.md"])
def test_options_that_are_told_of_exist(page: str) -> None:
    known = {"--completion", "--man"}
    for command in COMMANDS:
        parser = parser_of(command)
        for found in (parser, *verbs_of(parser).values()):
            known.update(found._option_string_actions, getattr(found, "foreign", {}))
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", (ROOT / "docs" / page).read_text()))
    assert told <= known, told - known
