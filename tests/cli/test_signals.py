"""Ctrl-C and SIGTERM, whenever they come: no traceback, and what was learned is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_io.cli.common import Terminated, ending_signals, run_command
from tests.cli.test_interactive import Terminal

ROOT = Path(__file__).resolve().parent.parent.parent


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        # a shell starts background jobs with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_an_answer_that_is_ended_leaves_its_results(demo_model: Path, tmp_path: Path, number: int, code: int) -> None:
    statistics = tmp_path / "statistics.json"
    process = start(
        "-m", "fomoe_io.cli.run", str(demo_model), "-p", "x", "-n", "4000", "--ignore-eos", "--json", str(statistics),
        XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert process.stdout is not None
    seen = process.stdout.read(20)  # it is generating
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert "tok/s" in err.splitlines()[-1 if number != signal.SIGINT else -2]
    saved = json.loads(statistics.read_text())
    assert 0 < len(saved["token_ids"]) < 4000 and saved["text"][:15] in seen + out
    (profile,) = (tmp_path / "fomoe_io" / "profiles").iterdir()
    assert json.loads(profile.read_text())["tokens"] > 0


def test_a_signal_inside_a_prompts_task_is_no_traceback(tmp_path: Path) -> None:
    """What meets the task that loads the history is raised from the prompt; prompt_toolkit and asyncio log it, too."""
    script = """if True:
        import logging
        from fomoe_io.cli import prompt
        prompt._session()
        for name in ("prompt_toolkit.buffer", "asyncio"):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                logging.getLogger(name).exception("Loading history failed")
    """
    process = start("-c", script, XDG_STATE_HOME=str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert not out and process.returncode == 0
    assert "Loading history failed" not in err and "Traceback" not in err


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
@pytest.mark.parametrize("answering", [False, True])
def test_sigterm_ends_a_conversation(demo_model: Path, tmp_path: Path, answering: bool) -> None:
    terminal = Terminal(
        "-m", "fomoe_io.cli.run", str(demo_model), "-c", "4096", "-n", "3000", "-s", "3", "--ignore-eos",
        PYTHONPATH=str(ROOT), XDG_STATE_HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    terminal.wait_for("continues your text")
    terminal.wait_for(">")
    if answering:
        terminal.type("The old house\r")
        terminal.skip(2000)
    os.kill(terminal.process, signal.SIGTERM)
    assert "Traceback" not in terminal.wait_for("tok/s")
    assert terminal.close() == 143
    assert (tmp_path / "fomoe_io" / "profiles").exists() == answering


def test_signals_raise_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending_signals():
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
        assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    "module",
    ["fomoe_io.cli.run", "fomoe_io.cli.ppl", "fomoe_io.cli.bench_decode", "fomoe_io.cli.doctor", "layout_tool.main"],
)
def test_an_interrupt_while_modules_load_is_silent(tmp_path: Path, module: str) -> None:
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemError\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", module, "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_every_command_ends_by_sigterm() -> None:
    def work(argv: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    assert run_command("x", work) == 143


# ---- while modules load ----


@pytest.fixture
def slow_numpy(tmp_path: Path) -> Iterator[Path]:
    """A numpy that says when it is imported, and takes its time; interrupted, it fails in its own way."""
    package = tmp_path / "slow" / "numpy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, time\nos.write(1, b'importing\\n')\ntry:\n    time.sleep(60)\n"
        "except BaseException:\n    raise ImportError('numpy failed') from None\n"
    )
    yield package.parent


@pytest.mark.parametrize("command", ["run", "ppl", "doctor", "layout"])
def test_ctrl_c_while_modules_load(slow_numpy: Path, command: str) -> None:
    process = start(
        "-c", f"import sys; from fomoe_io.commands import {command} as main; sys.exit(main())",
        PYTHONPATH=f"{slow_numpy}:{ROOT}",
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


def test_entry_points_import_nothing_heavy() -> None:
    heavy = ("numpy", "tokenizers", "gguf", "jinja2")
    program = f"import sys, fomoe_io.commands; print([name for name in {heavy} if name in sys.modules])"
    process = start("-c", program)
    assert process.communicate(timeout=30)[0] == "[]\n"


def test_entry_points_are_those_of_the_package() -> None:
    from fomoe_io import commands

    names = [
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith(("fomoe-", "fomoe = "))
    ]
    assert len(names) == 8
    for name in names:
        module, function = name.split(":")
        assert module == "fomoe_io.commands" and callable(getattr(commands, function))
    process = start(
        "-c", "import sys; from fomoe_io.commands import bench; sys.argv[1:] = ['--version']; sys.exit(bench())"
    )
    assert process.communicate(timeout=30)[0].startswith("fomoe-bench ") and process.returncode == 0
