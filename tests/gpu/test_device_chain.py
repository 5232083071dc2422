"""Several devices share a model (logical ones, on a double): the bits are one device's, a failure is one line."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, Tiers
from fomoe_io.errors import BudgetError, DeviceError, ReadError, UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.gpu.chain import ChainBackend, owners
from fomoe_io.gpu.pipeline import Piece
from fomoe_io.session import read_together
from fomoe_io.trace.simulator import replay
from fomoe_io.trace.trace import Trace
from tests.fake_hip.build import Fake
from tests.gpu.test_device_engine import TOKENS, settings, tiny
from tests.tiny_model import Type, write_tiny

PROMPT = TOKENS[:5]
SMALL: dict[str, Any] = {"batch_tokens": 2}
SPLITS: dict[str, dict[str, Any]] = {
    "layer": {"device": "hip:0,0", "split_mode": "layer"},
    "pingpong": {"device": "hip:0,0", "split_mode": "pingpong"},
    "uneven": {"device": "hip:0,0", "split_mode": "layer", "tensor_split": "3,1"},
    "three": {"device": "hip:0,0,0", "split_mode": "pingpong"},
    "tensor": {"device": "hip:0,0", "split_mode": "tensor"},
}


@pytest.fixture(autouse=True)
def provider(fake: Fake) -> Iterator[None]:
    yield
    fake.fail("", 0)
    fake.release()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With recurrent state."""
    shape = tiny(weights=Type.Q4_K, down=Type.Q6_K)
    return write_tiny(tmp_path_factory.mktemp("models") / "model.gguf", shape, seed=3)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without, and without a shared expert."""
    shape = tiny(weights=Type.Q4_K, architecture="qwen3moe", layers=3, shared_hidden=0, rotated=64)
    return write_tiny(tmp_path_factory.mktemp("models") / "plain.gguf", shape, seed=4)


def read(path: Path, **how: Any) -> tuple[list[bytes], dict[str, Any]]:
    """A prompt's logits, a second session's beside it, the picks, and single tokens; with what was counted."""
    with Engine.open(path, settings(sessions=2, **how)) as engine:
        first, second = engine.session(), engine.session()
        found = [first.evaluate(PROMPT, record=["experts"]), first.records["experts"]]
        found += [first.decode(7).copy(), second.decode(9).copy(), first.decode(11).copy()]
        said = engine.statistics()
        first.reset()
        second.reset()
        found.append(read_together([(first, PROMPT[:2]), (second, PROMPT[2:])]))
    return [array.tobytes() for array in found], said


@pytest.mark.parametrize(
    ("name", "splits", "how"),
    [
        ("model", ["layer"], {}),
        ("model", ["pingpong", "uneven", "three"], {"tiers": Tiers(0.25, 0.25)}),
        ("plain_model", ["pingpong", "layer"], {"tiers": Tiers(0.25, 0), "batch_tokens": 1, "kv_type": "f16"}),
    ],
    ids=["whole", "tight", "single tokens"],
)
def test_the_bits_are_one_device_s(
    request: pytest.FixtureRequest, name: str, splits: list[str], how: dict[str, Any]
) -> None:
    """Whatever the split, the memory and the batches; and the experts are found where one device finds them."""
    path = request.getfixturevalue(name)
    expected, counted = read(path, **how)
    for split in splits:
        found, said = read(path, **how, **SPLITS[split])
        assert found == expected
        assert said["expert_requests"] == counted["expert_requests"]
        hits = [{tier: of["hits"] for tier, of in s["tiers"].items()} for s in (said, counted)]
        assert hits[0] == hits[1]
        assert min(said["split"]["layers"]) > 0 and len(said["split"]["layers"]) == SPLITS[split]["device"].count("0")


def test_it_tells_where_experts_are(model: Path) -> None:
    """As one device does."""
    found = []
    for split in ({}, SPLITS["pingpong"], SPLITS["uneven"], SPLITS["tensor"]):
        with Engine.open(model, settings(tiers=Tiers(0.25, 0.25), **split)) as engine:
            engine.session().evaluate(TOKENS)
            found.append({layer: tiers.tolist() for layer, tiers in engine.expert_tiers().items()})
    assert all(each == found[0] for each in found)
    assert {0, 1, 2} == {t for tiers in found[0].values() for t in tiers}


def test_cache_aware_routing_is_the_same(model: Path) -> None:
    split = "pingpong"
    how = {"tiers": Tiers(0.25, 0.25), "car": CarRule.parse("ratio:0.5")}
    (expected, counted), (found, said) = read(model, **how), read(model, **how, **SPLITS[split])
    assert found == expected and said["substitutions"] == counted["substitutions"] > 0


@pytest.mark.parametrize("mode", ["layer", "tensor"])
def test_two_devices_that_are_two(model: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    expected, _ = read(model)
    monkeypatch.setenv("FAKE_HIP_DEVICES", "2")
    found, said = read(model, device="hip:0,1", split_mode=mode)
    assert found == expected and said["device"].startswith("hip:0,1 ")


@pytest.mark.parametrize("split", ["pingpong", "tensor"])
def test_a_session_is_taken_out_of_one_and_put_into_two(model: Path, split: str) -> None:
    snapshots = {}
    for name, how in (("one", {}), ("two", SPLITS[split])):
        with Engine.open(model, settings(**how)) as engine:
            session = engine.session()
            session.prefill(PROMPT)
            snapshots[name] = session.snapshot()
            expected = session.decode(7).tobytes()
            session.reset()
            session.restore(snapshots[name])
            assert session.position == len(PROMPT) and session.decode(7).tobytes() == expected


def test_who_computes_which_layer() -> None:
    assert owners(5, (1, 1), "layer") == (0, 0, 0, 1, 1) or owners(5, (1, 1), "layer") == (0, 0, 1, 1, 1)
    assert owners(4, (3, 1), "layer") == (0, 0, 0, 1)
    assert owners(4, (1, 1), "pingpong") == (0, 1, 0, 1)
    assert owners(6, (1, 1, 1), "pingpong") == (0, 1, 2, 0, 1, 2)
    for mode in ("layer", "pingpong"):
        found = owners(60, (12, 16), mode)
        assert abs(found.count(1) - 34) <= 1


def test_memory_of_each(model: Path) -> None:
    """A budget a device holds for each, and the host's for all; too little is told by the amount that does."""
    with Engine.open(model, settings(vram_bytes=(48 << 20, 64 << 20), **SPLITS["layer"])) as engine:
        assert engine.budgets.vram_bytes == 112 << 20
        assert len(engine.memory_lines()) == 3
    with pytest.raises(BudgetError, match="is too small for"):
        Engine.open(model, settings(vram_bytes="1M,64M", **SPLITS["layer"]))
    for how, said in (
        ({"vram_bytes": "1G,1G,1G"}, "vram_bytes is for 3 devices, and hip:0,0 names 2"),
        ({"tensor_split": "1,0"}, "expected positive numbers"),
        ({"split_mode": "row"}, "expected one of auto, layer, pingpong"),
    ):
        with pytest.raises(UsageError, match=said):
            settings(**{**SPLITS["layer"], **how})
    with pytest.raises(UsageError, match="gives layers to 1 of them"):
        Engine.open(model, settings(**{**SPLITS["layer"], "tensor_split": "1000,1"}))


@pytest.mark.parametrize("split", ["layer", "pingpong", "tensor"])
def test_a_trace_is_one_device_s(model: Path, tmp_path: Path, split: str) -> None:
    """Layers in order, whoever computed them; and replayed, it counts what the engine has counted."""
    traces = {}
    for name, how in (("one", {}), ("two", SPLITS[split])):
        path = tmp_path / name
        with Engine.open(model, settings(tiers=Tiers(0.25, 0.25), trace=path, **SMALL, **how)) as engine:
            session = engine.session()
            session.prefill(TOKENS)
            session.decode(7)
            counted = engine.statistics()
        traces[name] = path.read_bytes()
    assert traces["one"] == traces["two"]
    trace = Trace.load(path)
    played = replay(trace, np.array(trace.header.slots), decay=trace.header.decay).counters
    assert played["requests"] == counted["expert_requests"] > 0
    assert [played[f"{tier}_hits"] for tier in ("vram", "dram")] == [
        counted["tiers"][tier]["hits"] for tier in ("vram", "dram")
    ]


def test_batches_follow_one_another(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first device is at the second batch before the second device has done with the first."""
    with Engine.open(model, settings(**SMALL)) as engine:
        expected = engine.session().prefill(TOKENS).tobytes()
    begun, waited = threading.Event(), []
    plain = ChainBackend._stage_prompt

    def watched(backend: ChainBackend, i: int, piece: Piece, uses_products: bool) -> Iterator[int]:
        if (i, piece.place[0]) == (0, 1):
            begun.set()
        if (i, piece.place[0]) == (1, 0):
            waited.append(begun.wait(10))
        return plain(backend, i, piece, uses_products)

    monkeypatch.setattr(ChainBackend, "_stage_prompt", watched)
    with Engine.open(model, settings(**SMALL, **SPLITS["layer"])) as engine:
        assert engine.session().prefill(TOKENS).tobytes() == expected
    assert waited == [True]


@pytest.mark.parametrize("ends", ["the second device fails", "an interrupt"])
def test_batches_that_follow_one_another_end_together(
    model: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    plain = ChainBackend._stage_prompt

    def watched(backend: ChainBackend, i: int, piece: Piece, uses_products: bool) -> Iterator[int]:
        if (i, piece.place[0]) == (1, 1):
            if ends == "an interrupt":
                fake.hang("hipModuleLaunchKernel")
                threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
            else:
                raise DeviceError("gone")
        return plain(backend, i, piece, uses_products)

    with Engine.open(model, settings(**SMALL, **SPLITS["layer"])) as engine:
        session = engine.session()
        expected = session.prefill(TOKENS).tobytes()
        session.reset()
        began = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(ChainBackend, "_stage_prompt", watched)
            with pytest.raises(KeyboardInterrupt if ends == "an interrupt" else DeviceError):
                session.prefill(TOKENS)
        assert session.is_broken and time.monotonic() - began < 8
        fake.release()
        session.reset()
        assert session.prefill(TOKENS).tobytes() == expected


@pytest.mark.parametrize("split", ["pingpong", "tensor"])
@pytest.mark.parametrize("reads", ["tokens", "a prompt"])
@pytest.mark.parametrize(("call", "after"), [("hipGraphLaunch", 1), ("hipMemcpyHtoDAsync", 3), ("hipStreamQuery", 5)])
def test_one_that_fails_ends_the_run(model: Path, fake: Fake, call: str, after: int, reads: str, split: str) -> None:
    """In one line, and the engine goes on with the next: the others wait for nothing that does not come."""
    if (call, reads) == ("hipGraphLaunch", "a prompt"):
        pytest.skip("prompts launch no graph")
    tight = {"tiers": Tiers(0.19, 0.0), **SPLITS[split]}
    with Engine.open(model, settings(sessions=2, **tight)) as engine:
        session = engine.session()
        expected = session.evaluate(PROMPT).tobytes()
        fake.fail(call, 719, after)
        started = time.monotonic()
        with pytest.raises(DeviceError, match="719") as caught:
            for _ in range(4):
                if reads == "tokens":
                    session.decode(7)
                else:
                    session.prefill(TOKENS[:4])
        assert "\n" not in caught.value.message and time.monotonic() - started < 30
        if call == "hipGraphLaunch":  # after others the device is not trusted any more
            session.reset()
            assert session.evaluate(PROMPT).tobytes() == expected


@pytest.mark.parametrize("split", ["layer", "tensor"])
def test_reads_that_fail(model: Path, tmp_path: Path, split: str) -> None:
    """Of a layer of either device."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes())
    with Engine.open(path, settings(tiers=Tiers(0.19, 0.0), **SPLITS[split])) as engine:
        session = engine.session()
        session.decode(1)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 8)
        with pytest.raises(ReadError, match="reading"):
            for token in range(40):
                session.decode(token)
        assert session.is_broken


@pytest.mark.parametrize("split", ["layer", "tensor"])
@pytest.mark.parametrize("ends", ["an interrupt", "closing"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_wait_ends_early(model: Path, fake: Fake, ends: str, after: int, split: str) -> None:
    """Whichever device hangs."""
    engine = Engine.open(model, settings(**SPLITS[split]))
    session, errors = engine.session(), []
    session.decode(7)
    fake.hang("hipGraphLaunch", after)

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
        fake.release()

    def decode() -> None:
        try:
            session.decode(8)
        except BaseException as error:
            errors.append(str(error))

    began = time.monotonic()
    if ends == "an interrupt":
        threading.Timer(0.3, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            session.decode(8)
        session.reset()
        session.decode(7)
    else:
        thread = threading.Thread(target=decode, daemon=True)
        thread.start()
        time.sleep(0.3)
        threading.Timer(1.5, fake.release).start()
        engine.close()
        thread.join(10)
        assert errors == ["the engine was closed while it ran"]
    assert time.monotonic() - began < 8
    engine.close()


@pytest.mark.parametrize("split", ["pingpong", "tensor"])
def test_everything_is_given_back(model: Path, fake: Fake, split: str) -> None:
    read(model, **SPLITS[split])
    before, threads = fake.live(), threading.active_count()
    read(model, **SPLITS[split])
    assert fake.live() == before and threading.active_count() == threads
    with pytest.raises(BudgetError):
        Engine.open(model, settings(vram_bytes="64M,1M", **SPLITS["layer" if split == "pingpong" else split]))
    assert fake.live() == before
