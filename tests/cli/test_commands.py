"""The umbrella command, shells, man pages, fomoe-bench decode, fomoe-top, progress, the hub."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fomoe_io import Engine, EngineConfig, UsageError, commands
from fomoe_io.cli import bench, bench_decode, hub, progress, shell, top
from fomoe_io.cli.completion import COMMANDS, man_page, parser_of, script, verbs_of
from fomoe_io.cli.watch import live_line
from fomoe_io.storage.pace import Pace

ROOT = Path(__file__).resolve().parent.parent.parent

# ---- fomoe ----


@pytest.mark.parametrize("verb", ["run", "serve", "layout", "ppl", "bench", "doctor", "top", "shell", "plan"])
def test_fomoe_is_all_of_them(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fomoe", verb, "--help"])
    try:
        assert commands.fomoe() == 0
    except SystemExit as stop:
        assert stop.code == 0
    assert "usage: fomoe-" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"), [([], 2, "no verb"), (["x"], 2, "'x' is no verb"), (["-h"], 0, "usage")]
)
def test_fomoe_by_itself(
    words: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fomoe", *words])
    assert commands.fomoe() == code
    found = capsys.readouterr()
    assert said in (found.err if code else found.out) and "doctor" in found.out + found.err


def test_python_m(demo_model: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "fomoe_io", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "usage: fomoe VERB" in done.stdout


# ---- shells and man ----


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["--completion", name]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS) and "predict" in text and "calibrate" in text
    if name != "zsh" and shutil.which(name):
        done = subprocess.run([name, "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with pytest.raises(UsageError, match="tcsh"):
        script("tcsh")


def test_bash_completes() -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    ask = 'COMP_WORDS=(fomoe-run --kernels ""); COMP_CWORD=2; _fomoe_run; echo "${COMPREPLY[@]}"\n'
    ask += 'COMP_WORDS=(fomoe-bench ""); COMP_CWORD=1; _fomoe_bench; echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash"], input=script("bash") + "\n" + ask, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "auto ggml portable" and "decode" in done.stdout.splitlines()[1]


def test_man_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["--man", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(COMMANDS)
    page = man_page("fomoe-run")
    assert ".TH FOMOE-RUN 1" in page and r"\-\-temp, \-\-temperature" in page and ".SH EXAMPLES" in page
    assert "PACK" in man_page("fomoe-layout")
    assert shell.main([]) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    parser = parser_of(command)
    for found in (parser, *verbs_of(parser).values()):
        bare = [a.option_strings for a in found._actions if a.option_strings and not a.help]
        assert command == "fomoe-bench" or not bare, bare


# ---- fomoe-bench decode ----


def test_bench_decode(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [str(demo_model), "-p", "16", "-n", "4,8", "-r", "2", "--ram", "512M", "-ngl", "99", "--device", "cpu"]
    assert bench.main(["decode", *base, "-o", "json"]) == 0
    found = capsys.readouterr()
    rows = json.loads(found.out)
    assert [row["test"] for row in rows] == ["pp16", "tg4", "tg8"] and "note: -ngl has no effect" in found.err
    for row in rows:
        assert (
            len(row["samples"]) == 2 and row["tokens_per_second"] > 0 and row["drive"] and row["ram_bytes"] == 512 << 20
        )
        assert abs(row["vram_share"] + row["dram_share"] + row["nvme_share"] - 1) < 1e-9
    values = [bench_decode.Row(**row) for row in rows]
    table = bench_decode.formatted(values, "md").splitlines()
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1 and " ± " in table[-1]
    assert [row["test"] for row in csv.DictReader(io.StringIO(bench_decode.formatted(values, "csv")))][-1] == "tg8"
    assert len(bench_decode.formatted(values, "jsonl").splitlines()) == 3


@pytest.mark.parametrize("words", [["-p", "0", "-n", "0"], ["-r", "0"]])
def test_bench_decode_of_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["decode", "m.gguf", *words]) == 1
    assert "nothing to measure" in capsys.readouterr().err


# ---- progress ----


def test_loading_tells_each_stage(demo_model: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with Engine.open(demo_model, EngineConfig(context_tokens=64, progress=lambda *all_: told.append(all_))):
        pass
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["weights", "experts"] and told[0][1] == 0
    weights = [(done, total) for stage, done, total in told if stage == "weights"]
    assert weights[-1][0] == weights[-1][1] > 1 << 20


def test_a_prompt_tells_from_inside_a_batch(demo_model: Path) -> None:
    """One batch of a slow drive: the gate says how far it is."""
    shares: list[float] = []
    pace = Pace.parse("40M,3000us")
    with Engine.open(demo_model, EngineConfig(context_tokens=64, pace=pace, slots=4)) as engine:
        engine.gate.on_progress = shares.append
        engine.session().prefill(list(range(32)))
    assert len(shares) > 3 and shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1


def test_an_error_in_the_progress_ends_the_run(demo_model: Path) -> None:
    def fail(share: float) -> None:
        raise RuntimeError("enough")

    with Engine.open(demo_model, EngineConfig(context_tokens=64, pace=Pace.parse("40M,3000us"), slots=4)) as engine:
        engine.gate.on_progress = fail
        with pytest.raises(RuntimeError, match="enough"):
            engine.session().prefill(list(range(32)))


def test_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.Progress("prompt", 100, unit="tok") as bar:
        for done in range(0, 101, 5):
            now[0] += 1
            bar.to(done)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and re.fullmatch(r"prompt  50 %  50 of 100 tok  4.\d+ tok/s  eta 1\d.*s", lines[4])
    with progress.Progress("prompt", 100, unit="tok", quiet=True) as bar:
        bar.add(100)
    assert capsys.readouterr().err == ""


# ---- live views ----


def _statistics(tokens: int, dram: int, nvme: int) -> dict[str, Any]:
    tiers = {"vram": {"hits": 0}, "dram": {"hits": dram}, "nvme": {"hits": nvme, "bytes": nvme * 1000}}
    return {"generated_tokens": tokens, "tiers": tiers, "substitutions": 0, "stall_seconds": {"nvme": nvme / 100}}


def test_a_live_line_fits() -> None:
    before, now = _statistics(10, 0, 0), _statistics(20, 75, 25)
    line = live_line(before, now, 2.0, 80)
    assert line == "20 tok 5.0/s | dram 75 % nvme 25 % | 12.5 kB/s | stall 12 %"
    assert live_line(before, now, 2.0, 20) == "20 tok 5.0/s" and live_line(before, before, 0.0, 80)


def test_top_reads_what_a_server_says() -> None:
    text = (
        "# HELP x\nllamacpp:tokens_predicted_total 5\n"
        'fomoe_expert_hits_total{tier="dram"} 30\nfomoe_expert_hits_total{tier="nvme"} 10\n'
        "fomoe_nvme_read_bytes_total 1e6\nfomoe_nvme_stall_seconds_total 0.5\nllamacpp:prompt_tokens_total 7\n"
    )
    now = top.samples(text)
    lines = top.screen({}, now, 1.0, 80)
    assert lines[0].split() == ["prompt", "7.0", "tok/s"] and lines[1].split() == ["gen", "5.0", "tok/s"]
    assert "75.0 %" in lines[2] and "1 MB/s" in lines[4] and "50 %" in lines[5]
    assert max(map(len, top.screen({}, now, 1.0, 20))) < 20


def test_top_knows_the_servers_names() -> None:
    source = (ROOT / "fomoe_io/serve/metrics.py").read_text()
    for name in re.findall(r"change\('([\w:]+)'\)", (ROOT / "fomoe_io/cli/top.py").read_text().replace('"', "'")):
        assert name in source


def test_top_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert top.main(["127.0.0.1:9", "--count", "1"]) == 1
    assert "does not answer" in capsys.readouterr().err


# ---- the hub ----

NAMES = [
    "README.md", "mmproj-F16.gguf", "model-Q8_0.gguf", "model-Q4_K_M.gguf",
    "UD-Q2_K/model-UD-Q2_K-00001-of-00002.gguf", "UD-Q2_K/model-UD-Q2_K-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("quant", "file", "want"),
    [
        (None, None, ["model-Q4_K_M.gguf"]),
        ("q8_0", None, ["model-Q8_0.gguf"]),
        ("UD-Q2_K", None, NAMES[4:]),
        (None, NAMES[4], NAMES[4:]),
    ],
)
def test_which_files_of_a_repository(quant: str | None, file: str | None, want: list[str]) -> None:
    assert hub.chosen_files(NAMES, quant, file) == want


def test_repositories_without_a_model() -> None:
    for names, quant, said in (
        (NAMES, "Q5_K", "has no Q5_K"),
        (["mmproj.gguf"], None, "no GGUF"),
        (NAMES[:5], "Q2_K", "Q2_K"),
    ):
        with pytest.raises(UsageError, match=said):
            hub.chosen_files(names, quant, None)


# ---- mistakes that should not cost the loading, and fio's habits ----


def test_fio_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(1 << 20))
    words = [
        "--filename",
        str(file),
        "--readwrite=read",
        "--blocksize=64k",
        "--group_reporting",
        "--thread",
        "--offset=0",
    ]
    assert bench.main(["io", *words, "--size", "512K", "--output-format", "json"]) == 0
    found = capsys.readouterr()
    assert found.err.count("note: --") == 2 and "64" in found.out
    with pytest.raises(SystemExit):
        bench.main(["io", *words, "--rwmixread", "50"])
    assert "  fix: fio" in capsys.readouterr().err


def test_calibration_tells_how_far_it_is(tmp_path: Path) -> None:
    from fomoe_io.io_bench.calibrate import calibrate

    file, told = tmp_path / "data", []
    file.write_bytes(bytes(1 << 20))
    calibrate(file, sizes=(65536,), depths=(1, 2), seconds=0.05, progress=told.append)
    assert told == [1, 2]


def test_a_wrong_resume_or_text_costs_no_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told of before the model is looked for."""
    from fomoe_io.cli import ppl, run

    text, resume = tmp_path / "text", tmp_path / "resume"
    text.write_text("x")
    resume.write_text("{}")
    assert ppl.main(["/nonexistent.gguf", "-f", str(text), "--resume", str(resume)]) == 1
    assert "is no resume file" in capsys.readouterr().err
    assert ppl.main(["/nonexistent.gguf", "-f", "/nonexistent.txt"]) == 1
    assert "/nonexistent.txt" in capsys.readouterr().err
    assert run.main(["/nonexistent.gguf", "-p", "x", "--profile", str(text / "profile.json")]) == 1
    assert f"{text}: Not a directory" in capsys.readouterr().err


def test_a_large_context_is_named(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fomoe_io.cli import run

    assert run.main([str(demo_model), "-p", "x", "--ram", "120M", "-c", "262144", "--device", "cpu"]) == 1
    assert "or a smaller -c" in capsys.readouterr().err


def test_context_0_and_threads_of_llama_cpp(demo_model: Path) -> None:
    from fomoe_io.cli import run
    from fomoe_io.cli.options import engine_config

    trained = engine_config(run.parser().parse_args(["-c", "0", "-t", "-1"]), demo_model)
    assert trained.threads is None and trained.context_tokens is not None and trained.context_tokens > 256
