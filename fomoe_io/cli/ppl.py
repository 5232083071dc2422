"""fomoe-ppl: perplexity by llama-perplexity's protocol, and what cache-aware routing costs."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io import commands
from fomoe_io.cli.common import decoded, note, run_command
from fomoe_io.cli.llama_options import ENGINE
from fomoe_io.cli.model_help import explained
from fomoe_io.cli.options import add_engine_options, add_model, engine_config, model_path
from fomoe_io.cli.parser import Parser, new_parser, whole
from fomoe_io.cli.progress import Loading
from fomoe_io.config import EngineConfig
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.session import Session
from fomoe_io.stats import format_banner, format_footer, write_json
from fomoe_io.system.files import check_targets
from fomoe_io.text.sampler import check_finite
from fomoe_io.trace.exact_logits import ExactLogits
from fomoe_io.units import format_seconds

TIERS = ("vram", "dram", "nvme")
LEAST_CHUNK = 4
"""Tokens of a chunk whose second half scores at least one."""
MOST_NATS = 700
"""Of a token's negative log likelihood: the exp of more is no float."""


def parser() -> Parser:
    """The command line."""
    p = new_parser("fomoe-ppl", "Perplexity of a text, as llama-perplexity computes and prints it.")
    add_model(p)
    p.add_argument("-f", "--file", type=Path, required=True, metavar="TEXT", help="the text")
    p.add_argument("--chunks", type=whole, default=-1, metavar="N", help="chunks at most (-1: all)")
    p.add_argument("--resume", type=Path, metavar="FILE", help="keep finished chunks here and go on from there")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result and the statistics")
    p.add_argument(
        "--stepwise", action="store_true", help="token by token through the cache, as an answer is (implied by --car)"
    )
    p.add_argument(
        "--exact-logits", type=Path, metavar="FILE",
        help="with --car: keep the exact run's logits here for the next time (default: a temporary file)",
    )  # fmt: skip
    add_engine_options(p)
    p.add_foreign(ENGINE)
    p.set_defaults(ctx_size=512)
    return p


# ---- arithmetic ----


# One row at a time: a chunk's rows in float64 would be more than small budgets leave free.


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [vocabulary] from float32 logits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def score(logits: np.ndarray, target: int) -> float:
    """-ln p of the target from logits float32 [vocabulary]."""
    most = logits.max()
    return float(np.log(np.exp((logits - most).astype(np.float64)).sum()) + most - logits[target])


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """KL(exact || other) of two rows of logits, in nats over the whole vocabulary."""
    p, q = log_softmax(exact), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum())


@dataclass(slots=True)
class Chunk:
    """Sums over the scored tokens of a chunk, and where its experts were found (of all its tokens).

    `exact_nll`, `change_squared` (of nll - exact nll) and `kl` are sums over the same tokens of a run without
    substitution; `cold` says that the run had just begun or resumed, with an empty cache.
    """

    count: int
    nll: float
    nll_squared: float
    exact_nll: float = 0.0
    change_squared: float = 0.0
    kl: float = 0.0
    cold: bool = False
    hits: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Total:
    """Negative log likelihoods of the scored tokens so far."""

    chunks: list[Chunk] = field(default_factory=list)

    def sum(self, name: str) -> float:
        """Of a number over the chunks."""
        return math.fsum(getattr(chunk, name) for chunk in self.chunks)

    @property
    def count(self) -> int:
        """Tokens scored."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.sum("nll") / self.count)

    @property
    def error(self) -> float:
        """Standard error as llama-perplexity has it: ppl * sqrt(variance / (count - 1))."""
        mean = self.sum("nll") / self.count
        variance = self.sum("nll_squared") / self.count - mean * mean
        return self.perplexity * math.sqrt(variance / (self.count - 1)) if self.count > 1 and variance > 0 else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Of all requests for experts: found in each tier, and answered with another expert."""
        hits = {name: sum(chunk.hits[name] for chunk in self.chunks) for name in self.chunks[0].hits}
        requests = sum(hits[name] for name in (*TIERS, "substituted"))
        return {name: count / requests for name, count in hits.items()}

    def compared(self) -> dict[str, float]:
        """What differs from the exact run over the same tokens."""
        exact = math.exp(self.sum("exact_nll") / self.count)
        change = (self.sum("nll") - self.sum("exact_nll")) / self.count
        variance = max(0.0, self.sum("change_squared") / self.count - change * change)
        return {
            "ppl_exact": exact,
            "ppl_increase": self.perplexity / exact - 1,
            # of the difference token by token, much smaller than the error of either perplexity
            "ppl_increase_error": self.perplexity / exact * math.sqrt(variance / max(1, self.count - 1)),
            "kl_vs_exact": self.sum("kl") / self.count,
        }


# ---- running ----


def scored_logits(session: Session, tokens: np.ndarray, stepwise: bool) -> Iterator[np.ndarray]:
    """Logits of the second half of a chunk: positions n/2 .. n-2, which score the tokens after them.

    Each row is valid until the next.
    """
    session.reset()
    first = len(tokens) // 2
    if stepwise:
        for token in tokens[:first]:
            session.decode(int(token))
        for token in tokens[first:-1]:
            yield session.decode(int(token))
    else:
        session.prefill(tokens[:first])
        yield from session.evaluate(tokens[first:-1])


def scored_positions(chunk: int) -> int:
    """Of a chunk of so many tokens."""
    return chunk - chunk // 2 - 1


def _hits(engine: Engine) -> dict[str, int]:
    s = engine.statistics()
    hits = {name: s["tiers"][name]["hits"] for name in TIERS}
    return {**hits, "substituted": s["substitutions"], "read": s["tiers"]["nvme"]["reads"]}


class Text:
    """The chunks of a tokenized text.

    Raises
    ------
    UsageError
        There is not one chunk.
    """

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        text = decoded(options.file.read_bytes())
        if not text:
            raise UsageError(f"{options.file} is empty")
        # llama.cpp's tools drop one final newline of a file
        tokenizer = engine.tokenizer
        self.tokens = np.array(tokenizer.encode(text.removesuffix("\n"), add_bos=tokenizer.add_bos), np.int32)
        self.chunk = options.ctx_size
        self.chunks = len(self.tokens) // self.chunk
        if options.chunks >= 0:
            self.chunks = min(self.chunks, options.chunks)
        if not self.chunks:
            raise UsageError(
                f"the text has {len(self.tokens)} tokens, not one chunk of {self.chunk}",
                hint=f"-c {len(self.tokens) // 2}" if len(self.tokens) >= 2 * LEAST_CHUNK else "a longer text",
            )
        self.scored = scored_positions(self.chunk)
        self._bos = tokenizer.bos_id if tokenizer.add_bos else None

    def part(self, i: int) -> np.ndarray:
        """Tokens of chunk i, with the begin-of-text token where the model has one."""
        part = self.tokens[i * self.chunk : (i + 1) * self.chunk].copy()
        if self._bos is not None:
            part[0] = self._bos
        return part

    def scored_logits(self, session: Session, i: int, stepwise: bool) -> Iterator[np.ndarray]:
        """Logits of the scored positions of chunk i, row by row; ComputeError when one is no number."""
        first = i * self.chunk + self.chunk // 2
        for place, logits in enumerate(scored_logits(session, self.part(i), stepwise)):
            check_finite(logits, first + place)
            yield logits

    def targets(self, i: int) -> np.ndarray:
        """Tokens that the scored positions of chunk i predict."""
        return self.part(i)[self.chunk // 2 + 1 :]

    def fingerprint(self, engine: Engine, *settings: object) -> str:
        """Of everything that the results depend on."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(" ".join(map(str, (engine.store.fingerprint, self.chunk, engine.kernels, *settings))).encode())
        return digest.hexdigest()[:32]


def _chunk(fields: Any) -> Chunk:
    """One of a resume file; any error for what no run has written."""
    chunk = Chunk(**fields)
    sums = (chunk.nll, chunk.nll_squared, chunk.exact_nll, chunk.change_squared, chunk.kl)
    counts = [chunk.count, *(chunk.hits[name] for name in (*TIERS, "substituted", "read"))]
    if not all(type(count) is int and 0 <= count < 1 << 53 for count in counts) or len(counts) != 1 + len(chunk.hits):
        raise ValueError
    if not all(map(math.isfinite, sums)) or not chunk.count or not sum(counts[1:-1]) or type(chunk.cold) is not bool:
        raise ValueError
    if max(chunk.nll, chunk.exact_nll) > MOST_NATS * chunk.count:
        raise ValueError
    return chunk


def _load(path: Path | None, fingerprint: str) -> list[Chunk]:
    if path is None or not path.exists():
        return []
    try:
        saved = json.loads(path.read_text())
        if saved["fingerprint"] != fingerprint:
            raise UsageError(
                f"{path} is of another model, text or chunk size, or of other settings or memory",
                hint=f"the same --ram, or rm {path}",
            )
        return [_chunk(fields) for fields in saved["chunks"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UsageError(f"{path} is no resume file of fomoe-ppl", hint=f"rm {path}") from None


def write_exact(config: EngineConfig, options: argparse.Namespace) -> ExactLogits:
    """The exact logits of every chunk: those that the file has, and the rest computed in batches.

    By an engine of its own, so that the measured one starts cold and its counters see nothing of this.
    """
    config = replace(config, car=None, tiers=None, trace=None, logit_rows=scored_positions(options.ctx_size))
    with Engine.open(model_path(options), config) as engine:
        text = Text(engine, options)
        exact = ExactLogits(options.exact_logits, text.fingerprint(engine), text.scored, engine.shape.vocabulary)
        session = engine.session()
        for i in range(exact.chunks, text.chunks):
            exact.append(text.scored_logits(session, i, stepwise=False))
            print(f"\rexact logits: {i + 1}/{text.chunks} chunks", end="", file=sys.stderr)
        print(file=sys.stderr)
    return exact


def _score_chunk(rows: Iterator[np.ndarray], targets: np.ndarray, exact: Iterator[np.ndarray] | None) -> Chunk:
    """The sums of a chunk from its scored logits and, where they are kept, those of the exact run."""
    nll, exact_nll, kl = (np.zeros(len(targets)) for _ in range(3))
    for place, (logits, target) in enumerate(zip(rows, targets, strict=True)):
        nll[place] = score(logits, target)
        if exact is not None:
            reference = next(exact)
            exact_nll[place] = score(reference, target)
            kl[place] = divergence(reference, logits)
    chunk = Chunk(len(nll), float(nll.sum()), float((nll * nll).sum()))
    if exact is not None:
        chunk.exact_nll, chunk.kl = float(exact_nll.sum()), float(kl.sum())
        chunk.change_squared = float(((nll - exact_nll) ** 2).sum())
    return chunk


def evaluate(engine: Engine, options: argparse.Namespace, exact: ExactLogits | None) -> Total:
    """Score the chunks of a text, printing the running value as llama-perplexity does."""
    text = Text(engine, options)
    stepwise = options.stepwise or options.car is not None
    # where experts are found, and with --car the text's probabilities, follow from these as well; a batch's do not
    # follow from the number of slots, which may differ from run to run where nobody named a size
    slots = engine.statistics()["budgets"]["slots_per_layer"]
    memory = slots if stepwise else None
    fingerprint = text.fingerprint(engine, stepwise, options.car, options.tiers, options.policy, memory)
    total = Total(_load(options.resume, fingerprint)[: text.chunks])
    session = engine.session()
    print(f"perplexity over {text.chunks} chunks of {text.chunk} tokens", file=sys.stderr)
    before, started = _hits(engine), time.monotonic()
    for i in range(first := len(total.chunks), text.chunks):
        rows, reference = text.scored_logits(session, i, stepwise), None if exact is None else exact.rows(i)
        chunk = _score_chunk(rows, text.targets(i), reference)
        chunk.cold = i == first
        now = _hits(engine)
        chunk.hits = {name: now[name] - before[name] for name in now}
        before = now
        total.chunks.append(chunk)
        print(f"[{i + 1}]{total.perplexity:.4f},", end="", flush=True)
        _tell_pace(i + 1 - first, text.chunks - first, time.monotonic() - started)
        if options.resume:
            write_json(options.resume, {"fingerprint": fingerprint, "chunks": [asdict(c) for c in total.chunks]})
    print()
    return total


def _tell_pace(done: int, chunks: int, seconds: float) -> None:
    """After the first chunk, as llama-perplexity does, and after each tenth: how long the rest takes."""
    each = seconds / done
    if done < chunks and (done == 1 or done * 10 // chunks > (done - 1) * 10 // chunks) and each * chunks > 10:
        left = format_seconds(each * (chunks - done))
        print(f"{format_seconds(each)} a chunk, {done} of {chunks}: eta {left}", file=sys.stderr, flush=True)


def _report(engine: Engine, total: Total, options: argparse.Namespace) -> dict[str, Any]:
    """Print the results, last line as llama-perplexity's; what --json writes."""
    result: dict[str, Any] = {"ppl": total.perplexity, "ppl_error": total.error, "tokens_scored": total.count}
    result["shares"] = shares = total.shares
    result["cold_starts"] = sum(chunk.cold for chunk in total.chunks)
    print(format_footer(engine.statistics()), file=sys.stderr)
    if options.car is not None:
        result |= total.compared()
        print(
            f"exact PPL = {result['ppl_exact']:.4f}   with --car {options.car}: "
            f"{100 * result['ppl_increase']:+.2f} +/- {100 * result['ppl_increase_error']:.2f} %   "
            f"KL = {result['kl_vs_exact']:.5f}   "
            f"NVMe {100 * shares['nvme']:.2f} %   substituted {100 * shares['substituted']:.2f} %"
        )
    print(f"Final estimate: PPL = {total.perplexity:.4f} +/- {total.error:.5f}")
    return {**result, **engine.statistics()}


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    for text in options.notes:
        note(f"note: {text}")
    if not options.file.is_file():
        raise UsageError(f"{options.file}: no such file")
    if options.ctx_size < LEAST_CHUNK:
        raise UsageError(f"chunks of {options.ctx_size} tokens are too short", hint="-c 512")
    if options.chunks == 0:
        raise UsageError("--chunks 0 leaves nothing to score", hint="--chunks 1, or -1 for the whole text")
    if options.exact_logits is not None and options.car is None:
        raise UsageError("--exact-logits compares a run that is not exact", hint="--car on")
    check_targets([options.json, options.resume, options.exact_logits])
    path = model_path(options)
    loading = Loading(path.name)
    config = replace(engine_config(options, path), progress=loading)
    if not options.stepwise and options.car is None:
        config = replace(config, logit_rows=scored_positions(options.ctx_size))
    exact = None if options.car is None else write_exact(config, options)
    try:
        with explained(path), loading:
            engine = Engine.open(path, config)
        with engine:
            print("\n".join(format_banner(engine)), file=sys.stderr)
            result = _report(engine, evaluate(engine, options, exact), options)
    finally:
        if exact is not None:
            exact.close()
    if options.json:
        write_json(options.json, result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-ppl`."""
    return run_command("fomoe-ppl", run, argv)


if __name__ == "__main__":
    sys.exit(commands.ppl())
