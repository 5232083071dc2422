"""Speed of this tree beside that of an earlier commit, in turns: what a change of the house costs.

    git worktree add --detach /tmp/base COMMIT && (cd /tmp/base && make native)
    python bench/versus_commit.py MODEL --baseline /tmp/base [--device cuda] [--tokens 64] [--prompt 512] [--rounds 5]

Each round opens an engine in a process of its own, this tree's and the other's one after the other (who begins
alternates), reads a prompt and then single tokens, all with what each tree does by default.  Prints a markdown table:
medians, and the ratio of this tree's to the other's in each pair of runs (median, least and most).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# public names alone, as they have been since the first commit that is compared with
PROGRAM = """
import json, sys, time
import numpy as np
from fomoe_io import Engine, EngineConfig
path, device, ram, threads, prompt, tokens, seed = json.loads(sys.argv[1])
random = np.random.default_rng(seed)
with Engine.open(path, EngineConfig(device=device, ram_bytes=ram, threads=threads, context_tokens=4096)) as engine:
    session, times = engine.session(), {}
    for name, count in (("warm", 32), ("prompt", prompt)):
        session.reset()
        started = time.monotonic()
        session.prefill(random.integers(0, engine.shape.vocabulary, count))
        times[name] = count / (time.monotonic() - started)
    for token in random.integers(0, engine.shape.vocabulary, 8):
        session.decode(int(token))
    started = time.monotonic()
    for token in random.integers(0, engine.shape.vocabulary, tokens):
        session.decode(int(token))
    times["decode"] = tokens / (time.monotonic() - started)
print(json.dumps(times))
"""


def run(tree: Path, arguments: str) -> dict[str, float]:
    """Tokens a second, by what was read."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--baseline", type=Path, required=True, help="another checkout, built")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ram", type=int, help="bytes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trees = {"this": ROOT, "baseline": options.baseline.resolve()}
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for seed in range(options.rounds):
        settings = (options.device, options.ram, options.threads, options.prompt, options.tokens, seed)
        arguments = json.dumps((str(options.model.resolve()), *settings))
        for name in sorted(trees, reverse=bool(seed % 2)):
            speeds[name].append(run(trees[name], arguments))
    print("| tokens/s | this | baseline | ratio (least-most) |\n|---|---:|---:|---:|")
    for what in ("prompt", "decode"):
        this, base = ([found[what] for found in speeds[name]] for name in trees)
        ratios = [a / b for a, b in zip(this, base, strict=True)]
        middle = [statistics.median(values) for values in (this, base, ratios)]
        print(f"| {what} | {middle[0]:.2f} | {middle[1]:.2f} | {middle[2]:.3f} ({min(ratios):.3f}-{max(ratios):.3f}) |")


if __name__ == "__main__":
    main()
