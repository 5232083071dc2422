"""fomoe-ppl: perplexity by llama-perplexity's protocol."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fomoe_io.cli.common import add_engine_options, add_model, engine_config, model_path, new_parser, run_command
from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.session import Session
from fomoe_io.stats import format_banner, format_footer, write_json


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = new_parser("fomoe-ppl", "Perplexity of a text, as llama-perplexity computes and prints it.")
    add_model(p)
    p.add_argument("-f", "--file", type=Path, required=True, metavar="TEXT", help="the text")
    p.add_argument("--chunks", type=int, default=-1, metavar="N", help="chunks at most (-1: all)")
    p.add_argument("--resume", type=Path, metavar="FILE", help="keep finished chunks here and go on from there")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result and the statistics")
    add_engine_options(p)
    p.set_defaults(ctx_size=512)
    return p


@dataclass(slots=True)
class Total:
    """Negative log likelihoods of the scored tokens so far."""

    count: int = 0
    nll: float = 0.0
    nll_squared: float = 0.0
    chunks: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, nll: float, nll_squared: float, count: int) -> None:
        """One more chunk."""
        self.chunks.append((nll, nll_squared, count))
        self.nll += nll
        self.nll_squared += nll_squared
        self.count += count

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.nll / self.count)

    @property
    def error(self) -> float:
        """Standard error as llama-perplexity has it: ppl * sqrt(variance / (count - 1))."""
        mean = self.nll / self.count
        variance = self.nll_squared / self.count - mean * mean
        return self.perplexity * math.sqrt(variance / (self.count - 1)) if self.count > 1 and variance > 0 else 0.0


def score(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p of each target: float64 [n] from logits float32 [n, vocabulary]."""
    most = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp((logits - most).astype(np.float64)).sum(axis=1)) + most[:, 0]
    return np.asarray(log_sum - logits[np.arange(len(targets)), targets])


def chunk_nll(session: Session, tokens: np.ndarray) -> np.ndarray:
    """-ln p of the second half of a chunk: positions n/2 .. n-2 score the tokens after them."""
    session.reset()
    first = len(tokens) // 2
    session.prefill(tokens[:first])
    return score(session.evaluate(tokens[first:-1]), tokens[first + 1 :])


def _fingerprint(engine: Engine, tokens: np.ndarray, chunk: int) -> str:
    digest = hashlib.sha256(tokens.tobytes())
    digest.update(f"{engine.store.fingerprint} {chunk} {engine.kernels}".encode())
    return digest.hexdigest()[:32]


def _load(path: Path, fingerprint: str) -> list[tuple[float, float, int]]:
    if not path.exists():
        return []
    try:
        saved = json.loads(path.read_text())
        if saved["fingerprint"] != fingerprint:
            raise UsageError(f"{path} is of another model, text or chunk size", hint=f"rm {path}")
        return [(float(nll), float(square), int(count)) for nll, square, count in saved["chunks"]]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is no resume file of fomoe-ppl", hint=f"rm {path}") from None


def evaluate(engine: Engine, tokens: np.ndarray, options: argparse.Namespace) -> Total:
    """Score the chunks of a text, printing the running value as llama-perplexity does."""
    chunk = options.ctx_size
    chunks = len(tokens) // chunk
    if options.chunks >= 0:
        chunks = min(chunks, options.chunks)
    if not chunks:
        raise UsageError(f"the text has {len(tokens)} tokens, not one chunk of {chunk}", hint=f"-c {len(tokens) // 2}")
    total = Total()
    fingerprint = _fingerprint(engine, tokens, chunk)
    for saved in _load(options.resume, fingerprint)[:chunks] if options.resume else ():
        total.add(*saved)
    session = engine.session()
    print(f"perplexity over {chunks} chunks of {chunk} tokens", file=sys.stderr)
    for i in range(len(total.chunks), chunks):
        part = tokens[i * chunk : (i + 1) * chunk].copy()
        if engine.tokenizer.add_bos and engine.tokenizer.bos_id is not None:
            part[0] = engine.tokenizer.bos_id
        nll = chunk_nll(session, part)
        total.add(float(nll.sum()), float((nll * nll).sum()), len(nll))
        print(f"[{i + 1}]{total.perplexity:.4f},", end="", flush=True)
        if options.resume:
            write_json(options.resume, {"fingerprint": fingerprint, "chunks": total.chunks})
    print()
    return total


def run(argv: Sequence[str] | None = None) -> int:
    """The command without its error handling."""
    options = parser().parse_args(argv)
    if options.ctx_size < 4:
        raise UsageError(f"chunks of {options.ctx_size} tokens are too short", hint="-c 512")
    text = options.file.read_text(encoding="utf-8", errors="replace")
    # llama.cpp's tools drop one final newline of a file
    text = text.removesuffix("\n")
    with Engine.open(model_path(options), engine_config(options)) as engine:
        print("\n".join(format_banner(engine)), file=sys.stderr)
        ids = engine.tokenizer.encode(text, add_bos=engine.tokenizer.add_bos)
        total = evaluate(engine, np.array(ids, np.int32), options)
        statistics = engine.statistics()
        print(format_footer(statistics), file=sys.stderr)
        print(f"Final estimate: PPL = {total.perplexity:.4f} +/- {total.error:.5f}")
        if options.json:
            write_json(
                options.json,
                {"ppl": total.perplexity, "ppl_error": total.error, "tokens_scored": total.count, **statistics},
            )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fomoe-ppl`."""
    return run_command("fomoe-ppl", run, argv)


if __name__ == "__main__":
    sys.exit(main())
