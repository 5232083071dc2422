"""What a routing decision costs: the top k of the router's logits, and cache-aware routing on top of it.

    python bench/decision.py [--experts 512] [--used 10] [-o RESULTS.json]

Random logits and tiers (35 % of the experts resident); processor time of one token in one layer, medians over rounds
that alternate between the cases, on one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path

import numpy as np

from fomoe_io.car import RULES, CarRule
from fomoe_io.residency import LIBRARY, NVME, address
from fomoe_io.system_card import system_card

ROWS, COUNT, ROUNDS = 256, 4096, 9
PARAMETERS = {"ratio": 0.5, "prior": 0.15, "regret": 0.036, "budget": 0.065}


class Case:
    """Inputs of many decisions."""

    def __init__(self, experts: int, used: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.experts, self.used = experts, used
        self.logits = (1.5 * random.standard_normal((ROWS, experts))).astype(np.float32)
        self.tiers = random.choice(np.array([0, 1, NVME], np.int8), (ROWS, experts), p=[0.2, 0.15, 0.65])
        self.probabilities = np.empty(experts, np.float32)
        self.ids = np.empty((ROWS, used), np.int32)
        self.weights = np.empty((ROWS, used), np.float32)
        self.results = [np.empty_like(a) for a in (self.ids, self.weights, self.ids)]
        self.route()

    def route(self) -> float:
        """Seconds a decision of the softmax and the top k; one call from Python each, whose cost is included."""
        started = time.process_time()
        for i in range(ROWS):
            LIBRARY.fomoe_route(
                self.experts, self.used, address(self.logits[i]), 1, ctypes.c_float(1), address(self.probabilities),
                address(self.ids[i]), address(self.weights[i]),
            )  # fmt: skip
        return (time.process_time() - started) / ROWS

    def choose(self, rule: CarRule) -> tuple[float, float]:
        """Seconds and swaps a decision of cache-aware routing, in a loop in C."""
        car = rule.native()
        started = time.process_time()
        swaps = LIBRARY.fomoe_car_choose_many(
            ctypes.byref(car), ctypes.c_int64(COUNT), ROWS, self.experts, self.used, 1, address(self.logits),
            address(self.tiers), address(self.ids), address(self.weights), *map(address, self.results),
        )  # fmt: skip
        return (time.process_time() - started) / COUNT, swaps / COUNT


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--used", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    case = Case(options.experts, options.used, seed=1)
    times: dict[str, list[float]] = {name: [] for name in ("route", *RULES)}
    swaps: dict[str, float] = {}
    for _ in range(ROUNDS):
        times["route"].append(case.route())
        for rule, parameter in PARAMETERS.items():
            seconds, swaps[rule] = case.choose(CarRule(rule, parameter))
            times[rule].append(seconds)
    result = {
        name: {"us": round(1e6 * statistics.median(values), 3), "swaps": round(swaps.get(name, 0.0), 2)}
        for name, values in times.items()
    }
    for name, values in result.items():
        print(f"{name:8} {values['us']:7.3f} us   {values['swaps']:5.2f} swaps")
    if options.output:
        saved = {"experts": options.experts, "used": options.used, "card": system_card([]), "cases": result}
        options.output.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
