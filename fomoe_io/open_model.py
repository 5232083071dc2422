"""A model whose files are open: what every backend reads from, and what a failed read of it means."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from copy import copy
from typing import NoReturn, Self

from fomoe_io._gate import Gate
from fomoe_io.config import EngineConfig
from fomoe_io.errors import ReadError
from fomoe_io.experts.slots import slot_layout
from fomoe_io.models import check_model
from fomoe_io.models.tensors import EMBEDDING
from fomoe_io.storage.calibration import Calibration
from fomoe_io.storage.read_files import read_fault
from fomoe_io.storage.reader import Reader, open_reader
from fomoe_io.storage.store import Store

DEFAULT_CONTEXT_TOKENS = 4096
"""When neither the user nor the model says less: as llama.cpp's examples use; KV memory grows with it."""

DEFAULT_DEPTH = 64
"""Reads in flight, for each drive, without a calibration: more than any drive needs for reads of an expert's size."""


class OpenModel:
    """A checked model with its reader.

    Parameters
    ----------
    store : Store
    config : EngineConfig
    gate : Gate
        Who may be inside, and what ends a run.
    peak_bytes_before : int
        The most that the process had held before `store` was read.

    Attributes
    ----------
    model : Model
    experts : dict of int to ExpertLayer
        Of the layers that this backend computes.
    shape : Shape
    context_tokens : int
        Positions of a session.
    reader : Reader
        Of the data files and their mirrors.
    files : list of int
        Descriptors of the data files, for rows of the token embeddings.

    Raises
    ------
    FormatError
        The architecture is not supported, or a key or tensor is missing, absurd or not computed with.
    """

    def __init__(self, store: Store, config: EngineConfig, gate: Gate, peak_bytes_before: int) -> None:
        self.store, self.config, self.gate, self.peak_bytes_before = store, config, gate, peak_bytes_before
        self.model = check_model(store)
        self.experts = self.model.experts
        self.shape = self.model.shape
        self.context_tokens = config.context_tokens or min(self.shape.context_tokens, DEFAULT_CONTEXT_TOKENS)
        self.files: list[int] = []
        self.reader: Reader = self._open_reader()
        try:
            for path in store.paths:
                self.files.append(os.open(path, os.O_RDONLY))
        except BaseException:
            self.close()
            raise

    def part(self, layers: Collection[int], *, is_first: bool) -> Self:
        """The same model for one of several devices: its own layers' experts, and a reader and a gate for the thread
        that serves it, which for the first is the caller's."""
        other = copy(self)
        other.experts = {i: layer for i, layer in self.model.experts.items() if i in layers}
        if not is_first:
            other.gate, other.reader = Gate(), self._open_reader(beside=self.reader)
        return other

    def _open_reader(self, beside: Reader | None = None) -> Reader:
        """As the calibration says where there is one."""
        config = self.config
        depth, sub_read_bytes = DEFAULT_DEPTH, 0
        if config.calibration is not None:
            largest = max(int(slot_layout(layer).extents["bytes"].max()) for layer in self.store.experts.values())
            depth, sub_read_bytes = Calibration.load(config.calibration).reads(largest)
        paths, mirrors = self.store.copies()
        return open_reader(
            paths,
            engine=config.reader,
            depth=config.ring_depth or depth,
            direct=config.direct,
            sub_read_bytes=sub_read_bytes,
            mirrors=mirrors,
            pace=config.pace,
            beside=beside,
        )

    def raise_failure(self, error: int, layer: int, expert: int) -> NoReturn:
        """A run failed with a negative errno at an expert, or was ended: raise what that means."""
        if error == -errno.ECANCELED or self.gate.was_interrupted:
            self.gate.raise_end()
        detail, fix = self.reader.last_error or os.strerror(-error), self.reader.last_fix
        raise ReadError(f"reading expert {expert} of layer {layer} failed: {detail}", hint=fix or None)

    def has_every_expert(self) -> bool:
        """Whether all reads of experts have succeeded, if not from the first copy."""
        reads = self.reader.counters
        return bool(reads["errors"] == reads["failovers"])

    def embedding_error(self, code: int) -> ReadError:
        """What a failed read (an errno) of a row of the token embeddings means."""
        tensor = self.store.resident[EMBEDDING]
        now = os.lseek(self.files[tensor.file], 0, os.SEEK_END)
        fault = read_fault(code, self.store.file_bytes[tensor.file], now)
        path = self.store.paths[tensor.file]
        return ReadError(f"reading the token embeddings from {path} failed: {fault.reason}", hint=fault.fix)

    def close(self) -> None:
        """Close the files; in a fork, its copies of them."""
        while self.files:
            os.close(self.files.pop())
        self.reader.close()
