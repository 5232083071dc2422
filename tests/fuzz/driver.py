"""Runs inputs of one kind one after another, in a process of its own, which may die: the parent goes on behind it.

Again what a test has found::

    python -m tests.fuzz.driver gguf 1234 1

"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LIMIT_SECONDS = 30
"""Of one input, under a sanitizer on a busy machine; the slowest that is right takes 2."""
LIMIT_BYTES, MOST_BYTES = 2 << 30, 12 << 30
"""By which one input may let the process grow; address space of the process."""
SANITIZED = bool(os.environ.get("LD_PRELOAD"))
HANG, CRASH = "hang", "crash"


@dataclass
class Findings:
    """What has become of many inputs.

    Attributes
    ----------
    outcomes : Counter
        How many "ran", were "refused", or are a "fault".
    faults : dict of str to list of int
        What was wrong -> seeds.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)

    def add(self, seed: int, outcome: str, detail: str = "") -> None:
        """Of one input."""
        self.outcomes[outcome] += 1
        if outcome == "fault":
            self.faults.setdefault(detail, []).append(seed)

    def __str__(self) -> str:
        lines = [", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items())]
        for detail, seeds in sorted(self.faults.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(seeds)} x, seeds {', '.join(map(str, seeds[:4]))}: {detail}")
        return "\n".join(lines)


# ---- the child ----


def judge(run: object, seed: int, kind: str) -> tuple[str, str]:
    """Give a target one input: (outcome, what is wrong)."""
    from fomoe_io.errors import FomoeError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(random.Random(f"{kind} {seed}"), seed)  # type: ignore[operator]
        result = ("ran", "")
    except FomoeError as error:
        result = _refused(error)
    except Exception as error:
        result = ("fault", _place(error))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return ("fault", f"took {grown >> 20} MiB") if grown > LIMIT_BYTES else result


def _refused(error: Exception) -> tuple[str, str]:
    """As a command shows it: one line and perhaps a fix, and nothing that moves a terminal's cursor."""
    from fomoe_io.cli.common import run_command

    def main(_: object) -> int:
        raise error

    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        assert run_command("fuzz", main) == 1
    lines = shown.getvalue().removesuffix("\n").split("\n")
    if len(lines) > 2 or not all(line.isprintable() for line in lines):
        return "fault", f"a message that is not one printable line: {type(error).__name__} at {_place(error)}"
    return "refused", lines[0]


def _place(error: BaseException) -> str:
    """The innermost frame of ours and the exception."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "fomoe_io" in f.filename or "layout_tool" in f.filename] or frames
    name = ours[-1].filename.rsplit("/lib/")[-1].removeprefix(f"{Path.cwd()}/")
    return f"{name}:{ours[-1].lineno} {type(error).__name__}: {str(error)[:80]!r}"


def _check_copy() -> None:
    """Or the sanitizer sees nothing."""
    import fomoe_io

    copy = os.environ.get("FOMOE_UNDER_TEST")
    assert copy is None or Path(fomoe_io.__file__).is_relative_to(copy), f"{fomoe_io.__file__} is not in {copy}"


def _guard_memory() -> None:
    """The engine's anonymous maps, whose neighbours a sanitizer knows nothing of, become blocks of the sanitizer's."""
    from fomoe_io.storage.reader import Memory

    libc = ctypes.CDLL(None)

    def aligned_memory(size: int, *, huge_pages: bool = True) -> Memory:
        pointer = ctypes.c_void_p()
        if libc.posix_memalign(ctypes.byref(pointer), ctypes.c_size_t(4096), ctypes.c_size_t(size)):
            raise MemoryError
        assert pointer.value is not None
        block = (ctypes.c_char * size).from_address(pointer.value)
        block.owner = weakref.finalize(block, libc.free, pointer)  # type: ignore[attr-defined]
        ctypes.memset(pointer, 0, size)
        return Memory(pointer.value, memoryview(block).cast("B"), block)  # type: ignore[arg-type]

    users = [m for name, m in sys.modules.items() if name.startswith("fomoe_io.") and hasattr(m, "aligned_memory")]
    assert {"fomoe_io.cpu.backend", "fomoe_io.cpu.weights"} <= {module.__name__ for module in users}
    for module in users:
        module.aligned_memory = aligned_memory  # type: ignore[attr-defined]


def main(kind: str, first: int, count: int) -> None:
    """The child: a line of JSON for each input that begins and one when it is done."""
    from tests.fuzz.targets import TARGETS

    _check_copy()
    if SANITIZED:
        _guard_memory()
    warnings.simplefilter("error")  # of numpy's, which a user would see
    if not SANITIZED:  # its shadow takes terabytes; it has limits of its own (tools/sanitize)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        run = TARGETS[kind](Path(folder))
        for seed in range(first, first + count):
            print(json.dumps({"begin": seed}), flush=True)
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
            started = time.monotonic()
            outcome, detail = judge(run, seed, kind)
            faulthandler.cancel_dump_traceback_later()
            taken = round(time.monotonic() - started, 2)
            print(json.dumps({"seed": seed, "outcome": outcome, "detail": detail, "seconds": taken}), flush=True)


# ---- the parent ----


def explore(kind: str, first: int, count: int) -> Findings:
    """Inputs first .. first + count, whatever happens to the processes that run them."""
    findings, end = Findings(), first + count
    while first < end:
        command = [sys.executable, "-m", "tests.fuzz.driver", kind, str(first), str(end - first)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=_environment())
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for row in rows:
            if "seed" in row:
                findings.add(row["seed"], row["outcome"], row["detail"])
        begun = [row["begin"] for row in rows if "begin" in row]
        if not begun:
            raise AssertionError(f"the driver of {kind} does not start:\n{done.stderr[-4000:]}")
        finished = {row["seed"] for row in rows if "seed" in row}
        if done.returncode or begun[-1] not in finished:
            findings.add(begun[-1], "fault", _died(done))
        elif "runtime error:" in done.stderr or "Sanitizer" in done.stderr:
            raise AssertionError(f"a sanitizer complains:\n{done.stderr[-4000:]}")
        first = begun[-1] + 1
    return findings


def _environment() -> dict[str, str]:
    """A sanitizer's report goes to stderr, not to a file: it is read here."""
    options = {name: re.sub(r"log_path=[^:]*:?", "", value) for name, value in os.environ.items() if "SAN_OPT" in name}
    return {**os.environ, **options}


def _died(done: subprocess.CompletedProcess[str]) -> str:
    """A hang by where it was, a crash by what the sanitizer or the signal says."""
    lines = done.stderr.splitlines()
    if any(line.startswith("Timeout (") for line in lines):
        places = [line.strip() for line in lines if "fomoe_io" in line or "layout_tool" in line][:1]
        return f"{HANG}: {places[0] if places else lines[-1]}"
    words = [line for line in lines if "runtime error:" in line or "ERROR: " in line or line.startswith("SUMMARY")]
    frames = [line.strip() for line in lines if line.lstrip().startswith("#") and "fomoe_io" in line][:2]
    return f"{CRASH}: exit {done.returncode} {' | '.join(words[:2] + frames) or ' '.join(lines[-3:])}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
