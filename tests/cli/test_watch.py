"""Live views as they are seen: `fomoe-run --watch` on narrow and wide terminals, fomoe-top of a server at work."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest

from fomoe_io.cli import top
from fomoe_io.experts.profile import Profile
from tests.cli.test_interactive import ROOT, Terminal

RUN = ["-m", "fomoe_io.cli.run"]
SLOW = ["--pace", "20M,1ms", "--slots", "4", "-c", "256", "-t", "1", "--device", "cpu", "--no-profile"]


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
@pytest.mark.parametrize("columns", [20, 80])
def test_the_last_row_of_a_terminal(demo_model: Path, tmp_path: Path, columns: int) -> None:
    """It is never wider than the terminal, text scrolls above it, and it is gone at the end."""
    shell = f'stty rows 12 cols {columns}; exec {sys.executable} {" ".join(RUN)} "$@"'
    program = f"import os, sys; os.execvp('sh', ['sh', '-c', {shell!r}, 'x', *sys.argv[1:]])"
    words = [str(demo_model), *SLOW, "-p", "It was", "-n", "14", "-s", "1", "--ignore-eos", "--watch"]
    terminal = Terminal("-c", program, *words, PYTHONPATH=str(ROOT), XDG_STATE_HOME=str(tmp_path), COLUMNS="", LINES="")
    seen = terminal.wait_for("\x1b[1;11r")  # rows 1 to 11 scroll
    seen = terminal.wait_for("\x1b[r", seconds=60)  # all of them again
    rows = re.findall(r"\x1b7\x1b\[12;1H\x1b\[2K\x1b\[7m(.*?)\x1b\[0m\x1b8", seen)
    assert rows and all(len(row) < columns for row in rows)
    assert all(re.match(r"\d+ tok", row) for row in rows)
    if columns == 80:
        assert any("nvme" in row and "/s" in row and "stall" in row for row in rows)
    assert terminal.close() == 0


def test_no_row_where_there_is_no_terminal(demo_model: Path) -> None:
    words = [str(demo_model), *SLOW, "-p", "It was", "-n", "4", "--watch", "-q"]
    done = subprocess.run([sys.executable, *RUN, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr


def test_top_of_a_server_at_work(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    from fomoe_io import Engine, EngineConfig
    from fomoe_io.serve.settings import ServeConfig
    from fomoe_io.storage.pace import Pace
    from tests.serve.conftest import GREEDY, serving

    config = EngineConfig(context_tokens=256, threads=1, slots=4, pace=Pace.parse("20M,1ms"))
    with serving(lambda: Engine.open(demo_model, config), ServeConfig(port=0, sampling=GREEDY)) as live:

        def ask() -> Any:
            return live.post("/completion", {"prompt": "It was", "n_predict": 20, "ignore_eos": True})

        asking = threading.Thread(target=ask)
        asking.start()
        assert top.main([live.url.removeprefix("http://"), "--every", "0.4", "--count", "3"]) == 0
        asking.join()
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count(live.url) == 3
    speeds = [float(value) for value in re.findall(r"^gen +([\d.]+) tok/s", out, re.M)]
    assert len(speeds) == 3 and max(speeds) > 0
    assert re.search(r"^nvme +[\d.]+ %  [#.]{20}$", out, re.M) and re.search(r"^drive +[\d.]+ [kM]B/s", out, re.M)


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_top_on_a_narrow_terminal_ends_by_ctrl_c(demo_model: Path) -> None:
    """It clears and redraws in place, as wide as the window is, and leaves as anything leaves."""
    pytest.importorskip("uvicorn")
    from fomoe_io import Engine, EngineConfig
    from fomoe_io.serve.settings import ServeConfig
    from tests.serve.conftest import serving

    config = EngineConfig(context_tokens=256, threads=1)
    with serving(lambda: Engine.open(demo_model, config), ServeConfig(port=0)) as live:
        terminal = Terminal(
            "-m", "fomoe_io.cli.top", live.url, "--every", "0.2", PYTHONPATH=str(ROOT), COLUMNS="", LINES=""
        )
        size = struct.pack("HHHH", 8, 20, 0, 0)
        fcntl.ioctl(terminal._descriptor, termios.TIOCSWINSZ, size)
        terminal.wait_for("\x1b[H\x1b[J")
        terminal.wait_for("\x1b[H\x1b[J")
        screen = terminal.wait_for("\x1b[H\x1b[J").removesuffix("\x1b[H\x1b[J")
        assert all(len(line) < 20 for line in screen.replace("\r", "").split("\n"))
        assert len(screen.strip().split("\n")) <= 7
        os.kill(terminal.process, signal.SIGINT)
        assert terminal.close() == 130


def test_a_profile_that_was_being_saved(tmp_path: Path) -> None:
    """Killed in the middle: the old one is whole, and the next one to be saved takes the rest away."""
    import numpy as np

    path = tmp_path / "p.json"
    Profile(5, {0: np.arange(4)}, "p").save(path)
    program = (
        "import os, sys, numpy; from pathlib import Path; from fomoe_io.experts.profile import Profile\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "Profile(9, {0: numpy.arange(4) + 1}, 'p').save(Path(sys.argv[1]))"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9 and len(list(tmp_path.iterdir())) == 2
    assert Profile.load(path).tokens == 5
    Profile(7, {0: np.arange(4)}, "p").save(path)
    assert [found.name for found in tmp_path.iterdir()] == ["p.json"] and Profile.load(path).tokens == 7
