"""Write a synthetic GGUF with the layer shapes of a real model, at the speed of the disk.

Weights are random valid quantization blocks (the Q4_K_M mixture of llama-quantize), so speed and memory behave as
those of the real model; the text is noise.  Expert popularity follows a law or a profile: one hidden channel carries
a constant (no layer writes to it), and the router reads its bias of log(popularity) from there, beside a random part
that changes with every token.  With --recall the layers turn the stream so far that the next layer's experts are
guessed as often as that (published for Qwen3.5: 0.82 to 0.88); without it, at real widths, nearly always.

    python bench/make_model.py --preset 35b-a3b --layers 16 -o model.gguf
    python bench/make_model.py --preset 397b-a17b --layers 8 --recall 0.85 -o model.gguf
    python bench/make_model.py --preset gpt-oss-120b-a5b --layers 4 -o model.gguf

llama.cpp runs the file too, so both can be timed on it.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import gguf
import numpy as np
from lookahead_recall import (
    PROXY_LAYERS,
    ROUTER_NOISE,
    Embedding,
    Stream,
    measured_outputs,
    measured_recall,
    stream_for,
    turn_for,
)
from model_families import (
    F32,
    MXFP4,
    PRE_TOKENIZERS,
    PRESETS,
    Q4_K,
    Q5_0,
    Q6_K,
    Q8_0,
    Preset,
    Tensor,
    attention,
    delta,
    dense,
    experts,
    keys_of,
    more_bits,
    stored_as,
)  # fmt: skip

from fomoe_io.storage.gguf import tensor_bytes

POOL_BLOCKS = 1 << 16
"""Random blocks generated once; a tensor is written from random places of this pool."""

PIECE_BLOCKS = 1 << 12
BIAS_COLUMNS = 683
"""Routers take the constant channel of an embedding to have the energy of so many others."""

CONSTANT_COLUMNS = 164
"""It has that of so many: routers add log(popularity) at half of its size, and picks are less skewed than the law.
Kept, as measurements were made with such models."""

EMBEDDING_DEVIATION, TURNED_SCALE = 0.0369, 256
"""Of the channels of an embedding that vary, and by how much an embedding is larger with --recall.  At its own size
layers that turn it by little have subnormal float16 scales: a block's scale and minimum, rounded apart, leave its
weights a mean that moves all tokens alike, and some layers turn the stream three times as far as was meant."""

MOST_GROWTH = 1e6
"""Of a stream by what layers add to it: float16 has scales for more, but not for any."""

PROXY_EXPERTS, PROXY_HIDDEN = 64, 256
"""Most experts of the small model, and their rows: what an expert puts out hardly depends on these."""

SUBLAYER_GAIN = 0.05
"""What a sublayer adds to the residual stream without --recall: so little that the next router sees the same stream."""


def popularity(source: str, layers: int, experts: int, random: np.random.Generator) -> np.ndarray:
    """Shares [layers, experts]: normal:S, zipf:S, or a .freq file (u32 header, then u16 layer, u16 expert, f32).

    With normal:S their logarithms have that deviation: 0.8 has the skew of Qwen3-30B-A3B's picks over 76,000 tokens,
    0.45 that of the 512 experts of Qwen3-Next-80B-A3B over 25,000.
    """
    if source.startswith("normal:"):
        ranks = [NormalDist(0, float(source[7:])).inv_cdf((i + 0.5) / experts) for i in range(experts)]
        shares = np.exp(ranks)
        return np.stack([random.permutation(shares / shares.sum()) for _ in range(layers)])
    if source.startswith("zipf:"):
        shares = np.arange(1, experts + 1) ** -float(source[5:])
        return np.stack([random.permutation(shares / shares.sum()) for _ in range(layers)])
    raw = Path(source).read_bytes()
    magic, _, profile_layers, entries = struct.unpack_from("<4I", raw)
    if magic != 0x46524551:
        raise SystemExit(f"make_model: {source} is no .freq file")
    table = np.frombuffer(raw, [("layer", "<u2"), ("expert", "<u2"), ("frequency", "<f4")], entries, 16)
    counts = np.zeros((profile_layers, int(table["expert"].max()) + 1))
    counts[table["layer"], table["expert"]] = table["frequency"]
    rows = []
    for layer in range(layers):
        # a model with another number of experts gets the profile's curve, resampled by rank
        curve = np.sort(counts[layer % profile_layers])[::-1]
        curve = np.interp(np.linspace(0, 1, experts), np.linspace(0, 1, len(curve)), curve) + curve.sum() * 1e-5
        rows.append(random.permutation(curve / curve.sum()))
    return np.stack(rows)


class BlockPool:
    """Random blocks of a type, standard deviation `deviation` a weight, mean about zero."""

    def __init__(self, kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> None:
        self.kind = kind
        self.random = random
        _, self.block_bytes = gguf.GGML_QUANT_SIZES[kind]
        self.blocks = random.integers(0, 256, (POOL_BLOCKS, self.block_bytes), dtype=np.uint8)
        self._deviation = 0.0

    def scale(self, deviation: float) -> None:
        """Set the blocks' float16 scales.  Constants: deviation of a random block whose scale is 1, measured."""
        if deviation == self._deviation:
            return
        self._deviation = deviation
        if self.kind == Q4_K:  # w = d * scale * q - dmin * minimum; dmin = 7.5 d centres it
            d = deviation / 286
            self.blocks[:, :4] = np.array([d, 7.5 * d], np.float16).view(np.uint8)
        elif self.kind == Q6_K:  # w = d * scale * q
            self.blocks[:, -2:] = np.array([deviation / 1367], np.float16).view(np.uint8)
        elif self.kind == MXFP4:  # w = t[q] * 2^(e - 128)
            self.blocks[:, 0] = 127 + round(np.log2(deviation / 3))
        else:  # w = d * q
            self.blocks[:, :2] = np.array([deviation / {Q8_0: 73.9, Q5_0: 9.2}[self.kind]], np.float16).view(np.uint8)

    def rows(self, count: int, blocks_a_row: int) -> Iterator[np.ndarray]:
        """Pieces of uint8 [blocks, bytes] that make up `count` rows; the first row is all zero."""
        first = True
        left = count * blocks_a_row
        while left:
            size = min(PIECE_BLOCKS, left)
            start = int(self.random.integers(0, POOL_BLOCKS - size + 1))
            piece = self.blocks[start : start + size]
            if first:
                piece = piece.copy()
                piece[:blocks_a_row] = 0
                first = False
            yield piece
            left -= size


def embedding(p: Preset, scale: float, random: np.random.Generator) -> np.ndarray:
    """Q4_K blocks [vocabulary, blocks, bytes]: channel 0 constant, the rest random.

    The first sub-block of a row has scale and minimum 63 and holds the constant; the others 8, so that the constant
    has the energy of CONSTANT_COLUMNS others.
    """
    blocks = p.columns // 256
    rows = random.integers(0, 256, (p.vocabulary, blocks, 144), dtype=np.uint8)
    rows[:, :, :4] = np.array([1e-3 * scale, 7.5e-3 * scale], np.float16).view(np.uint8)
    rows[:, :, 4:16] = np.array([8, 8, 8, 8, 8, 8, 8, 8, 0x88, 0x88, 0x88, 0x88], np.uint8)
    rows[:, 0, 4] = 63  # scale of sub-block 0 (with a minimum of 63: zero is q = 7.5)
    rows[:, 0, 8] = 63
    rows[:, 0, 16:48] = rows[:, 0, 16:48] & 0xF0 | np.where(random.random((p.vocabulary, 32)) < 0.5, 7, 8).astype(
        np.uint8
    )
    rows[:, 0, 16] |= 0x0F
    return rows.reshape(-1, 144)


def has_constant(p: Preset) -> bool:
    """Whether the popularity comes by the stream; gpt-oss' router has a bias for it."""
    return p.architecture != "gpt-oss"


def constant_share(p: Preset) -> float:
    """Part of an embedding's energy that routers take the constant channel to have."""
    return BIAS_COLUMNS / (BIAS_COLUMNS + p.columns)


def router(p: Preset, shares: np.ndarray, constant: float, random: np.random.Generator) -> np.ndarray:
    """float32 [experts, columns]: log(share) on the constant channel, noise as wide as a Gumbel variable elsewhere."""
    normed_constant = np.sqrt(constant * p.columns)
    noise_energy = np.sqrt((1 - constant) * p.columns)
    rows = random.standard_normal((p.experts, p.columns)) * (ROUTER_NOISE / noise_energy)
    if has_constant(p):
        rows[:, 0] = (np.log(shares) - np.log(shares).mean()) / normed_constant
    return rows.astype(np.float32)


def layer_tensors(
    p: Preset, layer: int, layers: int, shares: np.ndarray, stream: Stream, random: np.random.Generator
) -> Iterator[Tensor]:
    """The tensors of one layer, in the order llama.cpp's converter has them roughly."""
    d, high = p.columns, Q6_K if more_bits(layer, layers) else Q4_K
    b, mixer, network = f"blk.{layer}.", float(stream.mixers[layer]), float(stream.experts[layer])
    ones, norm = np.ones(d, np.float32), "ffn_norm" if p.architecture == "minimax-m2" else "post_attention_norm"
    yield Tensor(b + "attn_norm.weight", (d,), F32, values=ones)
    yield Tensor(b + f"{norm}.weight", (d,), F32, values=ones)
    if p.is_mixed and (layer + 1) % 4:
        yield from delta(p, b, high, mixer, random)
    else:
        yield from attention(p, b, high, mixer)
    if layer < p.dense_layers:
        yield from dense(p, b, high, network)
    else:
        rows = router(p, shares, float(stream.constant[layer]), random)
        yield from experts(p, b, high, network, rows, np.log(shares) - np.log(shares).mean(), random)


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Byte-level tokens, fillers, one end-of-text token; types and merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [f"Ġ{chr(97 + i)}" for i in range(26)]
    fillers = [f"<filler{i}>" for i in range(size - len(letters) - len(words) - 1)]
    tokens = [*letters, *words, *fillers, "<|endoftext|>"]
    types = [1] * (len(letters) + len(words)) + [5] * len(fillers) + [3]
    return tokens, types, [f"Ġ {chr(97 + i)}" for i in range(26)]


def add_metadata(writer: gguf.GGUFWriter, p: Preset, layers: int) -> None:
    """Every key that the architecture has."""
    tokens, types, merges = vocabulary(p.vocabulary)
    writer.add_name(f"synthetic, {layers} layers")
    writer.add_file_type(15)
    writer.add_quantization_version(2)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys_of(p, layers).items():
        add.get(type(value), writer.add_array)(f"{p.architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[p.architecture])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--layers", type=int, help="default: the model's own")
    parser.add_argument("--experts", type=int, help="default: the model's own")
    parser.add_argument("--popularity", default="normal:0.5", help=popularity.__doc__)
    parser.add_argument("--recall", type=float, help="how often the next layer's experts are guessed, such as 0.85")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--header", action="store_true", help="the header over a sparse file, for fomoe plan")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    p = PRESETS[options.preset]
    if options.experts:
        p = replace(p, experts=options.experts)
    if options.header:
        write_header(options.output, p, options.layers or p.layers)
        return
    make(options.output, p, options.layers or p.layers, options.popularity, options.recall, options.seed)
    if options.recall is not None:
        found = measured_recall(options.output)
        print(f"recall {np.mean(found):.3f}, by layer from the second: {' '.join(f'{x:.2f}' for x in found)}")


def make(path: Path, p: Preset, layers: int, law: str, recall: float | None, seed: int) -> None:
    """Write the model."""
    random = np.random.default_rng(seed)
    shares = popularity(law, layers, p.experts, random)
    constant = constant_share(p)
    if recall is None:
        gains = np.full(layers, SUBLAYER_GAIN)
        write_layers(path, p, shares, Stream(gains, gains, np.full(layers, constant)), 1, random)
    else:
        write_layers(path, p, shares, turning(p, shares, law, recall, seed), TURNED_SCALE, random)


def turning(p: Preset, shares: np.ndarray, law: str, recall: float, seed: int) -> Stream:
    """A stream that layers turn as far as that recall allows; what sublayers put out is measured on a small model."""
    if p.architecture == "gpt-oss":
        raise SystemExit("make_model: no --recall for gpt-oss: scales of MXFP4 are powers of two")
    seen = shares ** np.sqrt(CONSTANT_COLUMNS / BIAS_COLUMNS)
    turns = np.array([turn_for(recall, row, p.used) for row in seen])
    if np.prod(np.sqrt(1 + turns**2)) > MOST_GROWTH:
        raise SystemExit(f"make_model: {len(turns)} layers cannot turn the stream so far that recall is {recall}")

    # rows of K types are multiples of 256: a small expert has the types of a large one
    hidden = PROXY_HIDDEN if p.hidden % 256 == 0 else PROXY_HIDDEN + 32
    small = replace(p, experts=min(p.experts, PROXY_EXPERTS), hidden=hidden, vocabulary=4096)
    small_shares = popularity(law, PROXY_LAYERS, small.experts, np.random.default_rng(seed))

    def write_small(path: Path, stream: Stream) -> None:
        write_layers(path, small, small_shares, stream, TURNED_SCALE, np.random.default_rng(seed))

    start = Embedding(EMBEDDING_DEVIATION * TURNED_SCALE, constant_share(p))
    return stream_for(turns, start, *measured_outputs(float(turns.mean()), start, write_small))


def write_layers(
    path: Path, p: Preset, shares: np.ndarray, stream: Stream, scale: float, random: np.random.Generator
) -> None:
    """All tensors of a model whose layers treat the stream that way."""
    layers = len(shares)
    tensors = [
        Tensor("token_embd.weight", (p.columns, p.vocabulary), Q4_K, values=embedding(p, scale, random))
        if has_constant(p)
        else Tensor("token_embd.weight", (p.columns, p.vocabulary), Q8_0, 1.0),
        Tensor("output_norm.weight", (p.columns,), F32, values=np.ones(p.columns, np.float32)),
        Tensor("output.weight", (p.columns, p.vocabulary), stored_as(p, Q6_K, p.columns), p.columns**-0.5),
    ]
    for layer in range(layers):
        tensors += layer_tensors(p, layer, layers, shares[layer], stream, random)
    write(path, p, layers, tensors, random)


def write_header(path: Path, p: Preset, layers: int) -> None:
    """A model of those shapes without its weights."""
    small, random = replace(p, vocabulary=512), np.random.default_rng(1)
    gains = np.full(layers, SUBLAYER_GAIN)
    stream = Stream(gains, gains, np.full(layers, 0.5))
    even = np.full(p.experts, 1 / p.experts)
    tensors = [
        Tensor("token_embd.weight", (p.columns, p.vocabulary), Q4_K if has_constant(p) else Q8_0),
        Tensor("output_norm.weight", (p.columns,), F32),
        Tensor("output.weight", (p.columns, p.vocabulary), stored_as(p, Q6_K, p.columns)),
    ]
    for layer in range(layers):
        tensors += layer_tensors(small, layer, layers, even, stream, random)
    write_infos(path, p, layers, tensors)
    sizes = [4 * int(np.prod(t.shape)) if t.kind == F32 else tensor_bytes(t.kind, t.shape) for t in tensors]
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + sum(-(-size // 32) * 32 for size in sizes))


def write_infos(path: Path, p: Preset, layers: int, tensors: list[Tensor]) -> None:
    """Metadata and the list of tensors."""
    writer = gguf.GGUFWriter(path, p.architecture)
    add_metadata(writer, p, layers)
    for t in tensors:
        block, block_bytes = gguf.GGML_QUANT_SIZES[t.kind]
        shape = (*reversed(t.shape[1:]), t.shape[0] // block * block_bytes)
        if t.kind == F32:
            writer.add_tensor_info(t.name, tuple(reversed(t.shape)), np.dtype(np.float32), 4 * int(np.prod(t.shape)))
        else:
            writer.add_tensor_info(t.name, shape, np.dtype(np.uint8), tensor_bytes(t.kind, t.shape), raw_dtype=t.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def write(path: Path, p: Preset, layers: int, tensors: list[Tensor], random: np.random.Generator) -> None:
    """Header by package gguf, data streamed."""
    write_infos(path, p, layers, tensors)
    pools = {kind: BlockPool(kind, random) for kind in dict.fromkeys(t.kind for t in tensors if t.values is None)}
    with path.open("r+b") as stream:
        stream.seek(0, 2)
        stream.write(b"\0" * (-stream.tell() % 32))
        for t in tensors:
            if t.values is not None:
                stream.write(np.ascontiguousarray(t.values).data)
            else:
                pools[t.kind].scale(t.deviation)
                matrices = t.shape[2] if len(t.shape) == 3 else 1
                for _ in range(matrices):
                    for piece in pools[t.kind].rows(t.shape[1], t.shape[0] // gguf.GGML_QUANT_SIZES[t.kind][0]):
                        stream.write(piece.data)
            stream.write(b"\0" * (-stream.tell() % 32))


if __name__ == "__main__":
    main()
