"""Decode speed of this engine: random tokens, one at a time, as llama-bench's tg test has them.

Prints one JSON object: tokens per second of each round, and the engine's statistics over the measured rounds.

    python bench/decode.py MODEL --tokens 64 --rounds 3 [--ram 4G] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from fomoe_io import Engine, EngineConfig
from fomoe_io.units import parse_bytes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=8, help="tokens before the first round")
    parser.add_argument("--ram", type=parse_bytes)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--lookahead", default="auto", help="on, off, auto or a number (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    config = EngineConfig(
        ram_bytes=options.ram, threads=options.threads, context_tokens=4096, lookahead=options.lookahead
    )
    with Engine.open(options.model, config) as engine:
        random = np.random.default_rng(options.seed)
        session = engine.session()

        def decode(count: int) -> float:
            session.reset()
            started = time.monotonic()
            for token in random.integers(0, engine.shape.vocabulary, count):
                session.decode(int(token))
            return count / (time.monotonic() - started)

        decode(options.warmup)
        engine.reset_statistics()
        speeds = [decode(options.tokens) for _ in range(options.rounds)]
        print(json.dumps({"tokens_per_second": speeds, "statistics": engine.statistics()}))


if __name__ == "__main__":
    main()
