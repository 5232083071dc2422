"""What the session cache is worth: seconds to the first token of a long prompt that is known, and a stream's speed.

    python bench/session_cache.py models/fomoe-demo-32x8.Q4_K_M.gguf [--prefix-tokens 6000] [--rounds 5] [--stream-only]

Three ways to know a prompt (the session has it; another took its place, and memory has it; the server was killed and
the drive has it) against reading it.  Then one stream of fomoe-serve and one answer of fomoe-run in turns, so that both
see the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("the", "river", "house", "night", "stone", "old", "door", "was", "there", "never", "light", "said")


@contextlib.contextmanager
def server(options: argparse.Namespace, folder: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """A running server; killed in the end."""
    command = [
        sys.executable, "-m", "fomoe_io.cli.serve", str(options.model), "--port", "0", "-q", "--temp", "0",
        "--no-profile",
        "-c", str(options.prefix_tokens + 2048), "-t", str(options.threads), "--chat-template", "chatml",
        "--cache-disk", "2G", "--cache-dir", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    url = ""
    while not url:
        line = process.stderr.readline()
        if not line:
            raise SystemExit("the server did not start")
        found = re.search(r"ready: (\S+)", line)
        url = found[1] if found else ""
    try:
        with httpx.Client(base_url=url, timeout=3600, trust_env=False) as client:
            yield client, process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """(seconds to the first token, the last timings)"""
    started, first, timings = time.monotonic(), 0.0, {}
    body = {**body, "ignore_eos": True, "stream": True, "timings_per_token": True}
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                timings = chunk.get("timings") or timings
                first = first or (time.monotonic() if timings.get("predicted_n") else 0.0)
    return first - started, timings


def question(client: httpx.Client, prefix: str, number: int) -> tuple[float, dict[str, Any]]:
    """Another question after a long system text."""
    messages = [{"role": "system", "content": prefix}, {"role": "user", "content": f"Question {number}, what is it?"}]
    return ask(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 8})


def first_tokens(options: argparse.Namespace, folder: Path) -> None:
    """Print the seconds until the first token, by how the prompt is known."""
    prefix, numbers = " ".join(WORDS[i * i % 11] for i in range(options.prefix_tokens)), iter(range(1000))

    def known(client: httpx.Client) -> float:
        seconds, timings = question(client, prefix, next(numbers))
        assert timings["prompt_n"] <= 64, timings
        return seconds

    def report(name: str, found: list[float]) -> None:
        print(f"{name + ':':20} {statistics.median(found):8.3f} s  (worst {max(found):.3f})", flush=True)

    with server(options, folder) as (client, _):
        seconds, timings = question(client, prefix, next(numbers))
        print(f"{'read:':20} {seconds:8.3f} s  ({timings['prompt_n']} tokens)", flush=True)
        report("the same session", [known(client) for _ in range(options.rounds)])
        found = []
        for _ in range(options.rounds):
            ask(client, "/completion", {"prompt": "A helper asks something else.", "n_predict": 4})
            found.append(known(client))
        report("from memory", found)
    found = []
    for _ in range(options.rounds):
        with server(options, folder) as (client, _):
            found.append(known(client))
    report("from the drive", found)


def stream_speed(options: argparse.Namespace, folder: Path) -> None:
    """Print tokens a second of one stream, and of fomoe-run, by the clock of who reads them."""
    prompt, count = "It was a dark and stormy night", 400
    command = [
        sys.executable, "-m", "fomoe_io.cli.run", str(options.model), "-p", prompt, "--raw", "--no-display-prompt",
        "-n", str(count), "--temp", "0", "--ignore-eos", "--no-profile", "-q", "-c", str(options.prefix_tokens + 2048),
        "-t", str(options.threads),
    ]  # fmt: skip
    served, ran = [], []
    with server(options, folder) as (client, process):
        body = {"prompt": prompt, "n_predict": count, "cache_prompt": False, "ignore_eos": True, "stream": True}
        for number in range(2 * options.rounds + 1):
            with client.stream("POST", "/completion", json=body) as response:
                rate = _rate(response.iter_raw(), count)
            process.send_signal(signal.SIGSTOP)  # its threads spin
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as done:
                assert done.stdout is not None
                pair = (rate, _rate(iter(lambda: os.read(done.stdout.fileno(), 1 << 16), b""), count))
            process.send_signal(signal.SIGCONT)
            if number:  # the first warms up
                served.append(pair[0])
                ran.append(pair[1])
    ratio = statistics.median(a / b for a, b in zip(served, ran, strict=True))
    print(f"one stream: {statistics.median(served):.1f} tok/s, fomoe-run: {statistics.median(ran):.1f} tok/s, "
        f"median of the ratios: {ratio:.3f}")  # fmt: skip


def _rate(pieces: Iterable[bytes], count: int) -> float:
    """Tokens a second between the first piece and the last."""
    times = [time.monotonic() for _ in pieces]
    return (count - 1) / (times[-1] - times[0])


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prefix-tokens", type=int, default=6000)
    parser.add_argument("--stream-only", action="store_true", help="leave the first tokens out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.stream_only:
            first_tokens(options, Path(folder))
        stream_speed(options, Path(folder))


if __name__ == "__main__":
    main()
