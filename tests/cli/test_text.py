"""What goes in and comes out of the commands as text: line ends, control sequences, logits that are no numbers."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io.cli import bench_cache, ppl, run, ui
from fomoe_io.cli.parser import new_parser
from fomoe_io.errors import ComputeError, FormatError, printable
from fomoe_io.storage.gguf import GGUFFile
from fomoe_io.text.generation import Conversation
from fomoe_io.text.sampler import Sampler, SamplingConfig, check_finite
from layout_tool import main as layout
from tests.cli.test_hostile_text import with_key
from tests.tiny_model import Tiny, write_tiny

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\r\x9bc\u202e"
VISIBLE = "a\\x1b]0;owned\\x07\\x1b[2Jb\\r\\x9bc\\u202e"


def hostile_file(model: Path, folder: Path) -> Path:
    path = folder / f"{HOSTILE}.gguf"
    shutil.copy(model, path)
    return path


def set_row(path: Path, tensor: str, value: float, row: int = 0) -> None:
    """Overwrite a row of an F32 tensor."""
    info = GGUFFile.open(path).tensors[tensor]
    columns = info.shape[0]
    with path.open("r+b") as stream:
        stream.seek(info.offset + 4 * columns * row)
        stream.write(np.full(columns, value, np.float32).tobytes())


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", Tiny(architecture="qwen3moe", layers=2), 3)


# ---- line ends ----

LINES = b"one\r\ntwo\rthree\n\r\nfour"


def prompt_tokens(model: Path, tmp_path: Path, *options: str) -> int:
    statistics = tmp_path / "statistics.json"
    assert run.main([str(model), "-n", "1", "-c", "128", "-q", "--json", str(statistics), "--raw", *options]) == 0
    count: int = json.loads(statistics.read_text())["prompt_tokens"]
    return count


def test_line_ends_reach_the_tokenizer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token a byte in this model: none may be missing."""
    file = tmp_path / "prompt"
    file.write_bytes(LINES)
    assert prompt_tokens(tiny, tmp_path, "-p", LINES.decode()) == len(LINES)
    assert prompt_tokens(tiny, tmp_path, "-f", str(file)) == len(LINES)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    assert prompt_tokens(tiny, tmp_path) == len(LINES)


def test_line_ends_of_a_measured_text(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "text", tmp_path / "profile.json"
    file.write_bytes(LINES * 3)
    assert ppl.main([str(tiny), "-f", str(file), "-c", str(len(LINES) * 3), "--device", "cpu"]) == 0
    assert layout.main(["profile", str(tiny), "-f", str(file), "-o", str(output)]) == 0
    assert f"over {3 * len(LINES)} tokens" in capsys.readouterr().err


# ---- logits ----


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    set_row(tiny, "output_norm.weight", value)
    text = tmp_path / "text"
    text.write_text("abcdefgh" * 20)
    for main, options in (
        (run.main, ["-p", "abcdef", "-n", "3", "-c", "64"]),
        (ppl.main, ["-f", str(text), "-c", "32"]),
    ):
        assert main([str(tiny), *options]) == 1
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if "logits" in line]
        assert f"after token {5 if main is run.main else 16} (from 0)" in line
        assert "Traceback" not in err and "!" not in out and "Final" not in out


def test_the_token_after_which_logits_fail_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fomoe_io import Engine, EngineConfig

    with Engine.open(tiny, EngineConfig(context_tokens=64)) as engine:
        first = Conversation(engine.timeline())
        greedy = Sampler(SamplingConfig(temperature=0))
        answer = [token for token, _ in first.generate([5, 6], greedy, most=3, ignore_eos=True)]
    assert answer[1] not in (5, 6, answer[0])  # else the seed is a bad one for this test
    set_row(tiny, "token_embd.weight", np.nan, answer[1])
    with Engine.open(tiny, EngineConfig(context_tokens=64)) as engine:
        talk = Conversation(engine.timeline()).generate([5, 6], greedy, most=5, ignore_eos=True)
        with pytest.raises(ComputeError, match="NaN after token 3 "):
            list(talk)


def test_check_finite() -> None:
    good = np.zeros((3, 4), np.float32)
    check_finite(good)
    for value, kind in ((np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")):
        bad = good.copy()
        bad[1, 2] = value
        with pytest.raises(ComputeError, match=f"{kind} after token 8 "):
            check_finite(bad, 7)
        with pytest.raises(ComputeError, match=kind):
            Sampler(SamplingConfig()).sample(bad[1])


# ---- reset ----


def test_a_sampler_starts_again() -> None:
    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    sampler = Sampler(SamplingConfig(seed=3, repeat_penalty=1.5))

    def draw() -> list[int]:
        drawn = []
        for _ in range(20):
            drawn.append(sampler.sample(logits))
            sampler.accept(drawn[-1])
        return drawn

    first = draw()
    assert draw() != first
    sampler.reset()
    assert draw() == first


def test_reset_gives_the_same_answer_again(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["The river", "/reset", "The river", None])
    monkeypatch.setattr("fomoe_io.cli.prompt.read_line", lambda: next(lines))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    options = ["-n", "12", "-c", "128", "-s", "5", "--temp", "1.5", "--repeat-penalty", "1.3", "-q"]
    assert run.main([str(demo_model), *options]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second != ""


def test_a_question_that_fails_is_not_kept(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by the template, or too long: the next question is answered as if it had never been asked."""
    source = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}"
    )
    model = with_key(tiny, "tokenizer.chat_template", source)

    def talk(*questions: str) -> tuple[str, str]:
        lines = iter([*questions, None])
        monkeypatch.setattr("fomoe_io.cli.prompt.read_line", lambda: next(lines))
        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
        assert run.main([str(model), "-n", "4", "-c", "128", "--temp", "0", "-q", "--ignore-eos"]) == 0
        out, err = capsys.readouterr()
        return out, err

    out, err = talk("one", "bad", "x" * 200, "two")
    assert out == talk("one", "two")[0]
    assert ("refuses the conversation: no bad words" in err and "exceed" in err) or "has filled the context" in err


# ---- control sequences ----


def test_what_is_not_printable_is_escaped() -> None:
    assert printable(HOSTILE) == VISIBLE and printable("naïve 北京 🙂") == "naïve 北京 🙂"
    assert printable("\udcff\n") == "\\udcff\\n"
    error = FormatError(f"damaged {HOSTILE}", hint=f"rm {HOSTILE}")
    assert str(error) == f"damaged {VISIBLE}\n  fix: rm {VISIBLE}"


def assert_harmless(text: str) -> None:
    assert not [c for c in text if c != "\n" and not c.isprintable()], text


def test_messages_hold_no_control_sequences(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hostile_file(demo_model, tmp_path)
    store = tmp_path / f"{HOSTILE} store"
    missing = str(tmp_path / HOSTILE)
    trace = str(tmp_path / f"{HOSTILE}.trace")
    commands: list[tuple[Any, list[str]]] = [
        (run.main, [str(path), "-p", "x", "-n", "2", "-c", "64", "--trace", trace]),
        (run.main, [missing, "-p", "x"]),
        (run.main, [str(path), "-f", missing]),
        (run.main, [str(path), "-p", "x", "--calibration", missing]),
        (run.main, [str(path), "-p", "x", "--profile", str(path)]),
        (ppl.main, [str(path), "-f", missing]),
        (bench_cache.main, [trace, "--sizes", "50%", "--policy", "lru"]),
        (layout.main, ["inspect", str(path)]),
        (layout.main, ["plan", str(path), "--to", str(store)]),
        (layout.main, ["pack", str(path), "--to", str(store)]),
        (layout.main, ["pack", str(path), "--to", str(store)]),
        (layout.main, ["inspect", str(store)]),
        (layout.main, ["verify", str(store)]),
        (layout.main, ["verify", missing]),
    ]
    for main, arguments in commands:
        main(arguments)
        out, err = capsys.readouterr()
        assert out or err
        assert_harmless(out + err)


def test_the_name_of_a_model_is_escaped(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.read_bytes()
    name = b"\x04\0\0\0\0\0\0\0tiny"
    assert name in data
    tiny.write_bytes(data.replace(name, name[:8] + b"t\x1b[m"))
    assert run.main([str(tiny), "-p", "x", "-n", "1", "-c", "64"]) == 0
    err = capsys.readouterr().err
    assert layout.main(["inspect", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert "t\\x1b[m" in err and "t\\x1b[m" in out
    assert_harmless(err + out)


def test_arguments_are_repeated_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main([f"--{HOSTILE}", "-p", "x"])
    assert_harmless(capsys.readouterr().err)
    with pytest.raises(SystemExit):
        new_parser("x", "y").parse_args([HOSTILE])
    assert_harmless(capsys.readouterr().err)


def test_generated_text_is_escaped_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\r\n\tü🙂\u200d\x9b"
    assert ui.shown(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ui.shown(text) == "a\\x1b[2J\\r\n\tü🙂\u200d\\x9b"


# ---- closed streams ----


def shell(command: str, model: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "M": str(model), "PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=100)


RUN = '"$PYTHON" -m fomoe_io.cli.run "$M" -n 2 -c 64 --temp 0'


def test_closed_streams(tiny: Path) -> None:
    result = shell(f"{RUN} <&-", tiny)
    assert result.returncode == 1 and "standard input is closed" in result.stderr
    assert len(result.stderr.splitlines()) == 2
    result = shell(f"{RUN} -p x --no-display-prompt 2>&-", tiny)
    assert result.returncode == 0 and result.stderr == "" and "memory" not in result.stdout
    result = shell(f"{RUN} -p x <&- >&- 2>&-", tiny)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    result = shell(f"{RUN} -p x -q > /dev/full", tiny)
    assert result.returncode == 1 and result.stderr == "fomoe-run: No space left on device\n"
