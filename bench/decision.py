"""What a routing decision costs: the top k of the router's logits, cache-aware routing, and the cache's bookkeeping.

    python bench/decision.py [--experts 512] [--used 10] [-o RESULTS.json]

The engine's C functions in its order, for one token in one layer, in a loop in C on one thread.  Random logits with
popular and unpopular experts; 20 % of them fit into VRAM and 15 % into DRAM.
Processor time, medians over rounds that alternate between the cases; each case begins with a warm cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path

import numpy as np

from fomoe_io.experts.car import CarRule
from fomoe_io.experts.residency import LIBRARY, Residency, address
from fomoe_io.system.system_card import system_card

LIBRARY.fomoe_decide_many.restype = ctypes.c_int64

ROWS, COUNT, ROUNDS = 4096, 8192, 9
VRAM, DRAM = 0.20, 0.15
RULES = ("ratio:0.65", "prior:0.13", "regret:0.034", "budget:0.065")


class Case:
    """One cache and what is asked of it."""

    def __init__(self, logits: np.ndarray, used: int, *, cache: bool = True, rule: str | None = None) -> None:
        self.logits, self.used = logits, used
        experts = logits.shape[1]
        slots = np.array([[round(VRAM * experts), round(DRAM * experts)]], np.int32)
        self.residency = Residency([experts], slots) if cache else None
        self.car = CarRule.parse(rule).native() if rule else None
        self.times: list[float] = []
        self.swaps = 0
        self.run(warm=True)
        self.before = self.counters()

    def run(self, *, warm: bool = False) -> None:
        """COUNT decisions."""
        started = time.process_time()
        swaps = LIBRARY.fomoe_decide_many(
            self.residency.handle if self.residency else None, ctypes.byref(self.car) if self.car else None,
            ctypes.c_int64(COUNT), ROWS, self.logits.shape[1], self.used, address(self.logits),
        )  # fmt: skip
        assert swaps >= 0
        if not warm:
            self.times.append((time.process_time() - started) / COUNT)

    def counters(self) -> dict[str, int]:
        """Of the residency, {} without one."""
        return self.residency.counters() if self.residency else {}

    def result(self) -> dict[str, float]:
        """Medians of the rounds, and what the decisions came to."""
        new = {name: value - self.before[name] for name, value in self.counters().items()}
        decisions = COUNT * len(self.times)
        share = {name: new.get(name, 0) / (decisions * self.used) for name in ("nvme_hits", "substitutions")}
        return {"us": round(1e6 * statistics.median(self.times), 3), **{k: round(v, 4) for k, v in share.items()}}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--used", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    random = np.random.default_rng(1)
    popularity = 0.9 * random.standard_normal(options.experts)
    logits = (popularity + 1.4 * random.standard_normal((ROWS, options.experts))).astype(np.float32)
    cases = {
        "top k": Case(logits, options.used, cache=False),
        "top k, cache": Case(logits, options.used),
        **{f"top k, {rule}, cache": Case(logits, options.used, rule=rule) for rule in RULES},
    }
    for _ in range(ROUNDS):
        for case in cases.values():
            case.run()
    results = {name: case.result() for name, case in cases.items()}
    for name, r in results.items():
        print(f"{name:28} {r['us']:7.3f} us   {r['nvme_hits']:6.1%} read   {r['substitutions']:6.1%} substituted")
    if options.output:
        saved = {"experts": options.experts, "used": options.used, "card": system_card([]), "cases": results}
        options.output.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
