"""The commands as a user meets them: output, errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_io import Engine
from fomoe_io.cli import ppl, run
from fomoe_io.config import EngineConfig, Tiers
from fomoe_io.errors import UsageError
from fomoe_io.units import format_bytes, format_seconds, parse_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = ["-c", "256", "-n", "12", "--temp", "0"]


def test_one_shot(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "statistics.json"
    assert run.main([str(demo_model), "-p", "The river", *SHORT, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    values = json.loads(file.read_text())
    assert out == "The river" + values["text"] + "\n"
    assert len(values["token_ids"]) == values["generated_tokens"] + 1 == 12
    assert values["expert_requests"] == sum(tier["hits"] for tier in values["tiers"].values()) > 0
    assert "exact" in err and "tok/s" in err
    assert run.main([str(demo_model), "-p", "The river", *SHORT, "-q", "--no-display-prompt"]) == 0
    out, err = capsys.readouterr()
    assert out == values["text"] + "\n" and err == ""


def test_prompt_file_and_stop(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text("The river")
    assert run.main(["-m", str(demo_model), "-f", str(prompt), *SHORT, "-q", "--no-display-prompt"]) == 0
    whole = capsys.readouterr().out
    stop = whole.split()[2]
    assert (
        run.main(["-m", str(demo_model), "-f", str(prompt), *SHORT, "-q", "--no-display-prompt", "--stop", stop]) == 0
    )
    assert capsys.readouterr().out.rstrip("\n") == whole[: whole.index(stop)]


def test_the_documented_statistics_are_written(demo_model: Path) -> None:
    """docs/design.md promises these keys: all of them, and no others."""
    text = (ROOT / "docs/design.md").read_text()
    match = re.search(r"Statistics \(`--json`, stable keys\): `([^`]+)`", text)
    assert match is not None
    words: list[str] = re.findall(r"[a-z_0-9]+", match[1])

    def keys(values: dict[str, object]) -> Iterator[str]:
        for name, value in values.items():
            yield name
            if isinstance(value, dict):
                yield from keys(value)

    with Engine.open(demo_model, EngineConfig(context_tokens=32)) as engine:
        assert Counter(keys(engine.statistics())) == Counter(words)


def test_text_that_is_not_utf8(demo_model: Path, tmp_path: Path) -> None:
    """U+FFFD stands for what is no text, the same from a file, an argument, a pipe."""
    text = b"The r\xefver\xff and"
    (tmp_path / "prompt").write_bytes(text)
    command = [sys.executable, "-m", "fomoe_io.cli.run", str(demo_model), *SHORT, "-q"]
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)}

    def out(*options: str | bytes, data: bytes = b"", **more: str) -> str:
        result = subprocess.run([*command, *options], input=data, capture_output=True, env={**environment, **more})
        assert result.returncode == 0 and not result.stderr, result.stderr
        return result.stdout.decode()

    expected = out("-f", str(tmp_path / "prompt"))
    assert expected.startswith("The r\ufffdver\ufffd and")
    assert out("-p", text, "--stop", b"\xff\xfe") == expected == out(data=text)
    utf8 = "The r\u00edver".encode()
    assert out(data=utf8, PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0").startswith("The r?ver")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent.gguf", "-p", "x"], "/nonexistent.gguf"),
        (["{model}", "-m", "other", "-p", "x"], "two models"),
        (["{model}", "-p", "x", "-f", "y"], "both by -p and by -f"),
        (["{model}", "-f", "/nonexistent.txt"], "/nonexistent.txt"),
        (["{model}", "-p", "x", "--top-p", "3"], "--top-p is 3"),
        (["{model}", "-p", "x", "-t", "1000"], "-t is 1000"),
        (["/nonexistent.gguf", "-p", "x", "--json", "/"], "/: Is a directory"),
        (["/nonexistent.gguf", "-p", "x", "--trace", "."], ".: Is a directory"),
        (["{model}", "-p", "", "-c", "64"], "prompt is empty"),
        (["{model}", "-p", "x", "--system", "y"], "chat template"),
        (["{model}", "-p", "word " * 200, "-c", "64"], "exceed the context"),
        (["{model}", "-p", "x", "--ram", "5M"], "too small"),
        (["/dev/null", "-p", "x"], "/dev/null"),
        (["{text}", "-p", "x"], "GGUF"),
    ],
)
def test_mistakes_end_in_one_line(
    demo_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    named = [a.format(model=demo_model, text=ROOT / "README.md") for a in arguments]
    assert run.main(named) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("S  exact", "8 layers", "memory "))]
    assert out == "" and message in lines[0] and lines[0].startswith("fomoe-run: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  fix: "))


@pytest.mark.parametrize(
    "arguments", [["--ram", "big"], ["--tiers", "vram=3"], ["--no-such-flag"], ["--device", "tpu"]]
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main([*arguments, "-p", "x"])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_no_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FOMOE_MODEL", raising=False)
    assert run.main(["-p", "x"]) == 1
    assert "FOMOE_MODEL" in capsys.readouterr().err


def test_ctrl_c_ends_a_run(demo_model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fomoe_io.cli.run", str(demo_model), "-p", "x", "-n", "4000", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a shell starts background jobs with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)  # it is generating
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err


def test_perplexity_resumes(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, saved = tmp_path / "text", tmp_path / "resume.json"
    text.write_text("The river ran through the valley, and the old road beside it. " * 40)
    command = [str(demo_model), "-f", str(text), "-c", "64"]
    assert ppl.main([*command, "--chunks", "4"]) == 0
    whole = capsys.readouterr().out
    assert ppl.main([*command, "--chunks", "2", "--resume", str(saved)]) == 0
    capsys.readouterr()
    assert ppl.main([*command, "--chunks", "4", "--resume", str(saved)]) == 0
    resumed = capsys.readouterr().out
    assert whole.splitlines()[-1] == resumed.splitlines()[-1]
    assert whole.splitlines()[-1].startswith("Final estimate: PPL = ")
    assert whole.startswith("[1]") and resumed.startswith("[3]")
    assert ppl.main([*command[:-1], "32", "--resume", str(saved)]) == 1
    assert "another model, text or chunk size" in capsys.readouterr().err


def test_units() -> None:
    assert [parse_bytes(t) for t in ("512", "1K", "2M", "1.5G", "16GiB", "1tb")] == [
        512, 1024, 2 << 20, 3 << 29, 16 << 30, 1 << 40,
    ]  # fmt: skip
    for bad in ("", "G", "-1G", "1X", "1 2"):
        with pytest.raises(UsageError):
            parse_bytes(bad)
    assert [format_bytes(n) for n in (0, 999, 1234, 45_600_000, 999_900_000, 7.2e12)] == [
        "0 B", "999 B", "1.23 kB", "45.6 MB", "1000 MB", "7.2 TB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0.1234, 187, 7500)] == ["0.123 s", "3m07s", "2h05m"]


def test_config_is_checked() -> None:
    assert Tiers.parse("vram=20%, dram=15%") == Tiers(0.2, 0.15)
    for bad in ({"reader": "carrier pigeon"}, {"threads": 1000}, {"batch_tokens": 0}, {"ram_bytes": 0}):
        with pytest.raises(UsageError):
            EngineConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        Tiers.parse("vram=80%,dram=30%")
