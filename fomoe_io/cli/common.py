"""What all commands share: how errors and signals reach a user, and how text comes in."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fomoe_io.commands import heed_interrupts, open_streams
from fomoe_io.errors import FomoeError, printable


def run_command(program: str, main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake becomes one line on stderr and exit code 1, Ctrl-C 130, SIGTERM 143."""
    heed_interrupts()
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the locale lacks a character, as a model may write any
    with ending_signals():
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except FomoeError as error:
            print(f"{program}: {error}", file=sys.stderr)
        except BrokenPipeError:  # the reader of stdout has left, as `head` does
            _drop_output()
            return 0
        except MemoryError:
            print(f"{program}: out of memory\n  fix: a smaller --ram, -c or -b", file=sys.stderr)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            note(f"{program}: {where}{error.strerror or error}")
            _drop_output()
        except Terminated as ended:
            return 128 + ended.signal
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
    return 1


def note(text: str) -> None:
    """A line on stderr, with what is not printable escaped."""
    print(printable(text), file=sys.stderr)


def _drop_output() -> None:
    """Where stdout takes nothing more, the interpreter must not try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: ends whatever Ctrl-C ends, and what it only stops, with the same cleaning up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise :class:`Terminated` in the main thread, once: a second one ends the process at once."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def decoded(data: bytes) -> str:
    """Of a file or a pipe: UTF-8 whatever the locale, what is not becomes U+FFFD, and line ends stay as they are."""
    return data.decode("utf-8", "replace")
