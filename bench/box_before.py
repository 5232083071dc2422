"""The emulated box beside a commit from before it: what was gained, where the old tree's reader knows no pace.

    git worktree add --detach ../old 38c609c && (cd ../old && make native)
    python bench/make_model.py --preset 397b-a17b --layers 8 --recall 0.85 -o /dev/shm/model.gguf
    python bench/box_before.py /dev/shm/model.gguf --baseline ../old --device cuda:0

Both trees read with what both have: pread threads on tmpfs, `--depth` of them, each a sub-read of `--piece` at a time.
4 of 1 MiB came to 14.2 to 15.8 GB/s where the box was first measured; on another machine, choose what comes to the
drive's rate there (`drive_gb_s` of each run).  This tree runs at box.py's pace besides ("this, paced").  All runs take
turns, each in a process of its own under box.py's share of the card, and decode the same random tokens.

Prints one JSON object: the fastest round of each run, with the rate that a reader like its engine's had for the same
records and what that makes of its NVMe bytes (`drive_ms`), and how much faster than the baseline it is (`speedup`; of
"this, paced" with another drive than the baseline's).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from box import SlowCard, in_checkout, report

from fomoe_io.errors import FomoeError
from fomoe_io.experts.car import CarRule
from fomoe_io.storage.calibration import Calibration, Point
from fomoe_io.units import parse_bytes

THIS = Path(__file__).resolve().parent.parent
Runs = dict[str, tuple[Path, dict[str, Any]]]
"""By name: a checkout, and fields of its EngineConfig."""


def sub_reads(piece: int, depth: int) -> Calibration:
    """By which engines of all commits cut their reads into such pieces: a file is the only way to tell them.

    Rates of no drive, that grow with the depth: so cutting pays.
    """
    points = tuple(Point(piece, reads, 1e9 * reads, 1.0, 1.0, 1.0) for reads in sorted({1, depth}))
    return Calibration(points, "pread", True, {})


def runs_of(options: argparse.Namespace, calibration: Path) -> Runs:
    """The baseline, this tree with its reader, and this tree at its pace."""
    this = {"device": options.device, "reader": "pread"}
    same = this | {"calibration": str(calibration), "ring_depth": options.depth}
    # it may know devices by their kind alone
    runs = {"baseline": (options.baseline, same | {"device": options.device.partition(":")[0], "lookahead": 0})}
    for name, fields in {"this": same, "this, paced": this | {"pace": options.pace}}.items():
        runs[name] = (THIS, fields | {"lookahead": 0})
        runs[f"{name}, lookahead auto"] = (THIS, fields | {"lookahead": "auto"})
    return runs


def in_turns(options: argparse.Namespace, runs: Runs, card: SlowCard) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What any_commit.py found, by rule, run and round."""
    asked = {name: getattr(options, name) for name in ("model", "tokens", "warmup", "tiers")}
    # not "on": what it means is a commit's own
    rules = {"exact": "off", f"car {options.car}": str(CarRule.parse(options.car) or "off")}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {rule: {name: [] for name in runs} for rule in rules}
    for _ in range(options.rounds):
        for rule, car in rules.items():
            for name, (folder, fields) in runs.items():
                arguments = json.dumps(asked | fields | {"car": car})
                one = in_checkout(folder, card.environment, ["any_commit.py", arguments])
                print(f"{rule}, {name}: {one['token_ms']:.2f} ms a token", file=sys.stderr, flush=True)
                found[rule][name].append(one)
    return found


def compared(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The fastest round of each run, and how much faster than the baseline's it is."""
    runs = {}
    for name, found in rounds.items():
        runs[name] = min(found, key=lambda one: one["token_ms"])
        runs[name]["rounds_ms"] = [one["token_ms"] for one in found]
    before = runs["baseline"]["token_ms"]
    speedup = {name: before / run["token_ms"] for name, run in runs.items() if name != "baseline"}
    return {"runs": runs, "speedup": speedup}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--baseline", type=lambda text: Path(text).resolve(), required=True,
        help="a checkout of 38c609c or later, built")  # fmt: skip
    # not "auto": this tree may take several
    parser.add_argument("--device", default="cuda:0", help="the baseline takes its kind (default: %(default)s)")
    parser.add_argument("--tiers", default="vram=10%,dram=7%")
    parser.add_argument("--car", default="on", help="the rule of the second runs, as this tree means it")
    parser.add_argument("--depth", type=int, default=4, help="reads in flight (default: %(default)s)")
    parser.add_argument("--piece", type=parse_bytes, default=1 << 20, help="of a sub-read (default: 1M)")
    parser.add_argument("--pace", default="14.5G,80us", help='of "this, paced" (default: %(default)s)')
    parser.add_argument("--percentage", type=int, default=5, help="of the multiprocessors (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {name: getattr(options, name) for name in ("tiers", "depth", "piece", "pace")}
    card = SlowCard(options.percentage)
    try:
        with tempfile.TemporaryDirectory(prefix="fomoe-") as folder:
            calibration = Path(folder) / "calibration.json"
            sub_reads(options.piece, options.depth).save(calibration)
            found = in_turns(options, runs_of(options, calibration), card)
    except FomoeError as error:
        raise SystemExit(f"box_before: {error}") from None
    finally:
        card.close()
    result |= {"card": card.note} | {rule: compared(rounds) for rule, rounds in found.items()}
    report(result, options.output)


if __name__ == "__main__":
    main()
