"""How far a synthetic model's layers turn the residual stream, so that its next router is guessed as often as wanted.

`make_model.py --recall 0.85`: a guess of layer l + 1's experts from the stream before layer l's experts misses two
sublayers, those experts and the next mixer (attention or the delta rule).  With both streams' channels normal and of
cosine c the share of right guesses follows from c and the popularity (`turn_for`); sublayers whose output has t
times the stream's size turn it by c = 1 / sqrt(1 + t^2).  Mixers and experts turn it alike, so a guess from a layer's
end (`measured_recall`) is right as often as one from its middle.  What a sublayer puts out at a gain of 1 is measured
on a small model of the same widths (`measured_outputs`).
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

TRIALS, TOKENS = 400, 48

PERIOD, PROXY_LAYERS = 4, 16
"""Every fourth layer of a family may be another kind; what layers of one kind put out differs by some percent."""

FIRST_OUTPUT, SILENCE = 0.6, 1e-3
"""What a sublayer puts out at a gain of 1, until that is measured; what experts do beside it, to measure mixers."""


@dataclass(frozen=True)
class Stream:
    """Of each layer: gains of its mixer's and its experts' output, the share of the constant channel at its router."""

    mixers: np.ndarray
    experts: np.ndarray
    constant: np.ndarray


@dataclass(frozen=True)
class Embedding:
    """Standard deviation of its channels that vary; part of its energy that the constant one has."""

    deviation: float
    constant: float


def stream_for(turns: np.ndarray, start: Embedding, mixers: np.ndarray, experts: np.ndarray) -> Stream:
    """Gains with which layers turn the stream by `turns`, if sublayers put that out at a gain of 1 (of a period)."""
    growth = np.sqrt(1 + turns**2)  # of the varying channels' energy, by one of two sublayers
    energy = np.concatenate([[1.0], np.cumprod(growth[:-1] ** 2)])
    added = start.deviation * np.sqrt(energy * (growth - 1))
    varying = (1 - start.constant) * energy * growth
    return Stream(
        added / np.resize(mixers, len(turns)),
        added * np.sqrt(growth) / np.resize(experts, len(turns)),
        start.constant / (start.constant + varying),
    )


def turn_for(recall: float, shares: np.ndarray, used: int) -> float:
    """tan of the angle between two streams for which the best `used` of one router have `recall` in common."""
    random = np.random.default_rng(3)
    a, b = random.standard_normal((2, TRIALS, len(shares))) * ROUTER_NOISE
    popularity = np.log(np.sort(shares))  # sorted: layers of one law have one answer
    low, high = 0.0, 1.0
    for _ in range(14):
        cosine = (low + high) / 2
        other = cosine * a + np.sqrt(1 - cosine**2) * b
        if common(popularity + a, popularity + other, used) < recall:
            low = cosine
        else:
            high = cosine
    return float(np.sqrt(1 / cosine**2 - 1))


def common(a: np.ndarray, b: np.ndarray, used: int) -> float:
    """Share of the best `used` columns of each row that two tables have in common."""
    best = np.zeros(a.shape, bool)
    np.put_along_axis(best, np.argpartition(-a, used - 1)[:, :used], True, axis=1)
    return float(np.take_along_axis(best, np.argpartition(-b, used - 1)[:, :used], axis=1).mean())


def layer_outputs(path: Path) -> tuple[np.ndarray, Store]:
    """float32 [layers, tokens, columns] of a short text of random tokens; the model's store."""
    with Engine.open(path, EngineConfig(context_tokens=TOKENS)) as engine:
        session = engine.session()
        tokens = np.random.default_rng(4).integers(0, engine.shape.vocabulary, TOKENS)
        session.evaluate(tokens, record=("layer_output",))
        return session.records["layer_output"], engine.store


def turned(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each layer from the second on: tan^2 of the angle by which it turns the channels that vary; their size."""
    x = outputs[:, :, 1:].astype(np.float64)
    sizes = np.sqrt((x * x).mean(2, keepdims=True))
    x /= sizes
    cosines = (x[1:] * x[:-1]).mean(2).mean(1)
    return 1 / np.clip(cosines, 1e-3, 1) ** 2 - 1, sizes[:-1].mean((1, 2))


def measured_outputs(
    turn: float, start: Embedding, write: Callable[[Path, Stream], None]
) -> tuple[np.ndarray, np.ndarray]:
    """What mixers and experts put out at a gain of 1, by layer of a period; `write` makes a small model for it."""
    turns, guess = np.full(PROXY_LAYERS, min(turn, 1.0)), np.full(PERIOD, FIRST_OUTPUT)
    with tempfile.TemporaryDirectory(prefix="fomoe-recall-") as folder:
        path = Path(folder) / "model.gguf"
        stream = stream_for(turns, start, guess, guess / SILENCE)
        write(path, stream)
        energy, sizes = turned(layer_outputs(path)[0])
        mixers = np.sqrt(energy) * sizes / stream.mixers[1:]

        stream = stream_for(turns, start, by_period(mixers), guess)
        write(path, stream)
        energy, sizes = turned(layer_outputs(path)[0])
    by_mixers = 1 + (mixers * stream.mixers[1:] / sizes) ** 2
    by_experts = (1 + energy) / by_mixers
    experts = np.sqrt((by_experts - 1) * by_mixers) * sizes / stream.experts[1:]
    return by_period(mixers), by_period(experts)


def by_period(found: np.ndarray) -> np.ndarray:
    """Mean by place in the period, of layers from the second on; rounded, as processors differ in the last digits."""
    table = np.concatenate([[np.nan], found]).reshape(-1, PERIOD)
    return np.asarray(np.round(np.nanmean(table, axis=0), 3))


def measured_recall(path: Path) -> list[float]:
    """Per layer from the second on: picks of its router that the stream two sublayers before would give."""
    outputs, store = layer_outputs(path)
    used = store.metadata[f"{store.metadata['general.architecture']}.expert_used_count"]
    found = []
    for layer in range(1, len(outputs)):
        info = store.resident[f"blk.{layer}.ffn_gate_inp.weight"]
        with store.paths[info.file].open("rb") as stream:
            stream.seek(info.offset)
            router = np.frombuffer(stream.read(info.bytes), np.float32).reshape(-1, outputs.shape[2])
        x = outputs[layer - 1 : layer + 1].astype(np.float64)
        x /= np.sqrt((x * x).mean(2, keepdims=True))
        logits = x @ router.T
        found.append(common(logits[0], logits[1], used))
    return found
