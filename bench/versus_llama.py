"""Decode speed side by side with llama.cpp, in turns on the same machine and file.

Everything resident:        python bench/versus_llama.py MODEL.gguf --llama-bench PATH
Larger than memory (root):  python bench/versus_llama.py MODEL.gguf --llama-bench PATH --limit 2G

Without --limit llama.cpp runs with and without weight repacking and the faster counts.  With --limit both run in a
memory control group (v1) of that size with a cold page cache; llama.cpp streams by mmap (--repack 0, which it needs
there), our --ram is the limit less 64 MiB for what the kernel charges to the group.  For a fair comparison the file
should lie on a device with the stock readahead of 128 KiB; the script prints what it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fomoe_io.units import format_bytes, parse_bytes

GROUP = Path("/sys/fs/cgroup/memory/fomoe_bench")
KERNEL_SHARE_BYTES = 64 << 20


def drop_cache(path: Path) -> None:
    """Evict the file's pages: pages that another group has faulted in would be free hits."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limited(limit: int | None) -> Callable[[], None] | None:
    """A preexec function that puts the child into a memory control group."""
    if limit is None:
        return None
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(limit))
    (GROUP / "memory.swappiness").write_text("0")
    return lambda: (GROUP / "cgroup.procs").write_text(str(os.getpid())) and None


def run(command: list[str], limit: int | None) -> str:
    """Standard output of a command, with its error when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited(limit))
    if result.returncode:
        raise SystemExit(f"{command[0]} failed ({result.returncode}): {result.stderr[-500:]}")
    return result.stdout


def llama(options: argparse.Namespace, repack: int, limit: int | None) -> float:
    """llama-bench's tokens per second."""
    command = [
        options.llama_bench, "-m", str(options.model), "-t", str(options.threads), "-p", "0", "-n", str(options.tokens),
        "-r", "1", "--repack", str(repack), "-o", "json",
    ]  # fmt: skip
    if limit is not None:
        command.append("--no-warmup")
    return float(json.loads(run(command, limit))[0]["avg_ts"])


def ours(options: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """One round of bench/decode.py."""
    command = [
        sys.executable, str(Path(__file__).with_name("decode.py")), str(options.store or options.model),
        "--tokens", str(options.tokens), "--rounds", "1", "--threads", str(options.threads),
        "--warmup", "0" if limit is not None else "8",
    ]  # fmt: skip
    if limit is not None:
        command += ["--ram", str(limit - KERNEL_SHARE_BYTES)]
    result: dict[str, Any] = json.loads(run(command, limit))
    return result


def readahead_kib(path: Path) -> str:
    """Readahead of the device that a file is on."""
    device = path.stat().st_dev
    file = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    return file.read_text().strip() if file.exists() else "unknown"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--store", type=Path, help="packed store of the same model for our side")
    parser.add_argument("--llama-bench", required=True, metavar="PATH")
    parser.add_argument("--limit", type=parse_bytes, metavar="SIZE")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(
        f"{options.model.name}, {format_bytes(options.model.stat().st_size)}; load {os.getloadavg()[0]:.2f}; readahead "
        f"{readahead_kib(options.model)} KiB; limit {format_bytes(options.limit) if options.limit else 'none'}"
    )
    theirs: dict[int, list[float]] = {0: []} if options.limit else {0: [], 1: []}
    mine, last = [], {}
    print("| round | " + " | ".join(f"llama.cpp repack {r}" for r in theirs) + " | fomoe_io | ratio to the faster |")
    print("|---|" + "---|" * (len(theirs) + 2))
    for i in range(options.rounds):
        for repack, speeds in theirs.items():
            if options.limit:
                drop_cache(options.model)
            speeds.append(llama(options, repack, options.limit))
        if options.limit:
            drop_cache(options.model)
        last = ours(options, options.limit)
        mine.append(last["tokens_per_second"][0])
        best = max(speeds[-1] for speeds in theirs.values())
        cells = [f"{speeds[-1]:.2f}" for speeds in theirs.values()] + [f"{mine[-1]:.2f}", f"{mine[-1] / best:.2f}"]
        print(f"| {i + 1} | " + " | ".join(cells) + " |", flush=True)
    best = max(statistics.median(speeds) for speeds in theirs.values())
    median = statistics.median(mine)
    print(f"median: llama.cpp {best:.2f}, fomoe_io {median:.2f}, ratio {median / best:.2f}")
    s = last["statistics"]
    print(
        f"ours: {s['tiers']['nvme']['reads']} records read, {format_bytes(s['nvme_bytes_per_token'])} a token, "
        f"peak {format_bytes(s['peak_rss_bytes'])}, slots {s['budgets']['slots_per_layer']}"
    )


if __name__ == "__main__":
    main()
