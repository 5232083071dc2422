"""How well the next layer's router guesses from this layer's output, and what reading ahead by it gains.

    python bench/lookahead.py MODEL TEXT [--tokens 512] [--tiers vram=20%,dram=15%] [-o RESULTS.json]

Recall is the share of a layer's picks among the guess's first picks.  The rest decodes the same tokens with 0, 2, 4 and
8 ranks read ahead, rounds interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.storage.store import Store
from fomoe_io.system.system_card import system_card

RANKS, ROUNDS = (0, 2, 4, 8), 3


def floats(store: Store, name: str) -> np.ndarray:
    """A resident tensor of type F32."""
    info = store.resident[name]
    with store.paths[info.file].open("rb") as stream:
        stream.seek(info.offset)
        return np.frombuffer(stream.read(info.bytes), np.float32)


def recall(model: Path, tokens: list[int]) -> list[dict[str, float]]:
    """Per layer from the second on: recall of all picks and of the best two, from the layer before's output."""
    with Engine.open(model, EngineConfig(context_tokens=len(tokens))) as engine:
        s, session = engine.shape, engine.session()
        session.evaluate(tokens, record=["experts", "layer_output"])
        experts, outputs = session.records["experts"], session.records["layer_output"]
        table = []
        for layer in range(1, s.layers):
            names = (f"blk.{layer}.post_attention_norm.weight", f"blk.{layer}.ffn_norm.weight")
            norm = next(floats(engine.store, name) for name in names if name in engine.store.resident)
            router = floats(engine.store, f"blk.{layer}.ffn_gate_inp.weight").reshape(s.experts, s.columns)
            x = outputs[layer - 1].astype(np.float64)
            x = x / np.sqrt((x * x).mean(1, keepdims=True) + s.epsilon) * norm
            guess = np.argsort(-(x @ router.T), axis=1)[:, : s.used]
            found = np.array([np.isin(g, picks) for g, picks in zip(guess, experts[layer], strict=True)])
            table.append({"layer": layer, "recall": float(found.mean()), "best_two": float(found[:, :2].mean())})
        return table


def decode(model: Path, tokens: list[int], tiers: Tiers, ranks: int) -> dict[str, Any]:
    """Speed and counters with so many ranks read ahead."""
    with Engine.open(model, EngineConfig(context_tokens=len(tokens), tiers=tiers, lookahead=ranks)) as engine:
        session, started = engine.session(), time.monotonic()
        for token in tokens:
            session.decode(token)
        seconds, s = time.monotonic() - started, engine.statistics()
        return {"tokens_per_second": len(tokens) / seconds, "nvme_hits": s["tiers"]["nvme"]["hits"],
                "nvme_reads": s["tiers"]["nvme"]["reads"], **s["prefetch"]}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--tiers", type=Tiers.parse, default=Tiers(0.2, 0.15))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with Engine.open(options.model, EngineConfig()) as engine:
        tokens = engine.tokenizer.encode(options.text.read_text()[: 16 * options.tokens])[: options.tokens]
    layers = recall(options.model, tokens)
    for row in layers:
        print(f"layer {row['layer']:3}: recall {100 * row['recall']:5.1f} %, best two {100 * row['best_two']:.1f} %")
    rounds = [[decode(options.model, tokens, options.tiers, ranks) for ranks in RANKS] for _ in range(ROUNDS)]
    runs = {}
    for i, ranks in enumerate(RANKS):
        ratio = statistics.median(r[i]["tokens_per_second"] / r[0]["tokens_per_second"] for r in rounds)
        runs[ranks] = rounds[0][i] | {"speed_ratio": ratio}
        print(f"{ranks} ranks ahead: speed x{ratio:.3f}, {runs[ranks]}")
    if options.output:
        saved = {"card": system_card([options.model]), "layers": layers, "ranks": runs}
        options.output.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
