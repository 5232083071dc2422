"""Run tests again and again while the processors are busy: what waits for a thread that does not come, hangs.

    python tools/stress.py -n 20 [--load 4] [--seconds 300] TEST...

Twice as many busy processes as there are processors (`--load`), started and ended with each run and stopped now and
then, so that threads lose their processor in the middle of anything.  Ends with 1 and the log of a run that fails or
hangs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Process


def _spin() -> None:
    while True:
        pass


@contextmanager
def load(count: int) -> Iterator[list[Process]]:
    """So many processes that do nothing but compute; daemons, and gone at the end whatever happens."""
    processes = [Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_once(tests: list[str], limit_seconds: float, busy: list[Process], pauses: random.Random) -> str:
    """Run pytest; "" when it passes in time, else its log."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        deadline = time.monotonic() + limit_seconds
        while running.poll() is None and time.monotonic() < deadline:
            # a processor that is suddenly free, and suddenly taken
            process = pauses.choice(busy)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(pauses.uniform(0, 0.2))
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(pauses.uniform(0, 0.2))
        is_hanging = running.poll() is None
        if is_hanging:
            running.kill()
        assert running.stdout is not None
        log = running.stdout.read()
    if is_hanging:
        return f"{log}\nno end within {limit_seconds:g} s"
    return f"{log}\npytest ended with {running.returncode}" if running.returncode else ""


def main() -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", type=int, default=20, help="runs (default 20)")
    parser.add_argument("--load", type=int, help="busy processes (default: twice the processors)")
    parser.add_argument("--seconds", type=float, default=600, help="limit of a run (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the pauses")
    parser.add_argument("tests", nargs="+", metavar="TEST", help="files or other arguments of pytest")
    options = parser.parse_args()
    busy, pauses = options.load or 2 * len(os.sched_getaffinity(0)), random.Random(options.seed)
    for number in range(1, options.n + 1):
        started = time.monotonic()
        with load(busy) as processes:
            log = run_once(options.tests, options.seconds, processes, pauses)
        if log:
            print(f"{log}\nrun {number} of {options.n} failed")
            return 1
        print(
            f"run {number} of {options.n}: passed in {time.monotonic() - started:.0f} s beside {busy} busy processes",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
