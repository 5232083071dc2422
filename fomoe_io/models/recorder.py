"""What a model is recorded with: the ops of its equations, and where its weights come from.

A model calls an op once, in the order of its equations.  A backend makes of it what it replays for every batch of
tokens: steps of a native program (:mod:`fomoe_io.cpu.recorder`) or launches of kernels (:mod:`fomoe_io.gpu.recorder`).
`Matrix`, `Vector` and `Rows` are whatever a backend makes of a weight matrix, of a small tensor of floats and of
activations, one row a token: a model hands them on and looks into none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from fomoe_io.models.rope import Rope

Matrix = TypeVar("Matrix")
Vector = TypeVar("Vector")
Rows = TypeVar("Rows")
_Matrix_co = TypeVar("_Matrix_co", covariant=True)
_Vector_co = TypeVar("_Vector_co", covariant=True)
_Matrix_contra = TypeVar("_Matrix_contra", contravariant=True)

LAYERS_AHEAD = 2
"""How many of the layers that follow are guessed at: the next one's experts are known best, and those of the one after
it keep a drive busy where the next wants little (FOMOE_LAYERS_AHEAD, csrc/gpu/device_experts.h)."""


@dataclass(slots=True)
class Activation(Generic[Rows]):
    """One value a token, in every form that its consumers read; the numbers of the forms are the backend's."""

    forms: dict[int, Rows]


class KvType(Enum):
    """What keys and values are kept as; they are computed with as floats.  The numbers are ggml's."""

    F32 = 0
    F16 = 1

    @property
    def bytes(self) -> int:
        """Of an element."""
        return 4 if self is KvType.F32 else 2

    @property
    def suffix(self) -> str:
        """In the names of kernels."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of a layer, for every position of the context; made by :meth:`Recorder.kv_cache`.

    Attributes
    ----------
    keys, values : int
        Where they lie: what the backend finds them by.
    heads, columns : int
        Of a position; each head's history is one stream.
    type : KvType
        Of their elements.
    ring : int
        So many of the last positions are kept, where a window sees no more; 0: all of the context.
    """

    keys: int
    values: int
    heads: int
    columns: int
    type: KvType
    ring: int = 0


RING_SHARE = 16
"""A ring is kept where it is at most such a part of the context: without one a session can be wound back."""


def ring_positions(window: int, context_tokens: int, batch_tokens: int) -> int:
    """Length of the ring for a window: a batch writes all its positions before its first token has read; 0: no ring."""
    positions = window + batch_tokens - 1
    return positions if window and RING_SHARE * positions <= context_tokens else 0


@dataclass(frozen=True, slots=True)
class Attention(Generic[Vector]):
    """Softmax attention of `heads` queries over the keys and values of a cache's heads.

    Attributes
    ----------
    heads : int
        A multiple of the cache's; query head h reads key head h // (heads / cache.heads).
    gated : bool
        Each head's query is followed by a gate of the same width, in the same row.
    rotated : int
        Leading columns of each head that turn with the position: pair j is columns j and j + rotated / 2.
    epsilon : float
    query_norm, key_norm : Vector or None
        Weights of the norm of each head, or of all heads together where it `norms_whole_rows`.
    query_bias, key_bias, value_bias : Vector or None
        Added before the norms; the query's is of its gate too.
    sinks : Vector or None
        One more logit of each head's softmax, not scaled, without a value.
    window : int
        Positions that a token sees, itself included; 0: all before it.
    """

    heads: int
    gated: bool
    rotated: int
    epsilon: float
    query_norm: Vector | None = None
    key_norm: Vector | None = None
    norms_whole_rows: bool = False
    query_bias: Vector | None = None
    key_bias: Vector | None = None
    value_bias: Vector | None = None
    sinks: Vector | None = None
    window: int = 0


@dataclass(frozen=True, slots=True)
class LatentAttention(Generic[Vector]):
    """Softmax attention whose heads' keys and values are made of one latent a position (MLA).

    Attributes
    ----------
    heads : int
    rotated : int
        Columns of the key, and the last of each head's query, that turn with the position: pairs are neighbours.
    epsilon : float
        Of the latent's norm.
    scale : float
        Of the scores.
    norm : Vector
        Weights of the latent's norm.
    value_columns : int
        Of each head.
    """

    heads: int
    rotated: int
    epsilon: float
    scale: float
    norm: Vector
    value_columns: int


@dataclass(frozen=True, slots=True)
class Delta(Generic[Vector]):
    """The gated delta rule.

    Attributes
    ----------
    key_heads, value_heads, head_columns : int
    grouped : bool
        Value head h reads key head h // (value_heads / key_heads), else h % key_heads.
    epsilon : float
        Of the norms: of queries and keys, and of each head's output.
    decay_rate, decay_bias : Vector
        A number a value head.
    norm : Vector
        Weights of the norm of each head's output.
    """

    key_heads: int
    value_heads: int
    head_columns: int
    grouped: bool
    epsilon: float
    decay_rate: Vector
    decay_bias: Vector
    norm: Vector


class Score(IntEnum):
    """What a router makes of its logits: softmax of all, the sigmoid of each, or nothing (csrc/experts/routing.h)."""

    SOFTMAX = 0
    SIGMOID = 1
    LOGITS = 2


@dataclass(frozen=True, slots=True)
class Router(Generic[Vector]):
    """Which experts a token goes to, and with which weights.

    Attributes
    ----------
    experts, used : int
        How many there are, and how many are taken.
    score : Score
        Weights of `LOGITS` are the softmax of the chosen ones.
    normalise : bool
        The weights are divided by their sum, but by no less than 2^-14.
    scale : float
        Of the weights, at last.
    groups, groups_used : int
        Equal runs of experts; those with the greatest sums of their two best are chosen from.
    logit_bias : Vector or None
        Added to the logits.
    bias : Vector or None
        Added to the scores for the choice alone, not for the weights.
    """

    experts: int
    used: int
    score: Score = Score.SOFTMAX
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    logit_bias: Vector | None = None
    bias: Vector | None = None

    @property
    def follows_logits(self) -> bool:
        """Whether the experts are those of the greatest logits."""
        return self.score != Score.SIGMOID and self.bias is None and self.groups == 1


@dataclass(frozen=True, slots=True)
class Experts(Generic[Vector]):
    """What a routed expert computes.

    Attributes
    ----------
    is_clamped : bool
        g sigmoid(1.702 g) (u + 1) of g = min(gate, 7) and u = up between -7 and 7, where others have silu(gate) up.
    gate_bias, up_bias, down_bias : Vector or None
        A row an expert, added to its products.
    """

    is_clamped: bool = False
    gate_bias: Vector | None = None
    up_bias: Vector | None = None
    down_bias: Vector | None = None

    @property
    def biases(self) -> tuple[Vector | None, Vector | None, Vector | None]:
        """Of gate, up and down."""
        return self.gate_bias, self.up_bias, self.down_bias


@dataclass(frozen=True, slots=True)
class Picks(Generic[Vector, Rows]):
    """A layer's experts for each token, best first; made by :meth:`Recorder.route`."""

    layer: int
    router: Router[Vector]
    logits: Rows
    ids: Rows
    weights: Rows


class WeightSource(Protocol[_Matrix_co, _Vector_co]):
    """The tensors of a model by name, but for the embedding and the routed experts, which the backend has."""

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        ...

    def __contains__(self, name: str, /) -> bool:
        """Whether the model has the tensor."""
        ...

    def matrix(self, name: str, columns: int, rows: int, part: slice | None = None, groups: int = 1) -> _Matrix_co:
        """A [rows, columns] matrix, or a `part` of its rows; FormatError when the file's shape differs.

        Rows that come in `groups` have one more dimension in the file.
        """
        ...

    def vector(self, name: str, shape: tuple[int, ...], part: slice | None = None) -> _Vector_co:
        """A small tensor as floats, or a `part` of it; FormatError when the file's shape differs."""
        ...


class Recorder(Protocol[_Matrix_contra, Vector, Rows]):
    """The ops.  `name` is of the rows that an op makes: layers that say the same name and width share them."""

    def rows(self, name: str, columns: int) -> Rows:
        """Rows of floats."""
        ...

    # ---- dense ----

    def embed(self, output: Rows) -> None:
        """output = the tokens' rows of the embedding"""
        ...

    def norm(
        self, x: Rows, weight: Vector, epsilon: float, *, name: str, feeds: Sequence[_Matrix_contra],
        experts_of: int | None = None, of_outputs: bool = False,
    ) -> Activation[Rows]:  # fmt: skip
        """x / sqrt(mean(x^2) + epsilon) * weight, for products with the matrices it `feeds`.

        `experts_of` is the layer whose routed experts read it too.  `of_outputs`: of the tokens that want logits alone.
        """
        ...

    def convert(self, x: Rows, *, name: str, feeds: Sequence[_Matrix_contra]) -> Activation[Rows]:
        """x, for products with the matrices it `feeds`."""
        ...

    def silu_mul(self, gate: Rows, up: Rows, *, name: str, feeds: Sequence[_Matrix_contra]) -> Activation[Rows]:
        """gate * sigmoid(gate) * up, for products with the matrices it `feeds`."""
        ...

    def mat_mul(self, products: Sequence[tuple[_Matrix_contra, Activation[Rows], Rows]]) -> None:
        """output = matrix x, for each (matrix, x, output); none depends on another."""
        ...

    def mat_mul_add(
        self, matrix: _Matrix_contra, x: Activation[Rows], output: Rows, bias: Vector | None = None
    ) -> None:
        """output += matrix x [+ bias]; a norm of the output comes before it is added to again."""
        ...

    def logits(self, matrix: _Matrix_contra, x: Activation[Rows]) -> None:
        """logits = matrix x; x is a norm `of_outputs`."""
        ...

    def ungroup(self, x: Rows, groups: int, first: int, length: int, output: Rows, at: int) -> None:
        """output[at + g length + i] = x[g width + first + i] for i < length, in each of `groups` of equal width."""
        ...

    # ---- attention ----

    def rope_table(self, rope: Rope, *, name: str = "rope") -> Rows:
        """magnitude * (cos, sin)(position * frequency) of each pair."""
        ...

    def kv_cache(self, heads: int, columns: int, window: int = 0) -> KvCache:
        """Room for a layer's keys and values, of which a token sees the last `window`; 0: all."""
        ...

    def attention(
        self, query: Rows, key: Rows, value: Rows, table: Rows, cache: KvCache, op: Attention[Vector]
    ) -> Rows:
        """softmax(q K^T / sqrt(columns) [, sink]) V [* sigmoid(gate)] of each head.

        K and V end with the tokens' own k and v.
        q = rope(norm(query + query_bias)), k = rope(norm(key + key_bias)), v = value + value_bias; query, key and value
        may be overwritten.
        """
        ...

    def latent_attention(
        self, query: Rows, latent: Rows, key: Rows, table: Rows, w_key: _Matrix_contra, w_value: _Matrix_contra,
        op: LatentAttention[Vector],
    ) -> Rows:  # fmt: skip
        """W_value sum_t p_t l_t of each head, p = softmax(scale ((W_key q_own) . l_t + rope(q_turned) . rope(k_t))).

        l = norm(latent), which is kept with the turned key; latent may be overwritten.  Each head has its own rows of
        `w_key` [latent, own columns] and `w_value` [value_columns, latent].
        """
        ...

    # ---- gated delta rule ----

    def conv(self, x: Rows, weight: Vector, taps: int, *, name: str) -> Rows:
        """silu(sum_i weight[c, i] x_c(t - taps + 1 + i)) of each channel c, with zeros before the first token."""
        ...

    def delta(self, qkv: Rows, beta: Rows, alpha: Rows, gate: Rows, op: Delta[Vector], *, name: str) -> Rows:
        """norm(S^T q) * silu(gate) of each value head, after S = decay S; S += k (sigmoid(beta) (v - S^T k))^T.

        decay = exp(decay_rate * softplus(alpha + decay_bias)); rows of qkv are all queries, all keys, all values;
        q and k have length 1, and q is divided by sqrt(head_columns).  S is zero before the first token.
        """
        ...

    # ---- experts ----

    def route(self, layer: int, logits: Rows, router: Router[Vector]) -> Picks[Vector, Rows]:
        """p = score(logits + logit_bias); of equal p + bias the first; weights p [/ their sum] * scale."""
        ...

    def experts_begin(self, picks: Picks[Vector, Rows], x: Activation[Rows], op: Experts[Vector]) -> None:
        """Bring the picked experts; what is at hand may be computed; x: the norm that has named the layer."""
        ...

    def beside(self) -> AbstractContextManager[None]:
        """What is recorded inside reads the last norm alone, and may run beside what follows until `experts_end`."""
        ...

    def experts_end(
        self, picks: Picks[Vector, Rows], x: Activation[Rows], op: Experts[Vector], output: Rows,
        shared: Rows | None, shared_gate: Rows | None,
    ) -> None:  # fmt: skip
        """output += sum_e weight_e down_e(silu(gate_e x) * up_e x) [+ [sigmoid(shared_gate)] shared]"""
        ...

    def lookahead(
        self,
        layer: int,
        ahead: int,
        x: Rows,
        weight: Vector,
        epsilon: float,
        matrix: _Matrix_contra,
        router: Router[Vector],
    ) -> None:
        """The experts that `layer`, so many ahead, would take if the layers before it left x: a guess, of no effect."""
        ...

    def layer_end(self, layer: int, x: Rows) -> None:
        """x is what the layer leaves."""
        ...
