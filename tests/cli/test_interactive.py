"""fomoe-run at a terminal: commands, history, and Ctrl-C that stops the answer, not the program."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._rest = b""
        self.process, self._descriptor = pty.fork()
        if self.process == 0:
            # a shell starts background jobs with SIGINT ignored, and children inherit that
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(sys.executable, [sys.executable, *command], {**os.environ, "TERM": "xterm", **environment})

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What was printed up to and with `text`; what came after it is there for the next call."""
        seen, self._rest = self._rest, b""
        end = time.monotonic() + seconds
        while text.encode() not in seen:
            assert time.monotonic() < end, f"{text!r} did not come; got {seen[-500:]!r}"
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    seen += os.read(self._descriptor, 65536)
                except OSError:
                    raise AssertionError(f"the program ended; it printed {seen[-800:]!r}") from None
        place = seen.index(text.encode()) + len(text.encode())
        seen, self._rest = seen[:place], seen[place:]
        return seen.decode(errors="replace")

    def skip(self, count: int) -> None:
        """Let so many bytes go by."""
        count -= len(self._rest)
        self._rest = b""
        while count > 0:
            count -= len(os.read(self._descriptor, 65536))

    def close(self) -> int:
        """The exit code; the program must have ended or be ending."""
        for _ in range(100):
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                os.close(self._descriptor)
                return os.waitstatus_to_exitcode(status)
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    os.read(self._descriptor, 65536)
                except OSError:  # the other side has closed
                    time.sleep(0.05)
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        raise AssertionError("the program did not end")


@pytest.fixture
def terminal(demo_model: Path, tmp_path: Path) -> Iterator[Terminal]:
    yield Terminal(
        "-m", "fomoe_io.cli.run", str(demo_model), "-c", "4096", "-n", "3000", "-s", "3", "--ignore-eos",
        PYTHONPATH=str(ROOT), XDG_STATE_HOME=str(tmp_path),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    assert "no chat template" in terminal.wait_for(">")
    terminal.type("/help\r")
    terminal.wait_for("/reset, /clear  forget the conversation")
    terminal.type("The old house\r")
    terminal.skip(2000)  # echo and some of the answer: a Ctrl-C before it would be the prompt's
    terminal.type("\x03")
    terminal.wait_for("[stopped]")
    terminal.wait_for("context")  # the speed of this answer
    terminal.wait_for(">")
    terminal.type("half a line\x03")  # cleared, not the end
    terminal.type("/stats\r")
    terminal.wait_for("tok/s")
    terminal.type("/reset\r")
    terminal.type("/nonsense\r")
    terminal.wait_for("no command /nonsense")
    terminal.type("/exit\r")
    assert terminal.close() == 0
    assert "The old house" in (tmp_path / "fomoe_io" / "history").read_text()


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_nobody_waits_in_the_dark(demo_model: Path, tmp_path: Path) -> None:
    """A drive that is slow: loading and the prompt show how far they are, and what is typed meanwhile stays unseen."""
    terminal = Terminal(
        "-m", "fomoe_io", "run", str(demo_model), "--pace", "16M,4000us", "--slots", "6", "-c", "512", "-n", "3",
        "-s", "3", "--no-profile", "--ignore-eos", "--watch",
        PYTHONPATH=str(ROOT), XDG_STATE_HOME=str(tmp_path), COLUMNS="80",
    )  # fmt: skip
    terminal.wait_for("loading", 60)
    terminal.wait_for(">", 60)
    terminal.type("The old house " + "and " * 60 + "\r")
    terminal.wait_for("prompt:")
    terminal.wait_for("tok/s")
    terminal.type("unseen")
    seen = terminal.wait_for("context", 60)
    assert "unseen" not in seen
    terminal.wait_for("unseen")  # now it is in the next line; a key before that might be the answer's
    terminal.type("\x03")
    terminal.type("\x04")
    assert terminal.close() == 0
