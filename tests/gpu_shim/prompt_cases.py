"""Checks of the attention of many tokens at once (kernels/prompt_attention.h), by any runner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe_io.gpu import kernels
from tests.gpu_shim import reference as ref
from tests.gpu_shim.cases import CLOSE, Handle, Runner, normal, poison


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of a launch.

    Attributes
    ----------
    heads, kv_heads, dim : int
    spans : sequence of (session, first position, tokens), in the order of the launch
    window : int
        0: none.
    ring : int
        Rows of a cache that are used again; 0: as many as there are positions.
    is_gated, has_sinks : bool
    """

    heads: int
    kv_heads: int
    dim: int
    spans: tuple[tuple[int, int, int], ...]
    window: int = 0
    ring: int = 0
    is_gated: bool = False
    has_sinks: bool = False

    @property
    def sessions(self) -> int:
        return 1 + max(session for session, _, _ in self.spans)

    @property
    def context(self) -> int:
        return max(first + tokens for _, first, tokens in self.spans)

    def token_spans(self) -> list[tuple[int, int]]:
        """(session, position) of each token."""
        return [(session, first + i) for session, first, tokens in self.spans for i in range(tokens)]


@dataclass(slots=True)
class Inputs:
    """Of all tokens; keys and values of each session: [positions][kv_heads][dim]."""

    q: np.ndarray
    gate: np.ndarray
    sinks: np.ndarray | None
    keys: list[np.ndarray]
    values: list[np.ndarray]

    @classmethod
    def random(cls, rng: np.random.Generator, p: Prompt, element: type) -> Inputs:
        """Fresh ones."""
        tokens = len(p.token_spans())
        rows = [
            [normal(rng, p.context, p.kv_heads, p.dim).astype(element) for _ in range(p.sessions)] for _ in range(2)
        ]
        q, gate = normal(rng, tokens, p.heads, p.dim) * 3, normal(rng, tokens, p.heads, 2 * p.dim)
        return cls(q, gate, normal(rng, p.heads) if p.has_sinks else None, *rows)


def in_ring(rows: np.ndarray, ring: int, written: int) -> np.ndarray:
    """A cache of so many rows once `written` positions are there, later ones over earlier ones."""
    if not ring:
        return rows
    kept = np.zeros((ring, *rows.shape[1:]), rows.dtype)
    for position in range(written):
        kept[position % ring] = rows[position]
    return kept


def run_prompt(runner: Runner, p: Prompt, cache: str, inputs: Inputs, chosen: list[int] | None = None) -> np.ndarray:
    """y of the chosen tokens (by default all), read in one launch."""
    spans = p.token_spans()
    chosen = list(range(len(spans))) if chosen is None else chosen
    written = [max((at + 1 for s, at in spans if s == session), default=0) for session in range(p.sessions)]
    caches: list[Handle] = []  # keys, then values, of each session in one piece of memory
    for session in range(p.sessions):
        pair = [in_ring(rows[session], p.ring, written[session]) for rows in (inputs.keys, inputs.values)]
        caches.append(runner.put(np.stack(pair)))
    one = p.ring or p.context
    value_place = one * p.kv_heads * p.dim * inputs.keys[0].itemsize
    if p.sessions > 1:
        states = runner.put(np.array([caches[spans[i][0]].pointer for i in chosen], np.uint64))
        keys, values = 0, value_place
    else:
        states, keys, values = None, caches[0].pointer, caches[0].pointer + value_place
    positions = runner.put(np.array([spans[i][1] for i in chosen], np.int32))
    y = runner.put(poison(len(chosen), p.heads * p.dim))
    gate = runner.put(inputs.gate[chosen]) if p.is_gated else None
    runner.launch(
        f"attention_prompt_{cache}_{p.dim}", kernels.attention_prompt_grid(p.heads, p.kv_heads, len(chosen)),
        runner.put(inputs.q[chosen]), keys, values, positions, states, gate,
        None if inputs.sinks is None else runner.put(inputs.sinks), y, len(chosen), p.heads, p.kv_heads, 2 * p.dim,
        p.dim**-0.5, p.window, p.ring,
    )  # fmt: skip
    return y.get()


def expected(p: Prompt, inputs: Inputs) -> np.ndarray:
    """In float64."""
    want = []
    for i, (session, position) in enumerate(p.token_spans()):
        keys, values = (rows[session].astype(np.float64) for rows in (inputs.keys, inputs.values))
        q, at = inputs.q[i : i + 1].astype(np.float64), np.array([position])
        row = ref.attention(q, keys, values, at, p.dim**-0.5, inputs.sinks, p.window)[0]
        if p.is_gated:
            row = row * ref.sigmoid(inputs.gate[i, :, : p.dim].astype(np.float64))
        want.append(row.ravel())
    return np.stack(want)


def check_prompt_attention(runner: Runner, rng: np.random.Generator, cache: str, p: Prompt) -> None:
    """Every row is right, whatever the others are."""
    inputs = Inputs.random(rng, p, np.float32 if cache == "f32" else np.float16)
    got, want = run_prompt(runner, p, cache, inputs), expected(p, inputs)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert ref.error(one, other) < 2 * CLOSE, p.token_spans()[i]


def check_prompt_neighbours(runner: Runner, rng: np.random.Generator, cache: str, p: Prompt) -> None:
    """A token's bits are those it has alone, in another order, and beside tokens that are not numbers."""
    inputs = Inputs.random(rng, p, np.float32 if cache == "f32" else np.float16)
    together, spans = run_prompt(runner, p, cache, inputs), p.token_spans()
    for chosen in ([0], [len(spans) - 1], list(rng.permutation(len(spans))), list(range(1, len(spans), 3))):
        np.testing.assert_array_equal(run_prompt(runner, p, cache, inputs, chosen), together[chosen])
    session, position = spans[len(spans) // 2]
    for rows in (inputs.keys, inputs.values):
        rows[session][position] = np.nan
    inputs.q[len(spans) // 2] = np.nan
    got = run_prompt(runner, p, cache, inputs)
    for i, (other, at) in enumerate(spans):
        sees = other == session and at >= position and not (p.window and at - p.window >= position)
        if sees:
            assert np.isnan(got[i]).all(), (other, at)
        else:
            np.testing.assert_array_equal(got[i], together[i], err_msg=str((other, at)))
