"""Which reads a job of `fomoe-bench io` makes: blocks of a file, or a store's records as a router asks for them."""

from __future__ import annotations

import csv
import io
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fomoe_io._io_load import PLAN
from fomoe_io.errors import FormatError, UsageError
from fomoe_io.experts.slots import slot_layout
from fomoe_io.storage.expert_layers import ExpertLayer
from fomoe_io.storage.store import Store
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES
from fomoe_io.trace.trace import MAGIC, Trace

MOST_PLANNED = 1 << 20
"""Longer plans are walked again: a million reads are more than any cache of a drive remembers."""
TRACE_LIMIT_BYTES = 1 << 30
FOUND_NVME = 2
"""LayerTrace.found of an expert that was read."""
RANDOM_TOKENS = 64
RANDOM_PICKS = 8
"""Without a trace: tokens drawn, and experts a layer for each, as current models have it."""


def block_plan(file_bytes: Sequence[int], block_bytes: int, *, random: bool, seed: int) -> np.ndarray:
    """Whole blocks of the files: one after another, or each once in random order.

    Parameters
    ----------
    file_bytes : sequence of int
        Bytes of each file to use.
    block_bytes : int
    random : bool
    seed : int

    Returns
    -------
    numpy.ndarray
        PLAN records, at most MOST_PLANNED.
    """
    counts = np.array([size // block_bytes for size in file_bytes], np.int64)
    total = int(counts.sum())
    if not total:
        raise UsageError(f"a block of {block_bytes:,} bytes does not fit into the file", hint="a smaller --bs")
    if random:
        generator = np.random.default_rng(seed)
        blocks = generator.permutation(total) if total <= MOST_PLANNED else generator.integers(0, total, MOST_PLANNED)
    else:
        blocks = np.arange(min(total, MOST_PLANNED))
    starts = np.concatenate([[0], np.cumsum(counts)])
    files = np.searchsorted(starts, blocks, side="right") - 1
    plan = np.zeros(len(blocks), PLAN)
    plan["file"] = files
    plan["offset"] = (blocks - starts[files]) * block_bytes
    plan["bytes"] = block_bytes
    return plan


def read_trace(path: Path) -> list[tuple[int, int]]:
    """(layer, expert) of the records that a routing trace asks for, in its order.

    A file of `fomoe-run --trace` gives what that run read from the drive.  Anything else is CSV, plain or .xz, and
    gives every pick: lines that start with # are comments, the first other line names the columns, of which `layer`
    and `expert` are used.

    Raises
    ------
    FormatError
        When it is neither, or asks for nothing.
    """
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) == MAGIC:
            return _reads_of(Trace.load(path), path)
    try:
        data = path.read_bytes() if path.suffix != ".xz" else _unpacked(path)
        rows = csv.reader(line for line in io.StringIO(data.decode()) if not line.startswith("#"))
        header = next(rows, [])
        layer, expert = header.index("layer"), header.index("expert")
        picks = [(int(row[layer]), int(row[expert])) for row in rows if row]
    except (ValueError, IndexError, csv.Error, EOFError, lzma.LZMAError) as error:
        raise FormatError(f"{path} is no routing trace (CSV with columns layer and expert): {error}") from None
    if not picks:
        raise FormatError(f"{path}: the trace has no picks")
    return picks


def _reads_of(trace: Trace, path: Path) -> list[tuple[int, int]]:
    """What was found nowhere but on the drive, batch by batch, layer by layer."""
    order, picks = [], []
    for number, layer in trace.layers.items():
        if layer.found is None:
            raise FormatError(f"{path} does not say what was read: it comes from another program's cache")
        batch = np.repeat(np.arange(len(layer.tokens)), layer.tokens)
        token, rank = np.nonzero(layer.found == FOUND_NVME)
        order.append(np.stack([batch[token], np.full(len(token), number)]))
        picks += [(number, int(expert)) for expert in layer.chosen[token, rank]]
    if not picks:
        raise FormatError(f"{path}: the run read no expert from the drive", hint="record it with a smaller --ram")
    batches, layers = np.concatenate(order, axis=1)
    return [picks[i] for i in np.lexsort((layers, batches))]


def _unpacked(path: Path) -> bytes:
    with lzma.open(path) as stream:
        data = stream.read(TRACE_LIMIT_BYTES + 1)
    if len(data) > TRACE_LIMIT_BYTES:
        raise FormatError(f"{path} unpacks to more than {TRACE_LIMIT_BYTES:,} bytes")
    return data


def random_picks(layers: dict[int, ExpertLayer], seed: int) -> list[tuple[int, int]]:
    """Picks of RANDOM_TOKENS tokens, layer after layer, with the frequencies of the store's profile or all alike."""
    generator = np.random.default_rng(seed)
    picks = []
    for _ in range(RANDOM_TOKENS):
        for index, layer in sorted(layers.items()):
            share = None
            if layer.frequency is not None and layer.frequency.sum() > 0:
                share = (layer.frequency + 1e-6) / (layer.frequency + 1e-6).sum()
            count = min(RANDOM_PICKS, layer.n_experts)
            picks += [(index, int(e)) for e in generator.choice(layer.n_experts, count, replace=False, p=share)]
    return picks


def record_plan(store: Store, picks: Sequence[tuple[int, int]], block_bytes: int = LEAST_BLOCK_BYTES) -> np.ndarray:
    """The reads that bring these experts in: one of a packed store, up to three where it points into a GGUF.

    `block_bytes`: what the reads are multiples of.

    Raises
    ------
    UsageError
        The picks are of another model.
    """
    layouts = {index: slot_layout(layer, block_bytes) for index, layer in store.experts.items()}
    reads = []
    for layer, expert in picks[:MOST_PLANNED]:
        if layer not in layouts or not 0 <= expert < store.experts[layer].n_experts:
            raise UsageError(f"the trace picks expert {expert} of layer {layer}, which {store.path} does not have")
        layout = layouts[layer]
        for extent in layout.extents[expert, : layout.extent_count[expert]]:
            reads.append((extent["offset"], extent["bytes"], extent["file"]))
    return np.array(reads, PLAN)
