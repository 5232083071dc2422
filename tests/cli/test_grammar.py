"""fomoe-run's answers in a form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fomoe_io.cli import run
from tests.cli.test_hostile_text import with_key
from tests.tiny_model import Tiny, write_tiny

pytest.importorskip("llguidance")

SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return write_tiny(path, Tiny(architecture="qwen3moe", layers=2), 3)


@pytest.fixture
def answer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """What it prints, and says."""

    def go(*options: str, model: Path = tiny, code: int = 0) -> tuple[str, str]:
        command = [str(model), "-p", "x", "-n", "64", "-c", "256", "--no-profile", "--no-display-prompt", "-s", "1"]
        assert run.main([*command, *options]) == code
        found = capsys.readouterr()
        return found.out, found.err

    return go


def test_grammar(answer: Any, tmp_path: Path) -> None:
    assert answer("--grammar", 'root ::= "yes"')[0].strip() == "yes"
    (tmp_path / "g.gbnf").write_text("root ::= [a-c]{5}\n")
    found = answer("--grammar-file", str(tmp_path / "g.gbnf"))[0].strip()
    assert len(found) == 5 and set(found) <= set("abc")


def test_json_schema(answer: Any, tmp_path: Path) -> None:
    assert json.loads(answer("-j", SCHEMA)[0])["a"] in (1, 2)
    (tmp_path / "s.json").write_text(SCHEMA)
    assert json.loads(answer("--json-schema-file", str(tmp_path / "s.json"), "--temp", "0")[0])["a"] in (1, 2)


def test_a_conversation_starts_it_anew(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["two", "/regen", None])
    monkeypatch.setattr("fomoe_io.cli.prompt.read_line", lambda: next(lines))
    command = [str(tiny), "-p", "one", "-cnv", "-c", "256", "--no-profile", "--grammar", 'root ::= "yes"']
    assert run.main(command) == 0
    assert capsys.readouterr().out.split() == ["yes"] * 3


def test_thoughts_come_before_it(answer: Any, tiny: Path) -> None:
    """A template that begins them: the grammar waits for their end, which this model never writes."""
    template = "{{ messages[0].content }}{% if enable_thinking != false %}<think>{% else %}<think></think>{% endif %}"
    model = with_key(tiny, "tokenizer.chat_template", template)
    options = ("--grammar", 'root ::= "yes"')
    assert "yes" not in answer(*options, model=model)[0]
    assert answer(*options, "--reasoning", "off", model=model)[0].strip() == "yes"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--grammar", "root ::= ("), "the grammar is wrong: Expected"),
        (("--json-schema", "{"), "--json-schema is no JSON object"),
        (("--json-schema", "[1]"), "--json-schema is no JSON object"),
        (("--json-schema", '{"type": "thing"}'), "Invalid type: thing"),
        (("--json-schema", "{}", "--grammar", 'root ::= "a"'), "--grammar and --json-schema exclude each other"),
        (("--grammar", 'root ::= "a"', "--ignore-eos"), "--grammar and --ignore-eos exclude each other"),
        (("--grammar-file", "/nonexistent"), "/nonexistent"),
    ],
)
def test_what_is_wrong_is_said(answer: Any, options: tuple[str, ...], word: str) -> None:
    _, err = answer(*options, code=1)
    assert word in err and "Traceback" not in err


def test_without_the_package(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    _, err = answer("--grammar", 'root ::= "a"', code=1)
    assert "fix: pip install 'fomoe_io[grammar]'" in err
