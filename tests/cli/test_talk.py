"""Conversations: history, commands, contexts that fill, thinking, and what --json says of all that."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.cli import run
from fomoe_io.cli.chat import Answer, Chat
from fomoe_io.cli.model_help import missing
from fomoe_io.cli.run import _unescaped
from tests.cli.test_hostile_text import with_key
from tests.tiny_model import Tiny, write_tiny

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and not enable_thinking %}-{% endif %}"
    "{% if mood is defined %}{{ mood }}{% endif %}{% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A token a byte, and a template that knows of thoughts."""
    tiny = write_tiny(tmp_path / "tiny.gguf", Tiny(architecture="qwen3moe", layers=2), 3)
    return with_key(tiny, "tokenizer.chat_template", TEMPLATE)


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Lines in; (stdout, stderr) back."""

    def go(*lines: str, options: tuple[str, ...] = (), code: int = 0) -> tuple[str, str]:
        left = iter([*lines, None])
        monkeypatch.setattr("fomoe_io.cli.prompt.read_line", lambda: next(left))
        monkeypatch.setattr(sys, "stdin", Terminal())
        command = [str(model), "-n", "4", "-c", "256", "--temp", "0", "--ignore-eos", "--no-profile", *options]
        assert run.main(command) == code
        found = capsys.readouterr()
        return found.out, found.err

    return go


def test_each_answer_says_its_speed_and_why_it_ends(talk: Any) -> None:
    out, err = talk("one", "two")
    assert out.count("\n") >= 2 and err.count("   context ") == 2 and "of 256]" in err
    assert "-n 4 is reached" in err and "gen 4 tok" in err and "/help lists the commands" in err
    assert "seed " in err.splitlines()[-1] and "gen 8 tok" in err.splitlines()[-1]
    assert talk("one", options=("-q",))[1] == ""
    assert "context " not in talk("one", options=("--no-show-timings",))[1].split("loaded in")[1].split("prompt")[0]


def test_a_context_that_fills_is_never_silent(talk: Any) -> None:
    _, err = talk("x" * 30, options=("-n", "-1", "-c", "64"))
    assert "the context of 64 tokens is full" in err
    _, err = talk("x" * 300, "y", options=("-c", "128"))
    assert "has filled the context of 128 tokens" in err and "fix: /reset" in err and "gen 4 tok" in err


def test_commands(talk: Any, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("a fact")
    saved = tmp_path / "a conversation.json"
    _, err = talk(
        "one", "/regen", f"/save '{saved}'", "/reset", "/regen", f"/load '{saved}'", f"/read {note}", "two",
        "/think off", "/think maybe", "/save", "/load /nonexistent", "/stats", "/help", "/what", "/clear",
    )  # fmt: skip
    for said in (
        "1 answers saved", "the conversation is forgotten", "there is no answer to generate again", "1 answers loaded",
        "6 characters go before the next question", "thinking is off", "/think takes on, off or auto",
        "/save takes one file", "/nonexistent", "/regen          another answer", "no command /what",
    ):  # fmt: skip
        assert said in err, said
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] and messages[0]["content"] == "one"
    saved.write_text('{"messages": 3}')
    assert "is no conversation" in talk(f"/load '{saved}'")[1]


def test_an_answer_is_not_read_again(talk: Any, tmp_path: Path) -> None:
    """The next question continues what the session has read, by the tokens that were generated."""
    statistics = tmp_path / "s.json"
    talk("one", options=("--json", str(statistics)))
    once = json.loads(statistics.read_text())
    talk("one", "two", options=("--json", str(statistics)))
    twice = json.loads(statistics.read_text())
    question = len("\nuser: two\nassistant: ")
    assert twice["prompt_tokens"] - once["prompt_tokens"] <= question + 1  # and the last answer's last token


def test_thoughts_may_stay_in_the_history(model: Path) -> None:
    with Engine.open(model, EngineConfig(context_tokens=256)) as engine:
        for keeps in (False, True):
            chat = Chat(engine, keeps_thoughts=keeps)
            first = chat.ask("q")
            answer = Answer(engine.tokenizer.encode("hm</think>yes"), ["hm</think>yes"], "eos")
            chat.answered("q", first, answer)
            second = chat.ask("r")
            assert (second[: len(first) + len(answer.ids)] == [*first, *answer.ids]) is keeps
            assert engine.tokenizer.decode(second).endswith("yes\nuser: r\nassistant: ")


def test_thinking_and_names_reach_the_template(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def count(*options: str) -> int:
        target = tmp_path / "s.json"
        command = [str(model), "-p", "q", "-n", "1", "-c", "64", "-q", "--json", str(target), *options]
        assert run.main(command) == 0
        return int(json.loads(target.read_text())["prompt_tokens"])

    plain = count()
    assert count("--reasoning", "off") == count("--reasoning-budget", "0") == plain + 1
    assert count("--reasoning", "on") == count("--reasoning") == plain
    assert count("--chat-template-kwargs", '{"mood": "glad"}') == plain + 4
    assert count("--chat-template", "chatml") > plain
    assert count("-sys", "x") == plain + len("system: x\n")


# ---- --json ----


def test_json_is_whole(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(model), "-p", "q", "-n", "3", "-c", "64", "--json", "-", "--ignore-eos", "-q"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["stop_reason"] == "limit" and values["context_tokens"] == 64 and values["path"] == str(model)
    assert values["version"] and values["seed"] == values["sampling"]["seed"] and len(values["token_ids"]) == 3
    assert values["sampling"]["temperature"] == 0.8 and "error" not in values
    again = [
        str(model),
        "-p",
        "q",
        "-n",
        "3",
        "-c",
        "64",
        "--json",
        "-",
        "--ignore-eos",
        "-q",
        "-s",
        str(values["seed"]),
    ]
    assert run.main(again) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == values["token_ids"]


def test_json_of_a_failure(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "s.json"
    assert run.main([str(model), "-p", "x" * 100, "-c", "64", "--json", str(target)]) == 1
    values = json.loads(target.read_text())
    assert values["error"]["type"] == "UsageError" and "exceed the context" in values["error"]["message"]
    assert values["error"]["hint"].startswith("-c ") and values["context_tokens"] == 64
    assert run.main(["/nonexistent.gguf", "-p", "x", "--json", str(target)]) == 1
    assert "/nonexistent.gguf" in json.loads(target.read_text())["error"]["message"]


def test_a_prompt_that_is_too_long_costs_no_loading(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of -p and of -f; what is suggested has room for the answer that was asked for."""
    monkeypatch.setattr("fomoe_io.cli.run.Engine", None)  # opening one fails the test
    (tmp_path / "question").write_text("word " * 300)
    for source in (["-p", "word " * 300], ["-f", str(tmp_path / "question")]):
        assert run.main([str(demo_model), *source, "-c", "256", "-n", "500", "--no-profile"]) == 1
        said = capsys.readouterr().err
        count = int(re.search(r"(\d+) tokens of a prompt", said)[1])  # type: ignore[index]
        assert count >= 256 and f"fix: -c {count + 500} " in said


def test_json_of_an_interrupt(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fomoe_io.cli.talk import AnswerWriter

    def write(self: AnswerWriter, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerWriter, "write", write)
    target = tmp_path / "s.json"
    assert run.main([str(model), "-p", "q", "-c", "64", "--json", str(target), "--ignore-eos"]) == 130
    values = json.loads(target.read_text())
    assert values["stop_reason"] == "interrupted" and values["error"]["type"] == "Interrupted"
    assert len(values["token_ids"]) == 1 and values["prompt_tokens"]


# ---- what goes in ----


def test_a_prompt_from_standard_input(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One final line end of a file or a pipe is nobody's; -f - is a pipe."""
    found = []
    for text, options in ((b"hello\n", ["-f", "-"]), (b"hello", []), (b"", ["-p", "hello"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        command = [str(model), "-n", "1", "-c", "64", "-q", "--raw", "--json", "-", *options]
        assert run.main(command) == 0
        found.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert found == [5, 5, 5]


def test_escapes() -> None:
    assert _unescaped(r"a\nb\tc\\n\x\'") == "a\nb\tc\\n\\x'"
    assert _unescaped("\\") == "\\" and _unescaped("a\\") == "a\\" and _unescaped(r"\\\n") == "\\\n"


def test_standard_input_that_nobody_reads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text("more")
    with (tmp_path / "in").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run.main([str(model), "-p", "q", "-n", "1", "-c", "64"]) == 0
    assert "standard input is not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://x.y/z.gguf", "is an address"), ("qwen3:30b", "name of ollama's"),
        ("user/model-GGUF:Q4_K_M", "-hf user/"),
        ("tiny.gguf.bak", "no such file"),
    ],
)  # fmt: skip
def test_names_that_are_no_files(name: str, said: str) -> None:
    assert said in str(missing(Path(name)))


def test_files_that_are_no_models(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 100)
    adapter = with_key(model, "general.type", "adapter")
    adapter.rename(tmp_path / "adapter.gguf")

    def said(path: Path) -> str:
        run.main([str(path), "-p", "x"])
        return capsys.readouterr().err

    assert "convert_hf_to_gguf" in said(tmp_path / "weights.safetensors")
    assert "holds GGUF files" in said(tmp_path)
    assert str(tmp_path / "adapter.gguf") in said(tmp_path / "adaptr.gguf")


CHANNELS = (
    "{% for m in messages %}{% if '<|channel|>' in m.content %}{{ raise_exception('channels') }}{% endif %}"
    "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes", "yes"),
        ("<|channel|>final<|message|>yes", "yes"),
        ("<|channel|>analysis<|message|>never at an end", ""),
        ("no channels", "no channels"),
    ],
)
def test_a_history_has_what_was_said_in_the_last_channel(tmp_path: Path, answer: str, want: str) -> None:
    """gpt-oss' template refuses contents with channels, and leaves thoughts of earlier turns out."""
    tiny = write_tiny(tmp_path / "tiny.gguf", Tiny(architecture="qwen3moe", layers=2), 3)
    path = with_key(tiny, "tokenizer.chat_template", CHANNELS)
    with Engine.open(path, EngineConfig(context_tokens=512)) as engine:
        chat, tokenizer = Chat(engine), engine.tokenizer
        first = chat.ask("well?")
        chat.answered("well?", first, Answer(tokenizer.encode(answer), [answer], "eos"))
        asked = tokenizer.decode(chat.ask("really?"))
    assert chat.messages[1] == {"role": "assistant", "content": want}
    assert asked.endswith(
        f"<|channel|>final<|message|>{want}<|end|><|start|>user<|message|>really?<|end|><|start|>assistant"
    )
