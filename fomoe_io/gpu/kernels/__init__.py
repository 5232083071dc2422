"""The GPU kernels: their sources, their signatures, and the grids they are launched with.

The sources are one translation unit (``fomoe.hip`` and its headers) for hipRTC, clang and NVRTC.  Signatures are
spelled here once more because a launch passes untyped bytes; a test compares them with what a compiler sees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import gguf

CHUNK_BLOCKS = 8  # planes.h
PLANES = {"q4_k": "q4_k_planes", "q6_k": "q6_k_planes", "q8_0": "q8_0_planes"}
"""Of formats of files: how a device keeps matrices whose rows are whole chunks (planes.h)."""

STORED_TYPES = ("q4_k", "q5_k", "q6_k", "q8_0", "mxfp4", "f16", "bf16", "f32")
"""Of files."""

QUANTIZED_TYPES = ("q4_k", "q4_k_planes", "q5_k", "q6_k", "q6_k_planes", "q8_0", "q8_0_planes", "mxfp4")
FLOAT_TYPES = ("f16", "bf16", "f32")
TYPES = QUANTIZED_TYPES + FLOAT_TYPES
"""Of matrices of products."""

EXPANDED_TYPES = tuple(name for name in QUANTIZED_TYPES if name != "mxfp4")  # half.h
HALF_TYPES = (*EXPANDED_TYPES, "f16")  # gpu/products.py: those that lose little as halves
PRODUCT_TYPES = (*HALF_TYPES, "f32")  # gpu/products.py: those that the vendor's library multiplies
UNIT_ELEMENTS = {"q4_k": 64, "q5_k": 64, "q6_k": 32, "q8_0": 32, "mxfp4": 32, "f16": 8, "bf16": 8, "f32": 4}  # units.h
UNIT_ELEMENTS |= {planes: UNIT_ELEMENTS[stored] for stored, planes in PLANES.items()}
BLOCKS = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] for name in STORED_TYPES}
"""(elements, bytes) of a block of each type."""
BLOCKS |= {planes: BLOCKS[stored] for stored, planes in PLANES.items()}

HEAD_SIZES = (32, 64, 128, 256)  # attention.h

MAIN_SOURCE = "fomoe.hip"
MOST_EXPERTS = 1024  # router.h: of a layer
MOST_PICKS = 64  # experts.h: of a token
ANSWER_BYTES = 16  # experts.h: of a pair in struct answer


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a kernel is called.

    Attributes
    ----------
    threads : threads of a block (the kernels know their own block size)
    signature : a letter an argument: p pointer, q 64-bit integer, i 32-bit integer, f float
    """

    threads: int
    signature: str


def sources() -> dict[str, str]:
    """All files of the translation unit by name."""
    folder = resources.files(__name__)
    return {f.name: f.read_text() for f in folder.iterdir() if f.name.endswith((".hip", ".h"))}


def _read_tuning() -> dict[str, int]:
    text = resources.files(__name__).joinpath("tuning.h").read_text()
    return {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", text)}


TUNING = _read_tuning()
FREE_TUNING = set(TUNING) - {"MAT_VEC_ROWS", "MAT_VEC_WARPS", "DOWN_WARPS", "DOWN_ROWS"}
"""What shapes no grid: a launch is recorded without knowing it."""


def kernels(tuning: Mapping[str, int] | None = None) -> dict[str, Kernel]:
    """Every kernel by name, for the given overrides of ``tuning.h``."""
    size = TUNING | dict(tuning or {})
    table = {
        "quantize_q8": Kernel(256, "ppi"),
        "silu_mul": Kernel(256, "ppppi"),
        "rms_norm": Kernel(512, "pppppif"),
        "add_bias": Kernel(256, "ppi"),
        "ungroup": Kernel(256, "ppiiiiii"),
        "attention_merge": Kernel(256, "pppppiiiipi"),
        "latent_merge": Kernel(256, "ppppiii"),
        "conv_step": Kernel(128, "pppppiii"),
        "conv_token": Kernel(128, "pppppii"),
        "gated_norm": Kernel(128, "pppppiif"),
        "route": Kernel(512, "pppiiif"),
        "route_by": Kernel(512, "pppppiiiifp"),
        "route_in_groups": Kernel(512, "pppppiiiifpii"),
        "begin_run": Kernel(512, "pppppii"),
        "resolve_picks": Kernel(512, "ppppppppi"),
        "post_guesses": Kernel(32, "pppi"),
        "substitute_and_post": Kernel(512, "ppppppppiii"),
        "route_and_resolve": Kernel(512, "pppppppppiiif"),
        "substitute_and_resolve": Kernel(512, "pppppppppppiii"),
        "wait_for_misses": Kernel(256, "ppppppi"),
        "hand_over": Kernel(512, "pppppi"),
        "take_over": Kernel(512, "ppppppi"),
        "take_early": Kernel(512, "ppppppi"),
        "combine_picks": Kernel(256, "pppppiipii"),
        "gather_floats": Kernel(512, "ppppiiiippppiii"),
        "gather_hidden": Kernel(512, "ppiippppiii"),
        "leave_hidden": Kernel(256, "pppppiii"),
        "fetch_hidden": Kernel(256, "pppppiii"),
        "leave_floats": Kernel(256, "ppiii"),
        "fetch_floats": Kernel(256, "ppiii"),
        "read_memory": Kernel(256, "pqpi"),
        "to_halves": Kernel(256, "ppq"),
        "probe_wait": Kernel(32, "pp"),
        "probe_header": Kernel(32, "pppp"),
        "probe_echo": Kernel(32, "ppi"),
    }
    for name in EXPANDED_TYPES:
        table[f"expand_half_{name}"] = Kernel(256, "ppq")
    for name in PLANES:
        table[f"to_planes_{name}"] = Kernel(128, "p")
    for name in TYPES:
        table[f"mat_mul_{name}"] = Kernel(128, "pppiii")
        table[f"heads_mat_vec_{name}"] = Kernel(32 * size["MAT_VEC_WARPS"], "pppiii")
        table[f"heads_mat_mul_{name}"] = Kernel(128, "pppiiii")
        table[f"mat_vec_{name}"] = Kernel(32 * size["MAT_VEC_WARPS"], "pppiii")
        table[f"mat_vec_many_{name}"] = Kernel(32 * size["MAT_VEC_WARPS"], "ppppppppiiiipii")
    for name in STORED_TYPES:
        table[f"expand_{name}"] = Kernel(32, "pppi")
        table[f"group_gate_up_{name}"] = Kernel(128, "ppqqpppiiipi")
        table[f"group_down_{name}"] = Kernel(128, "ppqppiiii")
        table[f"experts_gate_up_{name}"] = Kernel(32 * size["GATE_UP_WARPS"], "pppppqqpppiiipii")
        table[f"experts_down_{name}"] = Kernel(32 * size["DOWN_WARPS"], "ppqpppppiiipii")
    for cache in ("f32", "f16"):
        table[f"latent_prepare_{cache}"] = Kernel(256, "pppppppppppiiiif")
        table[f"latent_attention_{cache}"] = Kernel(256, "ppppppiiiif")
        table[f"attention_prepare_{cache}"] = Kernel(256, "pppppppppppiiiiifi")
        for dim in HEAD_SIZES:
            table[f"attention_{cache}_{dim}"] = Kernel(256, "ppppppiiifii")
            table[f"attention_prompt_{cache}_{dim}"] = Kernel(128, "ppppppppiiiifii")
    for dim in (64, 128):
        table[f"delta_step_{dim}"] = Kernel(128, "ppppppppiiiiif")
    return table


def up(value: int, step: int) -> int:
    """``value / step``, rounded up."""
    return -(-value // step)


def q8_row_bytes(columns: int) -> int:
    """Bytes of one vector quantized by ``quantize_q8`` (activations.h)."""
    return (columns + columns // 4 + 15) // 16 * 16


MANY_ROWS = 1024
"""From so many rows on a matrix fills the device without sharing its rows among warps (docs/gpu.md)."""


def split_of(name: str, columns: int, rows: int = 0, tuning: Mapping[str, int] | None = None) -> int:
    """The ``split`` of ``mat_vec_*`` and ``mat_mul_*``: warps that share a row, each with at least one unit a lane."""
    if rows >= MANY_ROWS:
        return 1
    split = (TUNING | dict(tuning or {}))["MAT_VEC_WARPS"]
    while split > 1 and columns < 32 * split * UNIT_ELEMENTS[name]:
        split //= 2
    return split


def mat_vec_grid(
    name: str, rows: int, split: int, tokens: int = 1, tuning: Mapping[str, int] | None = None
) -> tuple[int, int, int]:
    """Grid of ``mat_vec_*``."""
    return up(rows, mat_vec_rows(name, split, tuning)), tokens, 1


def mat_vec_rows(name: str, split: int = 1, tuning: Mapping[str, int] | None = None) -> int:
    """Rows of a block of ``mat_vec_*``."""
    size = TUNING | dict(tuning or {})
    return size["MAT_VEC_WARPS"] // split * (size["MAT_VEC_ROWS"] if name in QUANTIZED_TYPES else 1)


TILE_TOKENS = 32
FEW_ROWS = 16
"""Float matrices of fewer rows are multiplied by `mat_vec_*` for many tokens, too: tiles of 64 rows would be empty."""
MAT_VEC_MANY = 4  # mat_vec.h: matrices of a mat_vec_many launch
NORM_MOST_COLUMNS = 16384  # norms.h
CONV_MOST_TAPS = 8  # delta.h


def has_planes(name: str, columns: int) -> bool:
    """Whether a device keeps a matrix of that format with rows of so many columns in planes (planes.h)."""
    return name in PLANES and columns % (CHUNK_BLOCKS * BLOCKS[name][0]) == 0


def to_planes_grid(name: str, nbytes: int) -> tuple[int, int, int]:
    """Grid of ``to_planes_*``, for so many bytes of weights."""
    return nbytes // (CHUNK_BLOCKS * BLOCKS[name][1]), 1, 1


def mat_mul_grid(rows: int, tokens: int) -> tuple[int, int, int]:
    """Grid of ``mat_mul_*``."""
    return up(rows, 64), up(tokens, TILE_TOKENS), 1


def group_gate_up_grid(rows: int, tiles: int) -> tuple[int, int, int]:
    """Grid of ``group_gate_up_*``."""
    return rows // 32, tiles, 1


def group_down_grid(rows: int, tiles: int) -> tuple[int, int, int]:
    """Grid of ``group_down_*``."""
    return up(rows, 64), tiles, 1


def expand_half_grid(name: str, elements: int) -> tuple[int, int, int]:
    """Grid of ``expand_half_*``."""
    return up(elements, 256 * UNIT_ELEMENTS[name]), 1, 1


def to_halves_grid(elements: int) -> tuple[int, int, int]:
    """Grid of ``to_halves``."""
    return up(elements, 1024), 1, 1


def gate_up_grid(rows: int, pairs: int) -> tuple[int, int, int]:
    """Grid of ``experts_gate_up_*``; rows must be a multiple of 32."""
    return rows // 32, pairs, 1


def down_grid(rows: int, tokens: int = 1, tuning: Mapping[str, int] | None = None) -> tuple[int, int, int]:
    """Grid of ``experts_down_*``."""
    size = TUNING | dict(tuning or {})
    return up(rows, size["DOWN_WARPS"] * size["DOWN_ROWS"]), tokens, 1


GATHER_BLOCKS = 16
"""Of a ``gather_*`` (gather.h): so few that every device has them at work at once."""


def gather_grid(words: int) -> tuple[int, int, int]:
    """Grid of ``gather_*``, for so many words of each device."""
    return min(up(words, 512), GATHER_BLOCKS), 1, 1


def begin_run_grid(header_bytes: int, layers: int) -> tuple[int, int, int]:
    """Grid of ``begin_run``."""
    return up(header_bytes, 16 * 512) + layers, 1, 1


ATTENTION_WARPS, ATTENTION_SPLIT = 8, 32  # attention.h: query heads and positions of a block


def attention_grid(heads: int, kv_heads: int, splits: int, tokens: int = 1) -> tuple[int, int, int]:
    """Grid of ``attention_*``."""
    return kv_heads * up(heads // kv_heads, ATTENTION_WARPS), splits, tokens


def attention_splits(positions: int) -> int:
    """Parts into which the attention over so many positions is cut."""
    return up(positions, ATTENTION_SPLIT)


PROMPT_ROWS = 32  # prompt_attention.h: (token, query head) pairs of a block


def attention_prompt_grid(heads: int, kv_heads: int, tokens: int) -> tuple[int, int, int]:
    """Grid of ``attention_prompt_*``."""
    return kv_heads, up(tokens * (heads // kv_heads), PROMPT_ROWS), 1


LATENT_HEADS, LATENT_SPLIT = 16, 128  # latent.h: query heads and positions of a block


def latent_grid(heads: int, splits: int, tokens: int = 1) -> tuple[int, int, int]:
    """Grid of ``latent_attention_*``."""
    return up(heads, LATENT_HEADS), splits, tokens


def latent_splits(positions: int) -> int:
    """Parts into which the attention over so many latents is cut."""
    return up(positions, LATENT_SPLIT)


def heads_mat_vec_grid(name: str, heads: int, rows: int, split: int) -> tuple[int, int, int]:
    """Grid of ``heads_mat_vec_*``: of one token; a head has so many rows."""
    return mat_vec_grid(name, rows, split)[0], heads, 1


def heads_mat_mul_grid(heads: int, rows: int, tokens: int) -> tuple[int, int, int]:
    """Grid of ``heads_mat_mul_*``."""
    return up(rows, 64), up(tokens, TILE_TOKENS), heads
