"""What all commands share: options of the engine, and how errors reach a user."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fomoe_io.commands import open_streams
from fomoe_io.config import EngineConfig, Tiers, device_name
from fomoe_io.errors import FomoeError, UsageError, printable
from fomoe_io.experts.car import CarRule
from fomoe_io.storage.pace import Pace
from fomoe_io.trace.trace import check_trace_target
from fomoe_io.units import parse_bytes

MODEL_VARIABLE = "FOMOE_MODEL"


def run_command(program: str, main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake becomes one line on stderr and exit code 1, Ctrl-C 130, SIGTERM 143."""
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


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("fomoe_io")
    except PackageNotFoundError:
        return "unknown (not installed)"


def checked(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A parser whose UsageError argparse shows as its own message."""

    def convert(text: str) -> object:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error).replace("\n  fix:", "; try")) from None

    return convert


def valid_text(text: str) -> str:
    """Of an argument or a terminal: bytes that are not UTF-8 come as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def decoded(data: bytes) -> str:
    """Of a file or a pipe: UTF-8 whatever the locale, what is not becomes U+FFFD, and line ends stay as they are."""
    return data.decode("utf-8", "replace")


class _Parser(argparse.ArgumentParser):
    """Escapes what is not printable in the arguments that its messages repeat."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message("\n".join(printable(line) for line in message.split("\n")), file)


def new_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with --version."""
    parser = _Parser(prog=program, description=description)
    parser.add_argument("--version", action="version", version=f"{program} {package_version()}")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model argument."""
    parser.add_argument(
        "model", nargs="?", help=f"store directory or GGUF file (default: ${MODEL_VARIABLE})", metavar="MODEL"
    )
    parser.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same, as an option")


def model_path(options: argparse.Namespace) -> Path:
    """The model that was named.

    Raises
    ------
    UsageError
        None was, or two.
    """
    if options.model and options.model_option:
        raise UsageError(f"two models were named: {options.model} and {options.model_option}")
    name = options.model or options.model_option or os.environ.get(MODEL_VARIABLE)
    if not name:
        raise UsageError("no model was named", hint=f"a store or GGUF as the argument, or {MODEL_VARIABLE}=PATH")
    return Path(name)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of :class:`EngineConfig`."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--ram", type=checked(parse_bytes), metavar="SIZE", help="bound of the whole process, such as 16G"
    )
    group.add_argument(
        "--slots", type=int, metavar="N", help="experts of each layer in memory (default: all that --ram has room for)"
    )
    group.add_argument("-t", "--threads", type=int, metavar="N", help="default: all processors of this process")
    group.add_argument("-c", "--ctx-size", type=int, metavar="N", help="context (default: the model's, at most 4096)")
    group.add_argument("-b", "--batch-size", type=int, default=512, metavar="N", help="prompt tokens at once")
    group.add_argument(
        "--device",
        type=checked(device_name),
        default="auto",
        metavar="NAME",
        help="auto (a GPU if there is one), cpu, hip, cuda, or one by number, such as hip:1 (fomoe-doctor lists them)",
    )
    group.add_argument(
        "--vram", type=checked(parse_bytes), metavar="SIZE", help="bound of device memory (default: what is free)"
    )
    group.add_argument("--reader", choices=("auto", "uring", "pread"), default="auto")
    group.add_argument(
        "--pace", type=checked(Pace.parse), metavar="RATE,LATENCY",
        help="read no faster than such a drive, for measurements: 14.5G,80us",
    )  # fmt: skip
    group.add_argument("--calibration", metavar="FILE", help="how to read: from fomoe-bench io --calibrate FILE")
    group.add_argument("--kernels", choices=("auto", "ggml", "portable"), default="auto")
    group.add_argument(
        "--policy", choices=("decayed", "lru", "lfu", "lfru"), default="decayed", help="who leaves memory"
    )
    group.add_argument(
        "--tiers",
        type=checked(Tiers.parse),
        metavar="SPEC",
        help="most experts in VRAM and DRAM (simulated on a CPU), such as vram=20%%,dram=15%%",
    )
    group.add_argument(
        "--lookahead", type=int, default=0, metavar="N",
        help="read up to N experts of the next layer ahead, by its router's guess (the text stays the same)",
    )  # fmt: skip
    group.add_argument(
        "--car", type=checked(CarRule.parse), metavar="RULE",
        help="let resident experts stand in for missing ones, which is not exact: "
        "off (default), on, ratio:TAU, prior:LAMBDA, regret:RHO or budget:RHO",
    )  # fmt: skip
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the routing of every token, for fomoe-bench cache"
    )


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The configuration that the options ask for.

    Raises
    ------
    UsageError, OSError
        They do not go together, or no trace can be written where it should go.
    """
    if options.trace is not None:
        check_trace_target(options.trace)
    return EngineConfig(
        ram_bytes=options.ram,
        slots=options.slots,
        threads=options.threads,
        context_tokens=options.ctx_size,
        batch_tokens=options.batch_size,
        reader=options.reader,
        calibration=options.calibration,
        pace=options.pace,
        kernels=options.kernels,
        policy=options.policy,
        tiers=options.tiers,
        lookahead=options.lookahead,
        car=options.car,
        trace=options.trace,
        device=options.device,
        vram_bytes=options.vram,
    )
