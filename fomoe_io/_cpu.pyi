from collections.abc import Sequence
from typing import Any

import numpy as np

from fomoe_io._gate import Gate
from fomoe_io.models.recorder import Router
from fomoe_io.models.rope import Rope

FloatVector = np.ndarray | None

class Kernels:
    name: str
    def __init__(self, base_path: bytes | None = None, cpu_path: bytes | None = None) -> None: ...
    @property
    def address(self) -> int: ...
    def type_info(self, type: int) -> tuple[int, int, int] | None: ...
    def row_bytes(self, type: int, elements: int) -> int: ...

class Team:
    threads: int
    def __init__(self, threads: int) -> None: ...

class Matrix:
    kernels: Kernels
    owner: object
    def __init__(
        self,
        kernels: Kernels,
        address: int,
        type: int,
        rows: int,
        columns: int,
        float_activations: bool,
        owner: object,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def activation_type(self) -> int: ...

class Rows:
    def __init__(self, kernels: Kernels, columns: int, tokens: int, type: int = 0) -> None: ...
    @property
    def columns(self) -> int: ...
    @property
    def type(self) -> int: ...
    @property
    def stride_bytes(self) -> int: ...

class Experts:
    kernels: Kernels
    most: int
    counts: tuple[int, ...]
    substitutes: bool
    def __init__(
        self,
        kernels: Kernels,
        shape: dict[str, int],
        layers: list[dict[str, Any] | None],
        slots: np.ndarray,
        policy: int,
        decay: tuple[float, float, float],
        reader: int,
        keep: object,
    ) -> None: ...
    @staticmethod
    def workspace_bytes(shape: dict[str, int]) -> int: ...
    def warm(self, layer: int, experts: np.ndarray, scores: np.ndarray, gate: Gate | None = None) -> int: ...
    def stage(self, pool: int, each: int) -> None: ...
    def set_lookahead(self, ranks: int) -> None: ...
    def recall(self) -> np.ndarray: ...
    def set_car(self, car: int) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def picks(self) -> np.ndarray: ...
    def tiers(self) -> np.ndarray: ...
    def scores(self, layer: int) -> np.ndarray: ...
    def failure(self) -> tuple[int, int]: ...

class Trace:
    def __init__(self, file: int, batch: int, used: int, most: int) -> None: ...
    @staticmethod
    def held(records: int, batch: int, used: int) -> Trace: ...
    def take(self, held: list[Trace]) -> None: ...
    def seeds(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None: ...
    def flush(self) -> int: ...

class Program:
    kernels: Kernels
    def __init__(self, team: Team, kernels: Kernels, scratch_floats: int) -> None: ...
    def trace(self, trace: Trace | None) -> None: ...
    @property
    def steps(self) -> int: ...
    def embed(self, matrix: Matrix, output: Rows, file: int, offset: int) -> None: ...
    def norm(self, input: Rows, weight: FloatVector, epsilon: float, outputs: list[Rows], of_outputs: bool) -> None: ...
    def quantize(self, input: Rows, output: Rows) -> None: ...
    def mat_mul(
        self,
        products: list[tuple[Matrix, Rows, Rows | None, bool]],
        of_outputs: bool = False,
        to_logits: bool = False,
    ) -> None: ...
    def silu_mul(self, gate: Rows, up: Rows, output: Rows) -> None: ...
    def conv(self, input: Rows, output: Rows, weight: FloatVector, state_offset: int, taps: int) -> None: ...
    def delta(
        self,
        qkv: Rows,
        beta: Rows,
        alpha: Rows,
        gate: Rows,
        output: Rows,
        decay_rate: FloatVector,
        decay_bias: FloatVector,
        norm_weight: FloatVector,
        state_offset: int,
        key_heads: int,
        value_heads: int,
        head_columns: int,
        grouped: bool,
        epsilon: float,
    ) -> None: ...
    def rope_table(self, output: Rows, rope: Rope) -> None: ...
    def kv(
        self,
        query: Rows,
        key: Rows,
        value: Rows,
        table: Rows,
        query_norm: FloatVector,
        key_norm: FloatVector,
        key_offset: int,
        value_offset: int,
        context: int,
        ring: int,
        type: int,
        heads: int,
        kv_heads: int,
        head_columns: int,
        query_stride: int,
        rotated: int,
        epsilon: float,
        biases: Sequence[FloatVector],
    ) -> None: ...
    def attention(
        self,
        query: Rows,
        output: Rows,
        key_offset: int,
        value_offset: int,
        context: int,
        type: int,
        heads: int,
        kv_heads: int,
        head_columns: int,
        query_stride: int,
        gated: bool,
        sinks: FloatVector = None,
        window: int = 0,
        value_columns: int = 0,
        scale: float = 0,
        ring: int = 0,
    ) -> None: ...
    def latent(
        self,
        query: Rows,
        latent: Rows,
        key: Rows,
        table: Rows,
        absorbed: Rows,
        key_offset: int,
        type: int,
        heads: int,
        rotated: int,
    ) -> None: ...
    def head_mul(self, matrix: Matrix, input: Rows, output: Rows, heads: int, at: int) -> None: ...
    def route(self, logits: Rows, ids: Rows, weights: Rows, layer: int, router: Router[np.ndarray]) -> None: ...
    def experts_begin(
        self, experts: Experts, logits: Rows, ids: Rows, weights: Rows, layer: int, router: Router[np.ndarray]
    ) -> None: ...
    def experts(
        self,
        experts: Experts,
        ids: Rows,
        gate_input: Rows,
        up_input: Rows,
        layer: int,
        biases: Sequence[FloatVector] = ...,
        is_clamped: bool = False,
    ) -> None: ...
    def combine(
        self,
        experts: Experts,
        weights: Rows,
        output: Rows,
        used: int,
        shared: Rows | None,
        shared_gate: Rows | None,
    ) -> None: ...
    def lookahead(
        self,
        experts: Experts,
        input: Rows,
        weight: np.ndarray,
        epsilon: float,
        router: Matrix,
        logits: Rows,
        layer: int,
        how: Router[np.ndarray],
    ) -> None: ...
    def ungroup(self, input: Rows, output: Rows, groups: int, first: int, length: int, at: int) -> None: ...
    def add_bias(self, rows: Rows, bias: FloatVector) -> None: ...
    def layer_end(self, input: Rows, layer: int) -> None: ...
    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        states: np.ndarray,
        output_rows: np.ndarray,
        logits: np.ndarray,
        experts: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        router_logits: np.ndarray | None = None,
        layer_output: np.ndarray | None = None,
        final_norm: np.ndarray | None = None,
        substitute: bool = False,
        gate: Gate | None = None,
    ) -> int: ...
