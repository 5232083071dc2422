"""fomoe-bench decode: a model's speed in llama-bench's form, with memory, tiers and drive in the row."""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fomoe_io.cli.common import note, run_command
from fomoe_io.cli.llama_options import BENCH
from fomoe_io.cli.model_help import explained
from fomoe_io.cli.options import add_engine_options, add_model, engine_config, model_path
from fomoe_io.cli.parser import Parser, checked, new_parser, package_version, whole
from fomoe_io.cli.progress import Loading
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError, printable
from fomoe_io.session import Session
from fomoe_io.system.system_card import drive_of
from fomoe_io.units import format_bytes

PROGRAM = "fomoe-bench decode"
FORMS = ("md", "csv", "json", "jsonl")
TIERS = ("vram", "dram", "nvme")
EXAMPLES = """
fomoe-bench decode MODEL.gguf                          pp512 and tg128, five times each
fomoe-bench decode /nvme0/model --ram 16G -p 0 -n 128,512
fomoe-bench decode MODEL.gguf -r 3 -o json > row.json
"""


def _counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) < 1 << 22 for word in words):
        raise UsageError(f"{text!r} is no list of counts", hint="512, or 128,512")
    return [int(word) for word in words]


def parser() -> Parser:
    """The command line."""
    p = new_parser(PROGRAM, "Measure a model's speed, in llama-bench's form.", EXAMPLES)
    add_model(p)
    group = p.add_argument_group("tests (lists such as 128,512; 0: none)")
    group.add_argument("-p", "--n-prompt", type=checked(_counts), default=[512], metavar="LIST",
        help="tokens of a prompt (default: 512)")  # fmt: skip
    group.add_argument("-n", "--n-gen", type=checked(_counts), default=[128], metavar="LIST",
        help="tokens of an answer (default: 128)")  # fmt: skip
    group.add_argument(
        "-d", "--n-depth", type=whole, default=0, metavar="N", help="tokens that the context holds before"
    )
    group.add_argument("-r", "--repetitions", type=whole, default=5, metavar="N", help="of each test")
    group.add_argument("-o", "--output", choices=FORMS, default="md", help="form of the rows on stdout")
    group.add_argument("--no-warmup", action="store_true", help="count the first run of a test, too")
    add_engine_options(p)
    p.add_foreign(BENCH)
    return p


@dataclass(frozen=True, slots=True)
class Row:
    """One test.  Shares are of the requests for experts in all of its repetitions; `lookahead`: in force at its end."""

    model: str
    size_bytes: int
    backend: str
    threads: int
    ram_bytes: int
    slots: int
    experts: int
    test: str
    tokens_per_second: float
    deviation: float
    samples: list[float]
    vram_share: float
    dram_share: float
    nvme_share: float
    nvme_bytes_per_token: float
    stall_share: float
    car: str
    lookahead: bool
    drive: str
    version: str


def _once(session: Session, kind: str, tokens: np.ndarray, depth: np.ndarray) -> float:
    """Seconds of one run."""
    session.reset()
    if len(depth):
        session.prefill(depth)
    started = time.monotonic()
    if kind == "pp":
        session.prefill(tokens)
    else:
        for token in tokens:
            session.decode(int(token))
    return time.monotonic() - started


def _row(engine: Engine, options: argparse.Namespace, kind: str, count: int) -> Row:
    random, session = np.random.default_rng(1), engine.session()
    tokens = random.integers(0, engine.shape.vocabulary, count)  # as llama-bench, so that no text is favoured
    depth = random.integers(0, engine.shape.vocabulary, options.n_depth)
    try:
        if not options.no_warmup:
            _once(session, kind, tokens, depth)
        engine.reset_statistics()
        seconds = [_once(session, kind, tokens, depth) for _ in range(options.repetitions)]
    finally:
        session.close()
    s = engine.statistics()
    rates = [count / one for one in seconds]
    requests = max(s["expert_requests"], 1)
    shares = {f"{tier}_share": s["tiers"][tier]["hits"] / requests for tier in TIERS}
    return Row(
        model=engine.model_name,
        size_bytes=sum(engine.store.file_bytes),
        backend=engine.backend.device_name,
        threads=engine.backend.threads,
        ram_bytes=engine.budgets.ram_bytes,
        slots=s["budgets"]["slots_per_layer"],
        experts=engine.shape.experts,
        test=f"{kind}{count}{f' @ d{options.n_depth}' if options.n_depth else ''}",
        tokens_per_second=statistics.mean(rates),
        deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        samples=rates,
        nvme_bytes_per_token=s["nvme_bytes_per_token"],
        stall_share=min(1.0, s["stall_seconds"]["nvme"] / max(sum(seconds), 1e-9)),
        car=str(engine.config.car or "off"),
        lookahead=s["prefetch"]["is_on"],
        drive=drive_of(engine.store.paths[0]).describe(),
        version=package_version(),
        **shares,
    )


def _markdown(rows: Sequence[Row]) -> Iterator[str]:
    titles = (
        "model", "size", "backend", "threads", "memory", "slots", "VRAM %", "DRAM %", "NVMe %", "read/tok", "stall %",
        "drive", "test", "t/s",
    )  # fmt: skip
    yield f"| {' | '.join(titles)} |"
    left = ("model", "backend", "drive", "test")
    yield f"| {' | '.join('---' if title in left else '---:' for title in titles)} |"
    for row in rows:
        cells = (
            row.model, format_bytes(row.size_bytes), row.backend, str(row.threads), format_bytes(row.ram_bytes),
            f"{row.slots}/{row.experts}", *(f"{100 * getattr(row, f'{tier}_share'):.1f}" for tier in TIERS),
            format_bytes(row.nvme_bytes_per_token), f"{100 * row.stall_share:.0f}", row.drive,
            row.test if row.car == "off" else f"{row.test} (--car {row.car})",
            f"{row.tokens_per_second:.2f} ± {row.deviation:.2f}",
        )  # fmt: skip
        yield printable(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")


def formatted(rows: Sequence[Row], form: str) -> str:
    """The rows as md, csv, json or jsonl."""
    values = [asdict(row) for row in rows]
    if form == "json":
        return json.dumps(values, indent=2)
    if form == "jsonl":
        return "\n".join(map(json.dumps, values))
    if form == "md":
        return "\n".join(_markdown(rows))
    out = io.StringIO()
    writer = csv.DictWriter(
        out, [name for name in values[0] if name != "samples"], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(values)
    return out.getvalue().rstrip("\n")


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    tests = [(kind, n) for kind, counts in (("pp", options.n_prompt), ("tg", options.n_gen)) for n in counts if n]
    if not tests or options.repetitions < 1 or options.n_depth < 0:
        raise UsageError("there is nothing to measure", hint="-p 512 -n 128 -r 5")
    for text in options.notes:
        note(f"note: {text}")
    path: Path = model_path(options)
    config = engine_config(options, path)
    if config.context_tokens is None:
        config = replace(config, context_tokens=options.n_depth + max(n for _, n in tests))
    loading = Loading(path.name)
    with explained(path), loading:
        engine = Engine.open(path, replace(config, progress=loading))
    with engine:
        rows = []
        for kind, count in tests:
            note(f"{kind}{count}: {options.repetitions} runs")
            rows.append(_row(engine, options, kind, count))
    print(formatted(rows, options.output))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-bench decode`."""
    return run_command(PROGRAM, run, argv)


if __name__ == "__main__":
    sys.exit(main())
