"""fomoe-run does not read again what it has read: thoughts that are dropped, other answers, files, runs before."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fomoe_io import LLM, SamplingConfig
from fomoe_io.cli import run
from tests.cli.test_hostile_text import with_key
from tests.cli.test_talk import TEMPLATE, Terminal
from tests.tiny_model import Tiny, write_tiny

LONG = "What do you think of " + "a rather long question " * 12
NEAR_END_TOKENS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recurrent, a token a byte, and a template that drops thoughts."""
    tiny = write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", Tiny(), 3)
    return with_key(tiny, "tokenizer.chat_template", TEMPLATE)


Talk = Callable[..., tuple[int, str]]


@pytest.fixture
def talk(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Lines in; (prompt tokens that were read, stderr) back."""

    def go(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        left, statistics = iter([*lines, None]), tmp_path / "s.json"
        monkeypatch.setattr("fomoe_io.cli.prompt.read_line", lambda: next(left))
        monkeypatch.setattr(sys, "stdin", Terminal())
        command = [str(model), "-n", "20", "-c", "2048", "--temp", "0", "--ignore-eos", "--no-profile", *options]
        assert run.main([*command, "--json", str(statistics)]) == 0
        return int(json.loads(statistics.read_text())["prompt_tokens"]), capsys.readouterr().err

    return go


def test_another_answer_reads_nothing_again(talk: Talk) -> None:
    once, _ = talk(LONG)
    thrice, _ = talk(LONG, "/regen", "/regen")
    assert thrice - once == 2 * NEAR_END_TOKENS


def test_a_conversation_that_was_forgotten_and_loaded(talk: Talk, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    without, _ = talk(LONG, "and?")
    found, err = talk(LONG, f"/save {saved}", "/reset", "Quite another question", f"/load {saved}", "and?")
    other, _ = talk("Quite another question")
    assert found - other <= without + 100 and "reading all" not in err  # an answer of U+FFFD is read again


def test_a_run_goes_on_where_another_ended(talk: Talk, tmp_path: Path) -> None:
    disk = ("--cache-disk", "50M", "--cache-dir", str(tmp_path / "kept"))
    saved = tmp_path / "saved.json"
    talk(LONG, f"/save {saved}", options=disk)
    found, _ = talk(f"/load {saved}", "and?", options=disk)
    assert found <= 64 + 20 + len("\nuser: and?\nassistant: ")
    again, _ = talk(LONG, options=("--cache-ram", "0"))
    assert again > 270


def test_an_older_answer_with_thoughts_is_read_from_the_question_on(model: Path) -> None:
    """The second prompt has the first answer without its thoughts: it is another from the answer on."""
    with LLM(model, context=2048, device="cpu") as llm:
        greedy = SamplingConfig(temperature=0)
        messages = [{"role": "user", "content": LONG}]
        first = llm.chat(messages, greedy, max_tokens=40)
        before = llm.engine.statistics()["prompt_tokens"]
        messages += [
            {"role": "assistant", "content": "x" * 300 + "</think>No."},
            {"role": "user", "content": "Why?"},
        ]
        second = llm.chat(messages, greedy, max_tokens=4)
        read = llm.engine.statistics()["prompt_tokens"] - before
        assert read == second.prompt_tokens - first.prompt_tokens + NEAR_END_TOKENS
    with LLM(model, context=2048, device="cpu", cache_bytes=0) as llm:
        assert llm.chat(messages, greedy, max_tokens=4).token_ids == second.token_ids


def test_what_is_wrong_with_the_folder_is_one_note(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, err = talk(LONG, "/regen", options=("--cache-disk", "50M", "--cache-dir", str(tmp_path / "file")))
    assert err.count("sessions are not kept in") == 1
