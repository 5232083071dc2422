"""What cache-aware routing costs and saves: share read, perplexity and KL for many settings of each rule.

    python bench/car_curve.py MODEL TEXT --work DIR -o bench/results/car-curve --plot docs/car-curve.png

Runs `fomoe-ppl --car RULE` for every setting and tiers (cold start, CAR from the first token, second half of each chunk
scored) on one thread, --jobs at a time at low priority, and keeps every run's answer in --work: started again, it goes
on where it stopped.  Writes RESULTS.json, RESULTS.md and a plot of whatever is done; --report measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fomoe_io.system.system_card import format_card, system_card

TIERS = ("vram=20%,dram=15%", "vram=10%,dram=7%")
PARAMETERS = {
    "regret": (0.01, 0.02, 0.03, 0.034, 0.036, 0.05),
    "ratio": (0.9, 0.8, 0.7, 0.65, 0.6, 0.5),
    "prior": (0.05, 0.08, 0.1, 0.12, 0.13, 0.15),
    "budget": (0.02, 0.03, 0.05, 0.06, 0.065, 0.08),
}
FIRST = ("off", "regret:0.036", "budget:0.06", "prior:0.12", "ratio:0.65")
"""Settings that matter most are measured first; then all, from the middle of each rule's range outwards."""

COLOURS = {"regret": "tab:blue", "budget": "tab:cyan", "ratio": "tab:red", "prior": "tab:orange"}


def settings() -> list[str]:
    """All settings, in the order in which they are measured."""
    rest = [
        f"{rule}:{values[i]:g}" for i in (2, 4, 1, 5, 0, 3) for rule, values in PARAMETERS.items() if i < len(values)
    ]
    return list(dict.fromkeys([*FIRST, *rest]))


def command(options: argparse.Namespace, tiers: str, car: str, result: Path) -> list[str]:
    """One run of fomoe-ppl."""
    line = [
        sys.executable,
        "-m",
        "fomoe_io.cli.ppl",
        str(options.model),
        "-f",
        str(options.text),
        "-c",
        "512",
        "-t",
        "1",
    ]
    line += ["--chunks", str(options.chunks), "--tiers", tiers, "--json", str(result)]
    if car == "off":
        return [*line, "--stepwise"]
    return [*line, "--car", car, "--exact-logits", str(options.work / "exact-logits")]


def measure(options: argparse.Namespace, tiers: str, car: str) -> None:
    """Run it unless its answer is there."""
    result = answer_file(options, tiers, car)
    if result.exists():
        return
    done = subprocess.run(
        ["nice", *command(options, tiers, car, result)], capture_output=True, text=True, env=os.environ, check=False
    )
    print(tiers, car, "\n".join(done.stdout.splitlines()[-2:]) or done.stderr, flush=True)


def answer_file(options: argparse.Namespace, tiers: str, car: str) -> Path:
    """Where a run's answer is kept."""
    name = f"{tiers} {car}".replace("%", "").replace("=", "").replace(",", "-").replace(" ", "_").replace(":", "-")
    return options.work / f"{options.chunks}_{name}.json"


def rows(options: argparse.Namespace, tiers: str, cars: Sequence[str]) -> list[dict[str, Any]]:
    """What is there of these runs."""
    table = []
    for car in dict.fromkeys(cars):
        path = answer_file(options, tiers, car)
        if not path.exists():
            continue
        answer = json.loads(path.read_text())
        shares = answer["shares"]
        table.append(
            {
                "tiers": tiers,
                "car": car,
                "nvme_share": shares["nvme"],
                "substituted_share": shares["substituted"],
                "vram_share": shares["vram"],
                "dram_share": shares["dram"],
                "read_share": shares["read"],
                "ppl": answer["ppl"],
                "ppl_error": answer["ppl_error"],
                "ppl_increase": answer.get("ppl_increase", 0.0),
                "ppl_increase_error": answer.get("ppl_increase_error", 0.0),
                "kl": answer.get("kl_vs_exact", 0.0),
                "tokens_scored": answer["tokens_scored"],
            }
        )
    return table


def markdown(options: argparse.Namespace, tables: dict[str, list[dict[str, Any]]]) -> str:
    """The tables."""
    lines = [
        "# Cache-aware routing: the curve", "",
        f"{options.model.name}, {options.text.name}, {options.chunks} chunks of 512 tokens, cold start, substitution "
        "from the first token, second half of each chunk scored.", "",
        "Repeat: `python bench/car_curve.py MODEL TEXT --work DIR -o RESULTS`", "", "```",
        *format_card(system_card([options.model])), "```", "",
    ]  # fmt: skip
    for tiers, table in tables.items():
        lines += [
            f"## {tiers}",
            "",
            "| rule | NVMe | substituted | VRAM | DRAM | PPL | PPL vs exact | KL |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['car']} | {100 * r['nvme_share']:.2f} % | {100 * r['substituted_share']:.2f} % "
            f"| {100 * r['vram_share']:.1f} % | {100 * r['dram_share']:.1f} % | {r['ppl']:.3f} "
            f"| {100 * r['ppl_increase']:+.2f} ± {100 * r['ppl_increase_error']:.2f} % | {r['kl']:.4f} |"
            for r in table
        ]
        lines.append("")
    return "\n".join(lines)


def plot(path: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    """NVMe share against perplexity and against KL, one row of axes a pair of tiers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(tables), 2, figsize=(11, 4.2 * len(tables)), squeeze=False)
    for line, (tiers, table) in zip(axes, tables.items(), strict=True):
        for axis, (key, scale, label) in zip(
            line, (("ppl_increase", 100, "perplexity above exact, %"), ("kl", 1, "KL(exact || CAR), nats")), strict=True
        ):
            for rule in PARAMETERS:
                points = sorted(
                    (100 * r["nvme_share"], scale * r[key])
                    for r in table
                    if r["car"].startswith(rule) and "," not in r["car"]
                )
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[rule], label=rule, markersize=4)
            axis.set_xlabel("experts read from NVMe, % of requests")
            axis.set_ylabel(label)
            axis.set_title(tiers)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="directory of finished runs and of the exact logits")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tiers", action="append", help=f"default: {' and '.join(TIERS)}")
    parser.add_argument("--car", action="append", default=[], help="further settings, measured first")
    parser.add_argument("--report", action="store_true", help="write the results of what is done")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    all_tiers, cars = options.tiers or list(TIERS), [*options.car, *settings()]
    if not options.report:
        # the first run with --car writes the exact logits, which the others share
        measure(options, all_tiers[0], next(car for car in cars if car != "off"))
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: measure(options, *job), [(t, c) for t in all_tiers for c in cars]))
    order = ["off", *(f"{rule}:{value:g}" for rule, values in PARAMETERS.items() for value in values), *options.car]
    tables = {tiers: rows(options, tiers, order) for tiers in all_tiers}
    card = system_card([options.model])
    options.output.with_suffix(".json").write_text(json.dumps({"card": card, "runs": tables}, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(options, tables))
    if options.plot:
        plot(options.plot, tables)


if __name__ == "__main__":
    main()
