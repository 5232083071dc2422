"""Devices that compute each layer together, on the kernels' double: one device's bits, and each row is made once."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io.errors import FormatError
from fomoe_io.gpu import exchange, kernels
from fomoe_io.gpu import launches as make
from fomoe_io.gpu.arena import ALIGNMENT_BYTES, F32, Q8, DeviceMatrix, LaunchSpec, Mailbox, Share
from fomoe_io.gpu.batch_recorder import ExchangeRows, PostPicks, ServeExperts, Wave
from fomoe_io.gpu.budget import RecordLayout
from fomoe_io.gpu.exchange import Exchange
from fomoe_io.gpu.recordings import Addresses, ModelSource, Recordings
from fomoe_io.gpu.weights import kernel_of
from fomoe_io.models import check_model
from fomoe_io.models.architecture import Model
from fomoe_io.storage.store import Store
from tests.gpu.test_device_engine import tiny
from tests.gpu_shim import reference as ref
from tests.gpu_shim.cpu_kernels import CpuRunner, build
from tests.gpu_shim.tile_cases import TILE
from tests.tiny_model import Type, write_tiny

TOKENS = [3, 141, 59, 26]
CONTEXT = 16
LATENT = {"architecture": "deepseek2", "query_rank": 32, "dense_layers": 1, "rotated": 16, "latent": 96}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> CpuRunner:
    return CpuRunner(build(tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the products."""
    monkeypatch.setattr(exchange, "LEAST_BYTES", 1)
    monkeypatch.setattr(exchange, "LEAST_ROWS", 1)


class Words:
    """Zeroed memory that kernels reach."""

    def __init__(self, nbytes: int) -> None:
        room = np.zeros(nbytes + ALIGNMENT_BYTES, np.uint8)
        self.bytes = room[-room.ctypes.data % ALIGNMENT_BYTES :][:nbytes]
        self.address = self.bytes.ctypes.data


class Device:
    """One of those that compute a model together: its memory, filled, and what runs in it.

    Every second expert of a layer is read in place, so that it is computed by the kernels of those that come late.
    """

    def __init__(self, runner: CpuRunner, store: Store, model: Model, share: Share, common: Words) -> None:
        self.runner, self._model, self.share = runner, model, share
        with store.paths[0].open("rb") as file:
            self._file = np.frombuffer(file.read(), np.uint8)
        self._table = self._tensor("token_embd.weight", store)
        self.records: dict[int, list[Words]] = {}
        layouts = {layer: self._load_experts(layer) for layer in model.experts}
        source = source_of(model, share, layouts)
        sketch = Recordings(source, len(TOKENS), 0, Addresses())
        self._memory = [Words(n) for n in (*sketch.fixed_bytes, sketch.mail.bytes)]
        where = [words.address for words in self._memory] + [common.address] * 2
        self.recorded = r = Recordings(source, len(TOKENS), 0, Addresses(*where))
        for planned in r.weights.planned.values():
            data = self._tensor(planned.tensor.name, store, is_expanded=planned.is_expanded)
            self._write(planned.address, ref.in_planes(planned.planes, data) if planned.planes else data)
        for address, rope in r.memory.ropes.items():
            self._write(address, rope.table(CONTEXT))
        for address, data in r.memory.constants.items():
            self._write(address, np.frombuffer(data, np.uint8))
        self._fill_tables()

    def _tensor(self, name: str, store: Store, *, is_expanded: bool = False) -> np.ndarray:
        tensor = store.resident[name]
        raw = self._file[tensor.offset : tensor.offset + tensor.bytes]
        return gguf.quants.dequantize(raw, tensor.type).astype(np.float32) if is_expanded else raw

    def _load_experts(self, layer: int) -> RecordLayout:
        of, sizes = self._model.experts[layer], []
        names = [str(kernel_of(int(part.type))) for part in of.parts]
        rows = (self._model.shape.hidden, self._model.shape.hidden, self._model.shape.columns)
        self.records[layer] = []
        for extents in of.extents.tolist():
            parts = []
            for (_, offset, nbytes), count in zip(extents, rows, strict=True):
                parts.append(self._file[offset : offset + nbytes].reshape(count, -1)[self.share.of(count)].ravel())
            sizes = [up16(part.nbytes) for part in parts]
            record = Words(sum(sizes))
            for part, place in zip(parts, (0, sizes[0], sizes[0] + sizes[1]), strict=True):
                record.bytes[place : place + part.nbytes] = part
            self.records[layer].append(record)
        gate, up, down = sizes
        places = (0, gate, gate + up)
        return RecordLayout((names[0], names[2]), (gate, up, down), places, (sum(sizes),) * 2, False)

    def _fill_tables(self) -> None:
        s = self._model.shape
        for layer, records in self.records.items():
            table = [record.address | (expert & 1) for expert, record in enumerate(records)]
            self._write(self.recorded.tables_address + 8 * s.experts * layer, np.array(table, np.uint64))

    @staticmethod
    def _write(address: int, data: np.ndarray) -> None:
        data = np.ascontiguousarray(data)
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    @staticmethod
    def _read(address: int, dtype: Any, *shape: int) -> np.ndarray:
        found = np.empty(shape, dtype)
        ctypes.memmove(found.ctypes.data, address, found.nbytes)
        return found

    def launch(self, spec: LaunchSpec) -> None:
        self.runner.launch(spec.kernel, spec.grid, *spec.arguments)

    def embedding(self, token: int) -> np.ndarray:
        return self._table.reshape(self._model.shape.vocabulary, -1)[token]

    def token(self, number: int, token: int, position: int) -> np.ndarray:
        """The logits that are made here."""
        r, h, address = self.recorded, self.recorded.header, self.recorded.header_address
        self._write(address, np.array([number, 0], np.uint32))
        self._write(address + h.positions, np.array([position], np.int32))
        self._write(address + h.embedding, self.embedding(token))
        for spec in r.token.launches(1):
            self.launch(spec)
        return self._read(r.token.logits_address, np.float32, self._model.shape.vocabulary)[r.token.own_logits]

    def batch(self, all_left: Barrier) -> np.ndarray:
        """The last token's logits; experts come in two waves."""
        r, recorder = self.recorded, self.recorded.batch(len(TOKENS), uses_products=False)
        self._write(recorder.positions, np.arange(len(TOKENS), dtype=np.int32))
        self._write(recorder.embedding_address, np.stack([self.embedding(token) for token in TOKENS]))
        picks = np.zeros(0, np.int32)
        for step in recorder.finished_body():
            if isinstance(step, PostPicks):
                picks = self._read(step.ids, np.int32, len(TOKENS) * self._model.shape.used)
            elif isinstance(step, ServeExperts):
                self._serve(step, picks, all_left)
            elif isinstance(step, ExchangeRows):
                self.launch(step.leave())
                all_left.wait(60)
                self.launch(step.fetch())
            else:
                self.launch(step)
        for spec in recorder.tail(len(TOKENS) - 1, 1):
            self.launch(spec)
        assert recorder.own_logits == slice(0, self._model.shape.vocabulary)
        assert r.exchange_bytes >= recorder.exchange.bytes
        return self._read(recorder.logits_address, np.float32, self._model.shape.vocabulary)

    def _serve(self, step: ServeExperts, picks: np.ndarray, all_left: Barrier) -> None:
        for half in (0, 1):
            order: list[int] = []
            tiles = []
            for expert in sorted(set(picks[picks % 2 == half].tolist())):
                pairs = np.flatnonzero(picks == expert).tolist()
                tiles.append((self.records[step.layer][expert].address, len(order), len(pairs)))
                order += pairs
            if not tiles:
                continue
            memory = np.array(tiles, TILE), np.array(order, np.int32)
            wave = Wave(memory[0].ctypes.data, memory[1].ctypes.data, len(tiles))
            self.launch(step.gate_up(wave))
            if self.share.count > 1:
                self.launch(step.leave(wave))
                all_left.wait(60)
                self.launch(step.fetch(wave))
            self.launch(step.down(wave))

    def stop(self) -> None:
        """Nothing waits any more."""
        self._memory[3].bytes[:4] = 1


def up16(nbytes: int) -> int:
    return kernels.up(nbytes, 16) * 16


def source_of(model: Model, share: Share, layouts: dict[int, RecordLayout]) -> ModelSource:
    forms = {i: Q8 if r.kernels[0] in kernels.QUANTIZED_TYPES else F32 for i, r in layouts.items()}
    return ModelSource(
        model.shape, model.architecture.build, model.resident, [0], layouts, {i: (f, f) for i, f in forms.items()},
        CONTEXT, substitutes=False, share=share,
    )  # fmt: skip


def evaluated(runner: CpuRunner, path: Path, count: int) -> list[np.ndarray]:
    """A batch's logits of every device, and single tokens' put together."""
    store = Store.open(path)
    model = check_model(store)
    common = Words(1 << 22)
    devices = [Device(runner, store, model, Share(rank, count), common) for rank in range(count)]
    assert len({device.recorded.exchange_bytes for device in devices}) == 1
    assert devices[0].recorded.exchange_bytes <= 1 << 22
    all_left = Barrier(count)

    def guarded(device: Device, work: Any, *arguments: Any) -> np.ndarray:
        try:
            return work(device, *arguments)
        except BaseException:
            all_left.abort()
            for each in devices:
                each.stop()
            raise

    with ThreadPoolExecutor(count) as pool:
        found = []
        for number, token in enumerate(TOKENS):
            parts = [pool.submit(guarded, d, Device.token, number + 1, token, number) for d in devices]
            found.append(np.concatenate([part.result() for part in parts]))
        found += [part.result() for part in [pool.submit(guarded, d, Device.batch, all_left) for d in devices]]
    return found


@pytest.mark.usefixtures("divided")
@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"weights": Type.Q4_K, "down": Type.Q6_K, "vocabulary": 301}, 2),
        ({"weights": Type.Q8_0, "architecture": "gpt-oss", "rotated": 64, "biased": True, "down": Type.F16}, 2),
        ({**LATENT, "weights": Type.Q8_0, "layers": 2}, 4),
    ],
    ids=["qwen35moe", "gpt-oss", "deepseek2"],
)
def test_the_bits_are_one_device_s(tmp_path: Path, runner: CpuRunner, changes: dict[str, Any], count: int) -> None:
    path = write_tiny(tmp_path / "model.gguf", tiny(**{"layers": 4, **changes}), seed=5)
    alone, together = evaluated(runner, path, 1), evaluated(runner, path, count)
    assert not any(np.isnan(logits).any() for logits in alone)
    for expected, found in zip([*alone, *[alone[-1]] * (count - 1)], together, strict=True):
        np.testing.assert_array_equal(found, expected)


def recorded(model: Model, share: Share, batch_tokens: int = 1) -> Recordings:
    """At addresses that tell what is what."""
    names = {i: [str(kernel_of(int(part.type))) for part in of.parts] for i, of in model.experts.items()}
    layouts = {i: RecordLayout((n[0], n[2]), (0, 0, 0), (0, 0, 0), (256, 256), False) for i, n in names.items()}
    places = [k << 40 for k in range(1, 7)]
    return Recordings(source_of(model, share, layouts), batch_tokens, 0, Addresses(*places))


def rows_made(spec: LaunchSpec) -> list[tuple[int, int]]:
    """(first, count) of each matrix in a launch; of dense ones the first is where the sum goes, in floats."""
    a = spec.arguments
    if spec.kernel.startswith("mat_vec_many"):
        return [(y // 4, rows) for y, rows in zip(a[4:8], a[8:12], strict=True) if rows]
    if spec.kernel.startswith("mat_vec"):
        return [(a[2] // 4, a[3])]
    if spec.kernel.startswith("experts_gate_up"):
        return [(a[-2], 32 * spec.grid[0])]
    return [(a[-2], a[-1])] if spec.kernel.startswith("experts_down") else []


@pytest.mark.usefixtures("divided")
@pytest.mark.parametrize("count", [2, 4])
def test_every_row_is_made_once(tmp_path: Path, count: int) -> None:
    """And what was made is exchanged through the same words by all, which no other exchange of a run has."""
    model = check_model(Store.open(write_tiny(tmp_path / "model.gguf", tiny(vocabulary=301), seed=5)))
    devices = [recorded(model, Share(rank, count)) for rank in range(count)]
    between = ("gather", "wait_for_misses")  # of several devices alone
    lists = [[s for s in d.token.launches(1) if not s.kernel.startswith(between)] for d in devices]
    whole, divided = recorded(model, Share()).token.launches(1), 0
    for expected, *found in zip(whole, *lists, strict=True):
        assert {spec.kernel for spec in found} == {expected.kernel}
        for (first, rows), *parts in zip(rows_made(expected), *map(rows_made, found), strict=True):
            if set(parts) == {(first, rows)}:
                continue
            divided += 1
            for begin, length in parts:
                assert begin == first
                first, rows = first + length, rows - length
            assert not rows
    assert divided >= 5 * len(model.experts)
    gathers = [[s for s in d.token.launches(1) if s.kernel.startswith("gather")] for d in devices]
    assert any(spec.beside for spec in whole) and not any(spec.beside for specs in gathers for spec in specs)
    place = 0
    for same in zip(*gathers, strict=True):
        assert len({s.kernel for s in same}) == 1
        floats = same[0].kernel == "gather_floats"
        assert {tuple(s.arguments[8:10] if floats else s.arguments[4:6]) for s in same} == {
            ((5 << 40) + place, (6 << 40) + place)
        }
        assert [s.arguments[-3:-1] for s in same] == [[rank, count] for rank in range(count)]
        words = sum(same[0].arguments[4:8]) if floats else 3 * 256 // count
        place += kernels.up(8 * count * words, ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    assert {d.exchange_bytes for d in devices} == {place}


def test_small_products_are_made_by_each_device(tmp_path: Path) -> None:
    """Two exchanges a layer, of its experts."""
    model = check_model(Store.open(write_tiny(tmp_path / "model.gguf", tiny(weights=Type.Q4_K), seed=5)))
    specs = recorded(model, Share(0, 2)).token.launches(1)
    assert [s.kernel for s in specs if s.kernel.startswith("gather")] == ["gather_hidden", "gather_floats"] * 4
    assert not any(s.kernel.startswith("gather") for s in recorded(model, Share()).token.launches(1))
    assert recorded(model, Share()).exchange_bytes == 0


def test_widths_that_are_no_multiple_are_refused(tmp_path: Path) -> None:
    model = check_model(Store.open(write_tiny(tmp_path / "model.gguf", tiny(), seed=5)))
    with pytest.raises(FormatError, match="3 devices can't share experts of expert width 256: it is no multiple of 96"):
        recorded(model, Share(0, 3))


def test_sums_keep_the_order_of_the_whole_matrix() -> None:
    """Few rows' columns are shared among warps; half of many rows are not few."""
    many, few = (DeviceMatrix(1 << 20, "q4_k", rows, 4096) for rows in (kernels.MANY_ROWS, 512))
    half = slice(512, 1024)
    for whole in (many, few):
        own = half if whole is many else slice(256, 512)
        specs = [make.mat_vec(make.Product(whole, 0, 0, rows)) for rows in (None, own)]
        assert specs[0].arguments[-1] == specs[1].arguments[-1] == (1 if whole is many else 2)
        assert specs[1].arguments[0] == whole.address + own.start * 4096 // 256 * 144
    together = [[make.Product(many, 0, 0, rows), make.Product(few, 0, 0)] for rows in (None, half)]
    assert [make.mat_vec_many(products).arguments[-1] for products in together] == [1, 1]


def test_which_products_are_divided() -> None:
    """Those that are worth an exchange: not a router's few rows, nor what is small, but for small ones beside them."""
    query, key, odd = (DeviceMatrix(0, "q4_k", rows, 4096) for rows in (8192, 512, 1001))
    router, small = DeviceMatrix(0, "f32", 512, 4096), DeviceMatrix(0, "q4_k", 2048, 512)
    second = Exchange(Share(1, 2), Mailbox(0, 0))
    assert second.own_rows([query, key, odd]) == [slice(4096, 8192), slice(256, 512), slice(0, 1001)]
    assert second.own_rows([router]) == [slice(0, 512)] and second.own_rows([small]) == [slice(0, 2048)]
    assert Exchange(Share(0, 1), Mailbox(0, 0)).own_rows([query]) == [slice(0, 8192)]
