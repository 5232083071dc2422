"""fomoe-bench cache: what a policy and an amount of memory would have done with a routing trace."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fomoe_io.cli.common import run_command
from fomoe_io.cli.parser import Parser, checked, new_parser
from fomoe_io.config import Tiers
from fomoe_io.errors import UsageError, printable
from fomoe_io.experts.residency import DECAY, Decay
from fomoe_io.stats import write_json
from fomoe_io.system.files import check_targets
from fomoe_io.trace.cache_report import (
    BOUND,
    EVERY_POLICY,
    STATIC,
    Row,
    check_policies,
    plot,
    size_table,
    sweep,
    tier_table,
)
from fomoe_io.trace.importers import open_trace
from fomoe_io.trace.simulator import single_tokens
from fomoe_io.trace.trace import Trace

PROGRAM = "fomoe-bench cache"
SIZES = "10%,15%,20%,25%,30%,35%,40%,50%,60%"


def parse_sizes(text: str) -> list[float]:
    """Shares from `5%,17.5%`.

    Raises
    ------
    UsageError
    """
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*", word)
        if match is None or not 0 < float(match[1]) <= 100:
            raise UsageError(f"{word.strip()!r} is no share of the experts", hint=f"--sizes {SIZES}")
        sizes.append(float(match[1]) / 100)
    return sizes


def parse_decay(text: str) -> Decay:
    """From `SLOW,FAST,SHARE`.

    Raises
    ------
    UsageError
    """
    try:
        return Decay(*(float(word) for word in text.split(",")))
    except (ValueError, TypeError):
        raise UsageError(f"{text!r} is no decay", hint="--decay " + ",".join(str(value) for value in DECAY)) from None


def parser() -> Parser:
    """The command line."""
    p = new_parser(PROGRAM, "Replay routing traces with any policy and size, through the engine's own bookkeeping.")
    p.add_argument(
        "traces", nargs="+", type=Path, metavar="TRACE", help="file of --trace, or a BigMoeOnEdge route.csv[.xz]"
    )
    p.add_argument(
        "--policy", metavar="LIST", help=f"of {','.join(EVERY_POLICY)} (default: all, {STATIC} only with --tiers)"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--sizes", type=checked(parse_sizes), default=parse_sizes(SIZES), metavar="LIST", help=SIZES.replace("%", "%%")
    )
    what.add_argument("--slots", metavar="LIST", help="the same as slots of a layer, such as 16,32,64")
    what.add_argument(
        "--tiers", type=checked(Tiers.parse), metavar="SPEC", help="two tiers, such as vram=20%%,dram=15%%"
    )
    p.add_argument("--single", action="store_true", help="cut batches into tokens, as decoding would ask for them")
    p.add_argument(
        "--decay", type=checked(parse_decay), default=DECAY, metavar="SLOW,FAST,SHARE", help="of the policy decayed"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write all counts")
    p.add_argument("--plot", type=Path, metavar="FILE", help="hit rate over size, as PNG (needs matplotlib)")
    return p


def _sizes(options: argparse.Namespace, trace: Trace) -> list[Tiers]:
    if options.tiers is not None:
        return [options.tiers]
    if options.slots is None:
        return [Tiers(0, share) for share in options.sizes]
    experts = max(trace.header.experts)
    counts = [int(word) if word.strip().isdecimal() else 0 for word in options.slots.split(",")]
    if not all(0 < count <= experts for count in counts):
        raise UsageError(f"--slots {options.slots}: expected counts from 1 to the {experts} experts of a layer")
    return [Tiers(0, count / experts) for count in counts]


def _policies(options: argparse.Namespace) -> list[str]:
    if options.policy is None:
        return [name for name in EVERY_POLICY if options.tiers is not None or name != STATIC]
    names = [name.strip() for name in options.policy.split(",")]
    check_policies(names)
    if STATIC in names and options.tiers is None:
        raise UsageError(f"the policy {STATIC} has two tiers", hint="--tiers vram=20%,dram=15%")
    return names


def trace_names(paths: Sequence[Path]) -> list[str]:
    """What the rows call each trace: its file's name, the whole path where two files share a name.

    Raises
    ------
    UsageError
        A trace was named twice.
    """
    for path, count in Counter(paths).items():
        if count > 1:
            raise UsageError(f"{path} was named twice")
    shared = Counter(path.name for path in paths)
    return [path.name if shared[path.name] == 1 else str(path) for path in paths]


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    if options.plot and options.tiers is not None:
        raise UsageError("a plot goes over sizes, --tiers is one size", hint="leave out --tiers")
    check_targets([options.json, options.plot])
    policies, rows = _policies(options), []
    for path, name in zip(options.traces, trace_names(options.traces), strict=True):
        rows += _report(name, open_trace(path), options, policies)
    if options.json:
        write_json(options.json, {"rows": [row.as_json() for row in rows]})
    if options.plot:
        plot(rows, options.plot)
    return 0


def _report(name: str, trace: Trace, options: argparse.Namespace, policies: list[str]) -> list[Row]:
    if options.single:
        trace = single_tokens(trace)
    h = trace.header
    about = (
        f"{name}: {h.model}, {len(trace.layers)} layers x {max(h.experts)} experts, top-{h.used}; "
        f"{trace.tokens} tokens in {len(trace.batch_tokens)} batches"
    )
    print(printable(about))
    rows = sweep(name, trace, _sizes(options, trace), policies, options.decay)
    if options.tiers is not None:
        print("requests found where, in %, and experts moved")
        print("\n".join(map(printable, tier_table(rows))))
    else:
        print(f"requests served from memory, in % ({BOUND}: no policy serves more)")
        print("\n".join(map(printable, size_table(rows))))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-bench cache`."""
    return run_command(PROGRAM, run, argv)
