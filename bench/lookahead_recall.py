"""How far a synthetic model's layers turn the residual stream, so that its next router is guessed as often as wanted.

`make_model.py --recall 0.85`: a guess of layer l + 1's experts from the stream before layer l's experts misses two
sublayers.  With both streams' channels normal and of cosine c the share of right guesses follows from c alone
(`cosine_for`); sublayers whose output has t times the stream's size turn it by c = 1 / sqrt(1 + t^2).  What a
sublayer puts out is measured on a small model of the same widths (`stream_for`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomoe_io import Engine, EngineConfig
from fomoe_io.storage.store import Store

ROUTER_NOISE = np.pi / np.sqrt(6)
"""Standard deviation of a router's logits beside the popularity: a Gumbel variable's."""

TRIALS, TOKENS, ROUNDS, PROXY_LAYERS = 400, 48, 3, 4


@dataclass(frozen=True)
class Stream:
    """Of each layer: the gain of its sublayers' outputs, and the share of the constant channel at its router."""

    gains: np.ndarray
    constant: np.ndarray


def growing(first: np.ndarray, turn: float, constant: float, layers: int) -> Stream:
    """Gains that keep their size beside a stream that grows by them; `first` is of layer 0 to 3, repeated."""
    energy = (1 + turn**2) ** np.arange(layers)  # of the channels that vary, at a layer's input
    gains = np.resize(first, layers) * np.sqrt(energy)
    varying = (1 - constant) * energy * (1 + turn**2 / 2)
    return Stream(gains, constant / (constant + varying))


def cosine_for(recall: float, shares: np.ndarray, used: int) -> float:
    """Cosine of two streams for which the best `used` of one router have `recall` in common."""
    random = np.random.default_rng(3)
    a, b = random.standard_normal((2, TRIALS, len(shares))) * ROUTER_NOISE
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        other = middle * a + np.sqrt(1 - middle**2) * b
        if common(np.log(shares) + a, np.log(shares) + other, used) < recall:
            low = middle
        else:
            high = middle
    return high


def common(a: np.ndarray, b: np.ndarray, used: int) -> float:
    """Share of the best `used` columns of each row that two tables have in common."""
    best = [np.argsort(-x, axis=1)[:, :used] for x in (a, b)]
    return float(np.mean([np.isin(x, y).mean() for x, y in zip(*best, strict=True)]))


def layer_outputs(path: Path) -> tuple[np.ndarray, Store]:
    """float32 [layers, tokens, columns] of a short text of random tokens; the model's store."""
    with Engine.open(path, EngineConfig(context_tokens=TOKENS)) as engine:
        session = engine.session()
        tokens = np.random.default_rng(4).integers(0, engine.shape.vocabulary, TOKENS)
        session.evaluate(tokens, record=("layer_output",))
        return session.records["layer_output"], engine.store


def turns(outputs: np.ndarray) -> np.ndarray:
    """tan of the angle by which each layer from the second on turns the channels that vary: [layers - 1]."""
    x = outputs[:, :, 1:].astype(np.float64)
    x /= np.sqrt((x * x).sum(2, keepdims=True))
    cosines = (x[1:] * x[:-1]).sum(2).mean(1)
    return np.asarray(np.sqrt(1 / np.clip(cosines, 1e-3, 1) ** 2 - 1))


def stream_for(turn: float, constant: float, layers: int, write: Callable[[Path, int, Stream], None]) -> Stream:
    """Gains with which layers turn the stream by `turn`; `write` makes a small model of so many layers with some."""
    first = np.full(4, turn / 2)
    with tempfile.TemporaryDirectory(prefix="fomoe-recall-") as folder:
        for _ in range(ROUNDS):
            path = Path(folder) / "model.gguf"
            write(path, 2 * PROXY_LAYERS, growing(first, turn, constant, 2 * PROXY_LAYERS))
            found = np.concatenate([[np.nan], turns(layer_outputs(path)[0])]).reshape(2, PROXY_LAYERS)
            first = first * turn / np.nanmean(found, axis=0)
    return growing(first, turn, constant, layers)


def measured_recall(path: Path) -> list[float]:
    """Per layer from the second on: picks of its router that the stream two sublayers before would give."""
    outputs, store = layer_outputs(path)
    found = []
    for layer in range(1, len(outputs)):
        info = store.resident[f"blk.{layer}.ffn_gate_inp.weight"]
        with store.paths[info.file].open("rb") as stream:
            stream.seek(info.offset)
            router = np.frombuffer(stream.read(info.bytes), np.float32).reshape(-1, outputs.shape[2])
        x = outputs[layer - 1 : layer + 1].astype(np.float64)
        x /= np.sqrt((x * x).mean(2, keepdims=True))
        logits = x @ router.T
        found.append(common(logits[0], logits[1], store.metadata["qwen35moe.expert_used_count"]))
    return found
