"""Runs a prompt's batches on a GPU: launches up to a layer's picks, experts as they come, launches on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fomoe_io import _gpu
from fomoe_io.backend import Joined
from fomoe_io.gpu.arena import ALIGNMENT_BYTES, LaunchSpec
from fomoe_io.gpu.batch_recorder import (
    LOGITS_TOKENS,
    BatchRecorder,
    DenseProduct,
    ExchangeRows,
    Hop,
    PostPicks,
    ServeExperts,
    Wave,
)
from fomoe_io.gpu.kernels import up

if TYPE_CHECKING:
    from fomoe_io._gate import Gate
    from fomoe_io.gpu.on_device import OnDevice
    from fomoe_io.models.shape import Shape

Handed = dict[int, list[np.ndarray]]
TILE_WORDS = _gpu.TILE_BYTES // 8
"""Of a tile, whose first says where the record lies."""

KEPT_PROGRAMS = 2
"""A long prompt's full batches and its last one."""


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """Offsets of what host and device exchange about a batch, alike in both memories.

    Attributes
    ----------
    positions : int32 [tokens]
    states : uint64 [tokens], where the memory of each one's session begins
    embedding : uint8 [tokens, row_bytes]
    order : int32 [tokens * used], a layer's pairs sorted by expert
    tiles : csrc/gpu/device_experts.h, fomoe_tile: of a layer's experts
    picks, weights : int32 and float32 [tokens, used]; on the host alone
    logits : float32 [LOGITS_TOKENS, vocabulary]; on the host alone
    """

    positions: int
    states: int
    embedding: int
    order: int
    tiles: int
    picks: int
    weights: int
    logits: int
    bytes: int

    @classmethod
    def of(cls, s: Shape, tokens: int, row_bytes: int) -> PromptInputs:
        """For batches of up to so many tokens."""
        pairs = tokens * s.used
        tiles = min(pairs, s.experts) + pairs // _gpu.TILE_PAIRS
        sizes = [4 * tokens, 8 * tokens, row_bytes * tokens, 4 * pairs, _gpu.TILE_BYTES * tiles, 4 * pairs, 4 * pairs]
        sizes.append(4 * s.vocabulary * min(tokens, LOGITS_TOKENS))
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + up(size, ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        return cls(*offsets)

    @property
    def device_bytes(self) -> int:
        """Of what the device has, too."""
        return self.picks


@dataclass(slots=True)
class _Program:
    """Of one device: the same steps as the others', at its own addresses."""

    recorder: BatchRecorder
    steps: list[Any]


class PromptRunner:
    """The batches of an engine.

    Parameters
    ----------
    devices : sequence of OnDevice
    experts : _gpu.DeviceExperts
    shape : Shape
    embed : callable
        (ids, rows) fills uint8 rows with the tokens' embeddings.
    gate : Gate
        What ends a batch before its time, and is told how far it is.
    check : callable
        Raises what an error code of a read stands for.
    """

    def __init__(
        self,
        devices: Sequence[OnDevice],
        experts: _gpu.DeviceExperts,
        shape: Shape,
        embed: Callable[[np.ndarray, np.ndarray], None],
        gate: Gate,
        check: Callable[[int], None],
    ) -> None:
        self._devices, self._first, self._experts, self._shape = devices, devices[0], experts, shape
        self._inputs = self._first.recorded.inputs
        self._host = self._first.shared.part("inputs", 0, self._inputs.bytes)
        self._embed, self._gate, self._check = embed, gate, check
        self._programs: dict[tuple[int, bool], list[_Program]] = {}
        self._posted, self._left = self._first.gpu.event(), [device.gpu.event() for device in devices]
        self._is_running = False
        self._moving: list[np.ndarray] = []  # rows of another device that a copy at work may still reach

    def _words(self, offset: int, count: int, dtype: Any) -> np.ndarray:
        return self._host[offset:].view()[: count * np.dtype(dtype).itemsize].view(dtype)

    def _send(self, offset: int, nbytes: int) -> None:
        """Part of the inputs, to all devices."""
        for device in self._devices:
            to = device.recorded.inputs_address + offset
            device.gpu.stream.copy_in(to, self._host.ctypes.data + offset, nbytes)

    def _program(self, tokens: int, uses_products: bool) -> list[_Program]:
        key = (tokens, uses_products)
        if key not in self._programs:
            if len(self._programs) == KEPT_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = [self._made(device, tokens, uses_products) for device in self._devices]
        return self._programs[key]

    def _made(self, device: OnDevice, tokens: int, uses_products: bool) -> _Program:
        recorder = device.recorded.batch(tokens, uses_products)
        steps: list[Any] = []
        for part in recorder.finished_body():
            steps += _bound(part, tokens, device)
        return _Program(recorder, steps)

    def _synchronize(self) -> None:
        for device in self._devices:
            device.gpu.stream.synchronize(self._gate)

    def run(
        self,
        joined: Joined,
        states: Sequence[np.ndarray],
        logits: np.ndarray,
        *,
        uses_products: bool,
        picks: np.ndarray | None = None,
        handed: Handed | None = None,
        piece: tuple[int, int] = (0, 1),
    ) -> Iterator[int]:
        """Read one batch; yields where rows of another device must come first, until they are in `handed`.

        Parameters
        ----------
        joined : Joined
        states : sequence of numpy.ndarray
            uint64 [tokens] for each device: where the memory of each one's session begins.
        logits : numpy.ndarray
            float32 [outputs, vocabulary], out: of each span's last tokens; none, one or all.
        uses_products : bool
            Dense products by the vendor's library.
        picks : numpy.ndarray, optional
            int32 [layers, tokens, used], out: what the router picked.
        handed : dict of int to list of numpy.ndarray, optional
            Float rows that one device has left for another, by the number of the change.
        piece : tuple of int
            Which batch this is of how many that are read in one call; for progress.

        Yields
        ------
        int
            The number of the change whose rows are missing.
        """
        tokens, programs = len(joined.ids), self._program(len(joined.ids), uses_products)
        if self._is_running:  # the last run was interrupted: the devices may still read what the host wrote for it
            self._synchronize()
        self._is_running = True
        recorder, count = programs[0].recorder, len(programs[0].steps)
        self._fill_inputs(recorder, joined, states)
        self._experts.begin_batch(tokens, [device.gpu.stream for device in self._devices])
        for i, steps in enumerate(zip(*(program.steps for program in programs), strict=True)):
            self._gate.tell(piece[0] * count + i, piece[1] * count)
            step = steps[0]
            if isinstance(step, PostPicks):
                self._post(step, tokens)
            elif isinstance(step, ServeExperts):
                self._serve(steps, tokens, picks)
            elif isinstance(step, ExchangeRows):
                self._exchange([each.leave() for each in steps], [each.fetch() for each in steps])
            elif isinstance(step, Hop):
                assert handed is not None
                while step.comes and step.number not in handed:
                    yield step.number
                self._hop(step, tokens, handed)
            else:
                for device, launch in zip(self._devices, steps, strict=True):
                    launch.run(device.gpu.stream)
        if recorder.makes_logits:
            self._compute_logits(recorder, joined, logits)
        else:
            self._synchronize()
        self._is_running = False

    def _fill_inputs(self, recorder: BatchRecorder, joined: Joined, states: Sequence[np.ndarray]) -> None:
        at, table, tokens = self._inputs, recorder.embedding, len(joined.ids)
        self._words(at.positions, tokens, np.int32)[:] = joined.positions
        nbytes = tokens * table.row_bytes
        self._embed(joined.ids, self._words(at.embedding, nbytes, np.uint8).reshape(tokens, table.row_bytes))
        self._send(at.positions, 4 * tokens)
        self._send(at.embedding, nbytes)
        for device, of_tokens in zip(self._devices, states, strict=True):
            words = device.shared.part("inputs", at.states, 8 * tokens).view(np.uint64)
            words[:] = of_tokens
            device.gpu.stream.copy_in(device.recorded.inputs_address + at.states, words.ctypes.data, words.nbytes)

    def _post(self, step: PostPicks, tokens: int) -> None:
        """All devices have the same picks."""
        stream, address, nbytes = self._first.gpu.stream, self._host.ctypes.data, 4 * tokens * self._shape.used
        stream.copy_out(address + self._inputs.picks, step.ids, nbytes)
        stream.copy_out(address + self._inputs.weights, step.weights, nbytes)
        stream.record(self._posted)

    def _hop(self, step: Hop, tokens: int, handed: Handed) -> None:
        stream, size = self._first.gpu.stream, 4 * tokens * step.columns
        if step.comes:
            self._moving = handed.pop(step.number)
            for address, rows in zip(step.rows, self._moving, strict=True):
                stream.copy_in(address, rows.ctypes.data, size)
        else:
            self._moving = [np.empty((tokens, step.columns), np.float32) for _ in step.rows]
            for address, rows in zip(step.rows, self._moving, strict=True):
                stream.copy_out(rows.ctypes.data, address, size)
        stream.synchronize(self._gate)  # a wait that ends early leaves them where they are until the device is done
        if not step.comes:
            handed[step.number] = self._moving

    def _serve(self, steps: Sequence[ServeExperts], tokens: int, picks: np.ndarray | None) -> None:
        """Bring a layer's experts wave by wave; what is there is computed with while the next are read."""
        at, step, pairs = self._inputs, steps[0], tokens * steps[0].used
        self._posted.synchronize(self._gate)
        found = self._words(at.picks, pairs, np.int32).reshape(tokens, step.used)
        if picks is not None:
            picks[step.layer] = found
        weights, order = self._words(at.weights, pairs, np.float32), self._words(at.order, pairs, np.int32)
        self._check(self._experts.batch_layer(step.layer, found, weights.reshape(tokens, step.used), order))
        self._send(at.order, 4 * pairs)
        place = at.tiles
        while True:
            error, count = self._experts.next_wave(step.layer, self._host[place : at.picks])
            self._check(error)
            if not count:
                return
            self._compute_wave(steps, place, count)
            place += _gpu.TILE_BYTES * count

    def _compute_wave(self, steps: Sequence[ServeExperts], place: int, count: int) -> None:
        """The products of a wave's experts, whose tiles lie at a place of the inputs."""
        waves = []
        for device, step in zip(self._devices, steps, strict=True):
            self._send_tiles(device, place, count)
            inputs = device.recorded.inputs_address
            waves.append(Wave(inputs + place, inputs + self._inputs.order, count))
            self._run(device, step.gate_up(waves[-1]))
        if len(steps) > 1:
            self._exchange(
                [step.leave(w) for step, w in zip(steps, waves, strict=True)],
                [step.fetch(w) for step, w in zip(steps, waves, strict=True)],
            )
        for device, step, wave in zip(self._devices, steps, waves, strict=True):
            self._run(device, step.down(wave))

    def _send_tiles(self, device: OnDevice, place: int, count: int) -> None:
        """To a device, with the places that its records have."""
        found = self._words(place, count * TILE_WORDS, np.uint64)
        words = device.shared.part("inputs", place, found.nbytes).view(np.uint64)
        words[:] = found
        if device is not self._first:
            words[::TILE_WORDS] += np.uint64((device.vram - self._first.vram) % 2**64)
        device.gpu.stream.copy_in(device.recorded.inputs_address + place, words.ctypes.data, words.nbytes)

    def _exchange(self, leave: Sequence[LaunchSpec], fetch: Sequence[LaunchSpec]) -> None:
        """Every device leaves what it has made; each fetches the others' when all have."""
        for device, spec, event in zip(self._devices, leave, self._left, strict=True):
            self._run(device, spec)
            device.gpu.stream.record(event)
        for device, spec in zip(self._devices, fetch, strict=True):
            for other, event in zip(self._devices, self._left, strict=True):
                if other is not device:
                    device.gpu.stream.wait(event)
            self._run(device, spec)

    @staticmethod
    def _run(device: OnDevice, spec: LaunchSpec) -> None:
        device.gpu.prepare(spec.kernel, spec.grid, *spec.arguments).run(device.gpu.stream)

    def _compute_logits(self, recorder: BatchRecorder, joined: Joined, logits: np.ndarray) -> None:
        stream, vocabulary = self._first.gpu.stream, self._shape.vocabulary
        place, start = self._inputs.logits, 0
        for first, count in joined.output_runs(LOGITS_TOKENS):
            for spec in recorder.tail(first, count):
                self._run(self._first, spec)
            stream.copy_out(self._host.ctypes.data + place, recorder.logits_address, 4 * count * vocabulary)
            stream.synchronize(self._gate)
            logits[start : start + count] = self._words(place, count * vocabulary, np.float32).reshape(count, -1)
            start += count
        if not len(logits) or len(self._devices) > 1:
            self._synchronize()


def _bound(part: Any, tokens: int, device: OnDevice) -> list[Any]:
    """What a recorded part is on a device."""
    if isinstance(part, LaunchSpec):
        return [device.gpu.prepare(part.kernel, part.grid, *part.arguments)]
    if isinstance(part, DenseProduct):
        assert device.products is not None
        return list(device.products.launches(part.matrix, part.x, part.y, tokens))
    return [part]
