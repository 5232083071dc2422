"""fomoe-bench io beside its peers on the same file: interleaved runs, median of the ratios.

    python bench/io_compare.py --filename DATA --peers fio,python-liburing,mmap -o RESULTS
    python bench/io_compare.py --store STORE -o RESULTS         records of a store beside fio's best for their size

Writes RESULTS.json (every run) and RESULTS.md (the table).  Runs of the two sides alternate, and which of them goes
first alternates too, because a drive that is shared drifts by the minute.  fio gets io_uring, registered files and
registered buffers; peer fio-huge also gets buffers in huge pages, as ours are (sysctl vm.nr_hugepages=160 first).
The page cache is dropped for the file before each run through it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fomoe_io.storage.store import Store
from fomoe_io.system.system_card import format_card, system_card

SIZES = {"4k": 4 << 10, "128k": 128 << 10, "1M": 1 << 20, "4M": 4 << 20}
DEPTHS = (1, 8, 32)
FIO_MEMORY = {"fio": "malloc", "fio-huge": "mmaphuge"}
ENGINES_OF_OURS = ("python-liburing", "mmap", "pread", "uring")


@dataclass(frozen=True)
class Run:
    """One measurement: MB/s (10^6) and processor time for a read, us."""

    rate: float
    cpu: float


@dataclass(frozen=True)
class Comparison:
    """Runs of one case."""

    case: str
    peer: str
    ours: list[Run]
    theirs: list[Run]

    def ratios(self, name: str) -> list[float]:
        """Ours / theirs, pair by pair, of `rate` or `cpu`."""
        return [getattr(a, name) / getattr(b, name) for a, b in zip(self.ours, self.theirs, strict=True)]

    def row(self) -> str:
        """A line of the table."""
        middle = [statistics.median(getattr(run, name) for run in runs)
                  for name in ("rate", "cpu") for runs in (self.ours, self.theirs)]  # fmt: skip
        rates, costs = self.ratios("rate"), self.ratios("cpu")
        return (
            f"| {self.case} | {middle[0]:,.0f} | {middle[1]:,.0f} "
            f"| **{statistics.median(rates):.2f}** ({min(rates):.2f}-{max(rates):.2f}) "
            f"| {middle[2]:.1f} | {middle[3]:.1f} "
            f"| **{statistics.median(costs):.2f}** ({min(costs):.2f}-{max(costs):.2f}) |"
        )


def ours(seconds: float, *options: str) -> Run:
    """One run of fomoe-bench io.

    Places are drawn anew for each run, as fio's are (randrepeat=0): a host may remember those of the run before.
    """
    command = [sys.executable, "-m", "fomoe_io.cli.bench", "io", "--output-format=json", "--eta=never",
               f"--runtime={seconds}s", "--time_based", f"--randseed={random.randrange(1 << 31)}",
               *options]  # fmt: skip
    job = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["jobs"][0]
    return Run(job["read"]["bw_bytes"] / 1e6, job["fomoe"]["cpu_us_per_read"])


def fio(seconds: float, path: Path, block: int, depth: int, memory: str = "malloc") -> Run:
    """One run of fio."""
    command = ["fio", "--name=job", "--readonly", "--rw=randread", "--ioengine=io_uring", "--direct=1", "--fixedbufs=1",
               "--registerfiles=1", "--time_based", f"--runtime={seconds}s", f"--filename={path}", f"--bs={block}",
               f"--iodepth={depth}",
               "--randrepeat=0", "--output-format=json", f"--mem={memory}"]  # fmt: skip
    job = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["jobs"][0]
    read = job["read"]
    busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * read["runtime"] * 1000
    return Run(read["bw_bytes"] / 1e6, busy / read["total_ios"])


def drop_cache(path: Path) -> None:
    """Forget the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def compare(case: str, peer: str, pairs: int, mine: Callable[[], Run], other: Callable[[], Run]) -> Comparison:
    """Alternate."""
    result = Comparison(case, peer, [], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            (result.ours, result.theirs)[side].append((mine, other)[side]())
    print(result.row(), file=sys.stderr, flush=True)
    return result


def of_file(
    path: Path, peers: list[str], pairs: int, seconds: float, sizes: list[str], depths: list[int]
) -> list[Comparison]:
    """Every size and depth beside every peer."""
    found = []
    for peer, (size, depth) in itertools.product(peers, itertools.product(sizes, depths)):
        options = (f"--filename={path}", f"--bs={size}", f"--iodepth={depth}")

        def other(peer: str = peer, options: tuple[str, ...] = options, size: str = size, depth: int = depth) -> Run:
            if peer.startswith("fio"):
                return fio(seconds, path, SIZES[size], depth, FIO_MEMORY[peer])
            drop_cache(path)
            return ours(seconds, *options, f"--engine={peer}")

        def mine(options: tuple[str, ...] = options) -> Run:
            return ours(seconds, *options, "--engine=uring")

        found.append(compare(f"{size} x {depth}", peer, pairs, mine, other))
    return found


def of_store(path: Path, trace: Path | None, peers: list[str], pairs: int, seconds: float) -> list[Comparison]:
    """Records of a store, beside random reads of their size anywhere in the largest data file."""
    store = Store.open(path)
    data = max(store.paths, key=lambda file: file.stat().st_size)
    size = max(layer.record_bytes for layer in store.experts.values())
    options = [f"--store={path}", *([f"--trace={trace}"] if trace else [])]
    return [
        compare(
            f"records of {size / 2**20:.2f} MiB x {depth}",
            peer,
            pairs,
            lambda depth=depth: ours(seconds, *options, f"--iodepth={depth}", "--engine=uring"),  # type: ignore[misc]
            lambda depth=depth, peer=peer: fio(seconds, data, size, depth, FIO_MEMORY[peer]),  # type: ignore[misc]
        )
        for peer in peers
        for depth in (8, 32)
    ]


def table(found: list[Comparison]) -> str:
    """Markdown, a table for each peer."""
    lines = []
    for peer, group in itertools.groupby(found, lambda comparison: comparison.peer):
        lines += [
            "",
            f"Beside {peer} (median of {len(found[0].ours)} interleaved pairs; range in parentheses):",
            "",
            f"| size x depth | uring, MB/s | {peer}, MB/s | ratio | uring, CPU us/read | {peer} | CPU ratio |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(comparison.row() for comparison in group),
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--filename", type=Path)
    what.add_argument("--store", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--peers", default="fio", help="fio, fio-huge, " + ", ".join(ENGINES_OF_OURS))
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("-o", "--output", type=Path, required=True, help="without a suffix")
    options = parser.parse_args()
    before = system_card([options.filename or options.store])
    if options.store:
        found = of_store(options.store, options.trace, options.peers.split(","), options.pairs, options.seconds)
    else:
        depths = [int(depth) for depth in options.depths.split(",")]
        found = of_file(
            options.filename, options.peers.split(","), options.pairs, options.seconds, options.sizes.split(","), depths
        )
    after = os.getloadavg()
    values = {
        "system": before,
        "load_average_after": after,
        "comparisons": [asdict(comparison) for comparison in found],
    }
    options.output.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    head = [*format_card(before), f"load before {before['load_average'][0]:.2f}, after {after[0]:.2f}"]
    options.output.with_suffix(".md").write_text("\n".join(head) + "\n" + table(found) + "\n")


if __name__ == "__main__":
    main()
