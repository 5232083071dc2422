"""GGUF files changed in structure: one to three changes each, and mostly laid out again so that they get far."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf

from tests.fuzz.gguf_image import BOOL, SCALARS, STRING, Image, Key
from tests.tiny_model import Tiny, Type, write_tiny

NUMBERS = (0, 1, 2, 3, 5, 7, 63, 255, 256, 4095, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
           1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1, -1, -2, -(1 << 31), -(1 << 63))  # fmt: skip
FLOATS = (0.0, -0.0, 1e-45, 1e-6, 0.5, 1.0, -1.0, 1e30, 1e300, math.inf, -math.inf, math.nan)
TEXTS = (
    b"",
    b"\0",
    b" ",
    b"a",
    b"qwen3moe",
    b"llama",
    b"gpt2",
    "ü".encode(),
    b"\xff\xfe",
    b"\x1b[2J\x1b]0;x\7",
    b"{{ messages }}",
    b"{% for",
    b"<|endoftext|>",
    b"a\nb",
    b"-1",
    b"1e9",
    b"\xed\xa0\x80",
    b"A" * 70000,
)
NAMES = (
    b"",
    b"blk.",
    b"blk.x.foo",
    b"blk.01.attn_norm.weight",
    b"blk.-1.attn_norm.weight",
    b"blk.99999999999.a",
    b"blk.1.",
    b"blk..ffn_down_exps.weight",
    "blk.\uff11.attn_norm.weight".encode(),
    b"\xff",
    b"\x1b[31m",
    b"token_embd",
    b"a" * 300,
    b"blk.0.ffn_gate_up_exps.weight",
    b"blk.0.ffn_gate.0.weight",
    b"rope_freqs.weight",
    b"blk.0.attn_q.bias",
    b"blk.0.exp_probs_b.bias",
)
MORE_KEYS = ("general.alignment", "split.count", "split.no", "split.tensors.count", "tokenizer.ggml.bos_token_id",
             "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.add_bos_token",
             "tokenizer.chat_template", "A.rope.scaling.type", "A.rope.scaling.factor", "A.attention.sliding_window",
             "A.expert_gating_func", "A.expert_weights_scale", "A.expert_weights_norm", "A.rope.dimension_sections",
             "A.leading_dense_block_count", "A.attention.recurrent_layers", "A.full_attention_interval",
             "A.nextn_predict_layers", "A.vocab_size", "A.expert_shared_count", "A.attention.sliding_window_pattern",
             "A.rope.freq_base_swa", "A.expert_group_count", "A.rope.scaling.yarn_log_multiplier",
             "A.attention.q_lora_rank", "A.feed_forward_length", "general.name",
             "general.quantization_version")  # fmt: skip


def bases(folder: Path) -> list[Image]:
    """Well-formed models of all architectures and of several types."""
    shapes = [
        Tiny(),
        Tiny(architecture="qwen3moe", layers=2, weights=Type.Q8_0),
        Tiny(
            layers=4,
            columns=256,
            hidden=256,
            shared_hidden=256,
            heads=8,
            weights=Type.Q4_K,
            down=Type.Q6_K,
            dense=Type.Q8_0,
            experts=5,
        ),
        Tiny(architecture="qwen3moe", layers=1, columns=32, weights=Type.F16, fused=True, tied=True),
        Tiny(architecture="qwen3next", legacy=True),
        Tiny(architecture="minimax-m2", layers=2),
        Tiny(architecture="glm4moe", layers=3, dense_layers=1, biased=True),
        Tiny(architecture="gpt-oss", layers=2, rotated=32, biased=True, dense=Type.F16, weights=Type.MXFP4),
        Tiny(architecture="deepseek2", layers=2, dense_layers=1, query_rank=32, dense=Type.Q8_0),
    ]
    return [Image.read(write_tiny(folder / f"base{i}.gguf", shape, i)) for i, shape in enumerate(shapes)]


def _odd_shape(r: random.Random, folder: Path) -> Image:
    """A model whose sizes were drawn, and mostly go together, though no one would train it."""
    kind = r.choice([Type.F32, Type.F16, Type.BF16, Type.Q8_0])
    size = [32, 64, 96] if kind == Type.Q8_0 else [1, 2, 8, 24, 31, 32, 63, 64, 65]
    fits = r.random() < 0.75
    heads, key_heads, experts = r.randint(1, 9), r.randint(1, 4), r.choice([1, 2, 3, 8, 65])
    head_columns = r.choice([n for n in size if n > 1])
    shape = Tiny(
        architecture=r.choice(["qwen3moe", "qwen35moe", "qwen3next", "minimax-m2", "glm4moe", "gpt-oss", "deepseek2"]),
        layers=r.randint(1, 4),
        columns=r.choice(size),
        heads=heads,
        kv_heads=r.choice([n for n in range(1, 10) if not (fits and heads % n)]),
        head_columns=head_columns,
        rotated=r.randint(1, head_columns // 2) * 2 if fits else r.choice([0, 1, 7, 16, 64]),
        key_heads=key_heads,
        value_heads=key_heads * r.randint(1, 3) if fits else r.randint(1, 6),
        state_columns=r.choice(size),
        taps=r.randint(1, 6),
        experts=experts,
        used=r.randint(1, min(experts, 9)) if fits else r.choice([1, 8, 70]),
        hidden=r.choice(size),
        shared_hidden=r.choice([0, *size]),
        vocabulary=r.choice([258, 259, 300, 1025]),
        tied=r.random() < 0.3,
        fused=r.random() < 0.3,
        weights=kind,
    )
    path = write_tiny(folder / "odd.gguf", shape, r.randrange(1 << 30))
    return Image.read(path)


def _any_scalar(r: random.Random) -> tuple[int, Any]:
    kind = r.choice([*SCALARS, STRING])
    if kind == STRING:
        return kind, r.choice(TEXTS)
    if kind == BOOL:
        return kind, r.choice([0, 1, 2, 255])
    return kind, r.choice(FLOATS if SCALARS[kind] in "fd" else NUMBERS)


def _other_value(r: random.Random, image: Image) -> None:
    """A value of any kind."""
    key = r.choice(image.keys)
    key.kind, key.value = _any_scalar(r)
    key.is_array = r.random() < 0.35
    if key.is_array:
        key.value = [key.value] * r.choice([0, 1, 1, 2, 4, 300, 301, 2000])


def _near_value(r: random.Random, image: Image) -> None:
    """A number near the one that was there: what passes most checks."""
    keys = [key for key in image.keys if not key.is_array and key.kind not in (STRING, BOOL)]
    if not keys:
        return
    key = r.choice(keys)
    change = r.choice(
        [lambda v: v + 1, lambda v: v - 1, lambda v: v * 2, lambda v: v // 2, lambda v: -v, lambda v: v * 3]
    )
    value = change(key.value)
    key.value = value if SCALARS[key.kind] in "fd" else int(value)


def _element(r: random.Random, image: Image) -> None:
    """Vocabularies and other lists: an element, the length, or the elements' kind."""
    arrays = [key for key in image.keys if key.is_array and key.value]
    if not arrays:
        return
    key, what = r.choice(arrays), r.randrange(5)
    at = r.randrange(len(key.value))
    if what == 0:
        key.value[at] = r.choice(TEXTS) if key.kind == STRING else r.choice(NUMBERS)
    elif what == 1:
        key.value = key.value[:at]
    elif what == 2:
        key.value = key.value + key.value[: at + 1]
    elif what == 3:
        key.value[at] = key.value[r.randrange(len(key.value))]
    else:
        kind, value = _any_scalar(r)
        key.kind, key.value = kind, [value] * len(key.value)


def _keys(r: random.Random, image: Image) -> None:
    """One less, one more, one twice, one by another's name, two exchanged."""
    what, at = r.randrange(5), r.randrange(len(image.keys))
    other = r.randrange(len(image.keys))
    if what == 0 and len(image.keys) > 1:
        del image.keys[at]
    elif what == 1:
        kind, value = _any_scalar(r)
        architecture = r.choice([b"qwen3moe", b"qwen35moe"])
        name = r.choice(MORE_KEYS).encode().replace(b"A.", architecture + b".")
        image.keys.append(Key(name, kind, value))
    elif what == 2:
        image.keys.insert(other, image.keys[at])
    elif what == 3:
        image.keys[at].name = r.choice([image.keys[other].name, *NAMES])
    else:
        a, b = image.keys[at], image.keys[other]
        a.name, b.name = b.name, a.name


def _tensors(r: random.Random, image: Image) -> None:
    """One less, one twice, one by another name."""
    what, at = r.randrange(3), r.randrange(len(image.tensors))
    if what == 0 and len(image.tensors) > 1:
        del image.tensors[at]
    elif what == 1:
        image.tensors.insert(r.randrange(len(image.tensors)), image.tensors[at])
    else:
        name = image.tensors[at].name
        longer = name.replace(b"blk.0", r.choice([b"blk.7", b"blk.65535", b"blk.00", b"blk.0.0"]))
        image.tensors[at].name = r.choice([longer, *NAMES, r.choice(image.tensors).name])


def _shape(r: random.Random, image: Image) -> None:
    t = r.choice(image.tensors)
    what = r.randrange(5)
    if what == 0 or not t.shape:
        t.shape.append(r.choice([1, 1, 2, 0, 1 << 40]))
    elif what == 1:
        t.shape.pop()
    elif what == 2:
        r.shuffle(t.shape)
    else:
        at = r.randrange(len(t.shape))
        t.shape[at] = r.choice([t.shape[at] + 1, t.shape[at] - 1, 2 * t.shape[at], t.shape[at] // 2, *NUMBERS])


def _kind(r: random.Random, image: Image) -> None:
    r.choice(image.tensors).kind = r.choice([*map(int, gguf.GGMLQuantizationType), 4, 5, 31, 99, 1 << 31])


def _offset(r: random.Random, image: Image) -> None:
    t = r.choice(image.tensors)
    t.offset = r.choice(
        [t.offset + 1, t.offset + 32, max(0, t.offset - 32), 0, r.choice(image.tensors).offset, *NUMBERS]
    )


def _weights(r: random.Random, image: Image) -> None:
    """NaN, infinities, noise: wrong text is allowed, reading elsewhere is not."""
    t = r.choice(image.tensors)
    if not t.data:
        return
    start = r.randrange(len(t.data))
    piece = r.choice([b"\xff", b"\x7f", b"\0", b"\0\0\xc0\x7f", b"\0\0\x80\xff", r.randbytes(64)])
    length = r.choice([4, 64, len(t.data)])
    t.data[start : start + length] = (piece * (length // len(piece) + 1))[: len(t.data[start : start + length])]


def _counts(r: random.Random, image: Image) -> None:
    image.version = r.choice([0, 1, 2, 3, 3, 4, 3 << 24])
    image.key_count = r.choice([None, *NUMBERS[:20], len(image.keys) - 1, len(image.keys) + 1])
    image.tensor_count = r.choice([None, *NUMBERS[:20], len(image.tensors) - 1])
    image.key_count = None if image.key_count is None else abs(image.key_count)
    image.tensor_count = None if image.tensor_count is None else abs(image.tensor_count)


STRUCTURE: list[tuple[Callable[[random.Random, Image], None], int]] = [
    (_other_value, 22), (_near_value, 18), (_element, 12), (_keys, 12), (_tensors, 8), (_shape, 9), (_kind, 9),
    (_offset, 4), (_weights, 8), (_counts, 1),
]  # fmt: skip


def flipped(r: random.Random, raw: bytes, first_bytes: int = 4096) -> bytes:
    """Bytes changed, cut off, left out or put in, mostly near the start."""
    data = bytearray(raw)
    for _ in range(r.choice([1, 1, 2, 8])):
        limit = min(len(data), r.choice([64, first_bytes, len(data)]))
        at, what = r.randrange(max(1, limit)), r.randrange(6)
        if what < 3 and at < len(data):
            data[at] = r.choice([data[at] ^ (1 << r.randrange(8)), 0, 255, r.randrange(256)])
        elif what == 3:
            del data[at:]
        elif what == 4:
            del data[at : at + r.choice([1, 4, 8, 64])]
        else:
            data[at:at] = r.randbytes(r.choice([1, 4, 8, 64]))
    return bytes(data)


def mutated(r: random.Random, originals: list[Image], folder: Path) -> bytes:
    """A GGUF file, wrong somewhere."""
    is_odd = r.random() < 0.2
    image = _odd_shape(r, folder) if is_odd else _copy(r.choice(originals))
    if is_odd and r.random() < 0.7:
        return image.write()
    if r.random() < 0.1:
        return flipped(r, image.write(), 16384)
    changes, weights = zip(*STRUCTURE, strict=True)
    for change in r.choices(changes, weights, k=r.choice([1, 1, 2, 3])):
        change(r, image)
        if change is not _offset and r.random() < 0.85:
            image.lay_out()
    return image.write()


def _copy(image: Image) -> Image:
    """As `copy.deepcopy`, without its cost."""
    keys = [Key(k.name, k.kind, list(k.value) if k.is_array else k.value, k.is_array) for k in image.keys]
    tensors = [type(t)(t.name, list(t.shape), t.kind, t.offset, bytearray(t.data)) for t in image.tensors]
    return Image(keys, tensors, image.version)
