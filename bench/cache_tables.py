"""The tables and plots of docs/caching.md, from routing traces: policies, tiers, the choice of the decay, warm starts.

    fomoe-ppl MODEL -f wiki.test.raw -c 512 --chunks 40 -b 1 --tiers vram=20%,dram=15% --trace wiki-test.trace
    python bench/cache_tables.py wiki-test.trace prose.trace qwen.route.csv.xz \\
        --warm wiki-valid.trace wiki-test.trace --warm prose.trace wiki-test.trace --plots docs --json FILE > FILE.md

Everything here is counted, nothing timed.  Traces are played token by token, from a cold start.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fomoe_io.config import Tiers
from fomoe_io.engine import WARM_START_WEIGHT
from fomoe_io.experts.profile import shrunk
from fomoe_io.experts.residency import DECAY, NVME, Decay
from fomoe_io.experts.slots import hottest_first
from fomoe_io.stats import write_json
from fomoe_io.trace.cache_report import BOUND, EVERY_POLICY, STATIC, Row, plot, sweep
from fomoe_io.trace.importers import open_trace
from fomoe_io.trace.simulator import Replay, belady, even_slots, replay, single_tokens
from fomoe_io.trace.trace import Trace, expert_counts

SIZES = tuple(Tiers(0, share) for share in (0.10, 0.17, 0.25, 0.35, 0.50))
TWO_TIERS = (Tiers(0.20, 0.15), Tiers(0.10, 0.07))
ONE_AVERAGE = tuple(Decay(slow, 0.5, 0.0) for slow in (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999))
NEIGHBOURS = (
    *(DECAY._replace(slow=slow) for slow in (0.99, 0.995, 0.999)),
    *(DECAY._replace(fast=fast) for fast in (0.8, 0.9, 0.95, 0.97)),
    *(DECAY._replace(fast_share=share) for share in (0.1, 0.3, 0.5)),
)
TUNED_AT = SIZES[:4]
WARM_WEIGHTS = (0.001, WARM_START_WEIGHT, 1.0)
FIRST_TOKENS = (16, 64, 256, 1024)


def title(name: str) -> str:
    """Of a trace: its file's name without what says that it is one."""
    return name.removeprefix("bigmoeonedge-").split(".")[0]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def percent(value: float) -> str:
    """As the tables have it."""
    return f"{100 * value:.1f}"


def policies_table(rows: Sequence[Row], sizes: Sequence[Tiers]) -> None:
    """NVMe share of requests: a line a trace and policy, a column a size."""
    print("NVMe share of expert requests, %, one tier\n")
    found = {(row.trace, row.policy, row.size): row.nvme for row in rows}
    lines = [
        [trace, policy, *(percent(found[trace, policy, size.vram + size.dram]) for size in sizes)]
        for trace, policy in dict.fromkeys((row.trace, row.policy) for row in rows)
    ]
    markdown(["trace", "policy", *(f"{100 * (s.vram + s.dram):.0f} % of the experts" for s in sizes)], lines)


def tiers_table(rows: Sequence[Row]) -> None:
    """Both tiers, the bound, and how far above it each policy stays."""
    for tiers in TWO_TIERS:
        here = [row for row in rows if (row.vram_share, row.dram_share) == (tiers.vram, tiers.dram)]
        bound = {row.trace: row.nvme for row in here if row.policy == BOUND}
        lru = {row.trace: row.nvme for row in here if row.policy == "lru"}
        print(
            f"VRAM {100 * tiers.vram:g} %, DRAM {100 * tiers.dram:g} % of the experts: where requests were found, %\n"
        )
        markdown(
            ["trace", "policy", "VRAM", "DRAM", "NVMe", "beside lru", "points above the bound"],
            [
                [
                    row.trace,
                    row.policy,
                    *(["", ""] if row.policy == BOUND else [percent(row.vram), percent(row.dram)]),
                    percent(row.nvme),
                    f"{100 * (row.nvme / lru[row.trace] - 1):+.0f} %",
                    f"{100 * (row.nvme - bound[row.trace]):.1f}",
                ]
                for row in here
            ],
        )


def excess(trace: Trace, decay: Decay) -> float:
    """Misses beyond the bound, as a share of the bound: the mean over the sizes that were tuned at."""
    slots = [even_slots(trace, size.vram, size.dram) for size in TUNED_AT]
    return float(np.mean([replay(trace, s, decay=decay).share(NVME) / belady(trace, s).share(NVME) - 1 for s in slots]))


def decay_table(traces: dict[str, Trace]) -> dict[str, dict[str, float]]:
    """Excess misses of single averages, of the choice, and of the choice with one number changed."""
    print("NVMe misses beyond Belady's bound, % of the bound (mean over 10, 17, 25 and 35 % of the experts)\n")
    results, lines = {}, []
    for decay in (*ONE_AVERAGE, DECAY, *NEIGHBOURS):
        found = {name: excess(trace, decay) for name, trace in traces.items()}
        mean = float(np.mean(list(found.values())))
        if decay.fast_share:
            label = f"slow {decay.slow:g}, fast {decay.fast:g}, share {decay.fast_share:g}"
        else:
            label = f"one average, {decay.slow:g}"
        results[label] = found | {"mean": mean}
        mark = "**" if decay == DECAY else ""
        lines.append([f"{mark}{label}{mark}", *(f"{100 * v:.1f}" for v in (*found.values(), mean))])
    markdown(["decay per token", *traces, "mean"], lines)
    return results


def warmed(trace: Trace, slots: np.ndarray, profile: Trace, weight: float) -> Replay:
    """A replay that starts with the experts that another trace picked most, as the engine starts with a profile."""
    seeds = {}
    for number, counts in expert_counts(profile).items():
        frequency = shrunk(counts, profile.tokens)
        order = hottest_first(frequency)[: slots[number].sum()]
        seeds[number] = (order, weight * frequency[order])
    return replay(trace, slots, seeds=seeds)


def warm_table(pairs: Sequence[tuple[str, Trace, str, Trace]]) -> dict[str, dict[str, list[float]]]:
    """NVMe share of the first tokens, cold and warm."""
    print("NVMe share of the first tokens, %, VRAM 20 %, DRAM 15 %; weight: of the profile's picks per token\n")
    lines, results = [], {}
    for profile_name, profile, name, trace in pairs:
        slots = even_slots(trace, TWO_TIERS[0].vram, TWO_TIERS[0].dram)
        runs = {"cold": replay(trace, slots)}
        runs |= {f"warm, weight {weight:g}": warmed(trace, slots, profile, weight) for weight in WARM_WEIGHTS}
        for how, played in runs.items():
            shares = [float(played.miss_curve(n)[0]) for n in FIRST_TOKENS] + [played.share(NVME)]
            source = "" if how == "cold" else profile_name
            lines.append([name, how, source, *(percent(share) for share in shares)])
            results[f"{name}, {how}, {source}"] = shares
    markdown(["trace", "start", "profile of", *(f"first {n}" for n in FIRST_TOKENS), "all"], lines)
    return {"first_tokens": results}


def plot_warm(pairs: Sequence[tuple[str, Trace, str, Trace]], path: Path, window: int = 32, tokens: int = 1024) -> None:
    """NVMe share over the first tokens."""
    import io

    from matplotlib.figure import Figure

    from fomoe_io.system.files import write_atomically

    figure = Figure(figsize=(4.6 * len(pairs), 3.4), layout="constrained")
    for panel, (profile_name, profile, name, trace) in zip(
        figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True
    ):
        slots = even_slots(trace, TWO_TIERS[0].vram, TWO_TIERS[0].dram)
        runs = {"cold": replay(trace, slots)}
        runs |= {f"warm, weight {w:g}": warmed(trace, slots, profile, w) for w in WARM_WEIGHTS[1:]}
        for how, played in runs.items():
            panel.plot(
                np.arange(tokens // window) * window + window / 2,
                100 * played.miss_curve(window)[: tokens // window],
                label=how,
                linewidth=1.2,
            )
        panel.set_title(f"{name}, profile of {profile_name}", fontsize=10)
        panel.set_xlabel("tokens")
        panel.set_ylabel("NVMe share of requests, %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomically(path, image.getvalue())


def load(path: Path) -> tuple[str, Trace]:
    """A trace and its title."""
    return title(path.name), single_tokens(open_trace(path))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--warm", nargs=2, type=Path, action="append", default=[], metavar=("PROFILED", "TRACE"))
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write cache-hit-rates.png and cache-warm-start.png")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    traces = dict(load(path) for path in options.traces)
    for name, trace in traces.items():
        h = trace.header
        print(
            f"{name}: {h.model}, {len(trace.layers)} layers x {max(h.experts)} experts, top-{h.used}, "
            f"{trace.tokens} tokens"
        )
    print()
    one_tier = [name for name in EVERY_POLICY if name != STATIC]
    rows = [row for name, trace in traces.items() for row in sweep(name, trace, SIZES, one_tier)]
    policies_table(rows, SIZES)
    two = [row for name, trace in traces.items() for row in sweep(name, trace, TWO_TIERS, EVERY_POLICY)]
    tiers_table(two)
    decays = decay_table(traces)
    pairs = [(*load(profiled), *load(trace)) for profiled, trace in options.warm]
    warm = warm_table(pairs) if pairs else {}
    if options.plots:
        plot(rows, options.plots / "cache-hit-rates.png")
        if pairs:
            plot_warm(pairs, options.plots / "cache-warm-start.png")
    if options.json:
        write_json(
            options.json,
            {"rows": [row.as_json() for row in (*rows, *two)], "excess_misses": decays, "warm_start": warm},
        )


if __name__ == "__main__":
    main()
