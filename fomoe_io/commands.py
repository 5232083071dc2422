"""Entry points of the commands.  Nothing heavy is imported before Ctrl-C is looked after."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module


def open_streams() -> None:
    """Make streams that the caller closed (`2>&-`) /dev/null: else the next file that is opened gets their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def _leave(number: int, frame: object) -> None:
    """While modules load there is nothing to clean up, and an exception might come out of one as another."""
    os._exit(128 + number)


def leave_while_loading() -> None:
    """Where `python -m` is finding a command's module, Ctrl-C ends it as it ends the command."""
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def heed_interrupts() -> None:
    """Everything is loaded: Ctrl-C is Python's again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _start(module: str) -> int:
    open_streams()
    # a shell's background jobs do not
    heeds = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _leave)
    if heeds:
        signal.signal(signal.SIGINT, _leave)
    main = import_module(module).main
    try:
        if heeds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return int(main())
    except KeyboardInterrupt:  # before the command caught it, or after
        return 130
    finally:
        if heeds:  # the interpreter's own end has nothing to clean up either
            signal.signal(signal.SIGINT, _leave)


def run() -> int:
    """fomoe-run"""
    return _start("fomoe_io.cli.run")


def serve() -> int:
    """fomoe-serve"""
    return _start("fomoe_io.cli.serve")


def ppl() -> int:
    """fomoe-ppl"""
    return _start("fomoe_io.cli.ppl")


def bench() -> int:
    """fomoe-bench"""
    return _start("fomoe_io.cli.bench")


def doctor() -> int:
    """fomoe-doctor"""
    return _start("fomoe_io.cli.doctor")


def layout() -> int:
    """fomoe-layout"""
    return _start("layout_tool.main")


def top() -> int:
    """fomoe-top"""
    return _start("fomoe_io.cli.top")


VERBS = {
    "run": ("fomoe_io.cli.run", "answer a prompt, or talk"),
    "serve": ("fomoe_io.cli.serve", "answer over HTTP, as llama-server does"),
    "layout": ("layout_tool.main", "write a model so that each expert is read in one request"),
    "plan": ("layout_tool.main", "will it fit, how fast, also before the download; what layout pack would write"),
    "ppl": ("fomoe_io.cli.ppl", "perplexity of a text"),
    "bench": ("fomoe_io.cli.bench", "speed of a model, of drives, of caching policies"),
    "doctor": ("fomoe_io.cli.doctor", "what of this machine helps or hinders"),
    "top": ("fomoe_io.cli.top", "watch a server at work"),
    "shell": ("fomoe_io.cli.shell", "completion scripts and man pages"),
}
"""Of `fomoe VERB`: the module, and what it does."""


def fomoe() -> int:
    """fomoe: one command over all; `fomoe run` is fomoe-run."""
    open_streams()
    verb, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if verb in VERBS:
        sys.argv = [f"fomoe-{verb}", *(["plan"] if verb == "plan" else []), *rest]
        return _start(VERBS[verb][0])
    if verb == "--version":
        sys.argv = ["fomoe-run", "--version"]
        return _start("fomoe_io.cli.run")
    lines = ["usage: fomoe VERB ...   (fomoe VERB --help says more)", ""]
    lines += [f"  {name:8}{about}" for name, (_, about) in VERBS.items()]
    if verb in ("-h", "--help", "help"):
        print("\n".join(lines))
        return 0
    print("\n".join([f"fomoe: {verb!r} is no verb" if verb else "fomoe: no verb", *lines]), file=sys.stderr)
    return 2
