"""Experts that a device guesses a layer ahead are read before they are missed, and change nothing but the time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.backend import Budgets
from fomoe_io.config import Tiers, Tuning
from fomoe_io.errors import BudgetError, DeviceError, ReadError, UsageError
from fomoe_io.experts import lookahead
from fomoe_io.gpu.backend import GpuBackend
from fomoe_io.gpu.chain import ChainBackend
from fomoe_io.models import blocks
from fomoe_io.trace.simulator import replay
from fomoe_io.trace.trace import Trace
from tests.fake_hip.build import Fake
from tests.fakes.ahead import drives
from tests.tiny_model import Tiny, write_tiny

TOKENS = np.random.default_rng(5).integers(0, 300, 10)
MODEL = Tiny(architecture="qwen3moe", layers=3, columns=64, heads=2, kv_heads=1, head_columns=32, experts=16, used=3)

DELAY_US = 10  # of the double


@pytest.fixture(autouse=True)
def provider(fake: Fake) -> Iterator[None]:
    misuses = fake.misuses()
    yield
    fake.fail("", 0)
    fake.lose(0)
    assert fake.misuses() == misuses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "model.gguf", MODEL, seed=3)


def settings(**more: Any) -> EngineConfig:
    default = {"context_tokens": 64, "device": "hip", "batch_tokens": 1, "tiers": Tiers(0.25, 0.125)}
    return EngineConfig(**(default | {"tuning": Tuning(piece_bytes=4096), "lookahead": "on"} | more))


def decoded(engine: Engine) -> bytes:
    session = engine.session()
    return np.stack([session.decode(int(token)).copy() for token in TOKENS]).tobytes()


def answer(model: Path, **more: Any) -> tuple[bytes, dict[str, Any]]:
    with Engine.open(model, settings(**more)) as engine:
        return decoded(engine), engine.statistics()


def decisions(s: dict[str, Any]) -> list[Any]:
    """All that is counted of the experts but the reads."""
    names = ("expert_requests", "substitutions", "evictions", "promotions", "demotions")
    hits = [tier["hits"] for tier in s["tiers"].values()]
    return [*(s[name] for name in names), *hits, s["tiers"]["dram"].get("bytes")]


@pytest.fixture(scope="module")
def plain(model: Path, fake: Fake) -> tuple[bytes, dict[str, Any]]:
    return answer(model, lookahead="off")


@pytest.mark.parametrize("mode", ["pass", "behind", "hold", "spoil", "fail", "refuse"])
def test_bits_and_decisions_stay(model: Path, plain: tuple[bytes, dict[str, Any]], mode: str) -> None:
    """Whatever becomes of what is read ahead, behind the layer's own reads or between layers; and it is counted."""
    with drives(mode) as made:
        logits, s = answer(model)
    last = -1 if mode == "spoil" else None  # what is sent up twice has not come from DRAM
    assert logits == plain[0] and decisions(s)[:last] == decisions(plain[1])[:last]
    (drive,), prefetch, nvme = made, s["prefetch"], s["tiers"]["nvme"]
    assert s["budgets"]["lookahead_bytes"] > 0
    if mode == "behind":  # a drive has the next layer's to read before it has done this one's
        assert drive.early > 0
    again = nvme["reads"] - (nvme["hits"] + prefetch["issued"] - prefetch["useful"])
    assert (again > 0) == (mode == "spoil") and again <= prefetch["useful"]
    assert nvme["bytes"] >= prefetch["bytes"] >= prefetch["wasted_bytes"]
    assert prefetch["recall"][0] is None and all(0.2 < share <= 1 for share in prefetch["recall"][1:])
    found = {name: prefetch[name] > 0 for name in ("issued", "useful", "late", "bytes", "wasted_bytes")}
    if mode in ("pass", "behind"):
        assert found["issued"] and found["useful"] and prefetch["wasted_bytes"] < prefetch["bytes"]
    elif mode in ("hold", "spoil"):  # each came when it was missed
        assert prefetch["late"] == prefetch["useful"] > 0
        assert prefetch["wasted_bytes"] == 0  # nothing that nobody asked for has begun
    else:
        assert not found["useful"] and found["issued"] == (mode == "fail")
    assert not any(plain[1]["prefetch"].values()) and plain[1]["budgets"]["lookahead_bytes"] == 0


def test_the_layer_after_the_next_is_read_ahead(
    model: Path, plain: tuple[bytes, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In buffers of its own; without such guesses there is less of it, and no bit another."""
    both, s = answer(model)
    monkeypatch.setattr(blocks, "LAYERS_AHEAD", 1)
    one, less = answer(model)
    assert both == one == plain[0] and decisions(s)[:-1] == decisions(less)[:-1]
    assert s["prefetch"]["issued"] > less["prefetch"]["issued"] > 0
    assert s["prefetch"]["recall"] == less["prefetch"]["recall"]  # of what is guessed last


PROMPT = np.random.default_rng(6).integers(0, 300, 48)


def read(model: Path, tokens: np.ndarray, **more: Any) -> tuple[bytes, dict[str, Any]]:
    """A prompt, and another session's, whose guesses know what the first wanted."""
    with Engine.open(model, settings(batch_tokens=len(tokens), tuning=Tuning(), **more)) as engine:
        logits = [engine.session().prefill(prompt).tobytes() for prompt in (tokens, tokens[::-1])]
        return b"".join(logits), engine.statistics()


FEW, MOST = Tiers(0.25, 0.125), Tiers(0.2, 0.7)


@pytest.mark.parametrize(
    ("mode", "tiers"),
    [("pass", FEW), ("hold", FEW), ("spoil", FEW), ("fail", FEW), ("refuse", FEW), ("pass", MOST), ("fail", MOST)],
)
def test_a_prompt_reads_its_next_layer_ahead(model: Path, mode: str, tiers: Tiers) -> None:
    """Once all of a layer has been asked for, where nearly every expert is wanted; whatever becomes of it."""
    expected, off = read(model, PROMPT, tiers=tiers, lookahead="off")
    with drives(mode):
        logits, on = read(model, PROMPT, tiers=tiers)
    assert logits == expected and decisions(on)[:-1] == decisions(off)[:-1]
    prefetch, nvme = on["prefetch"], on["tiers"]["nvme"]
    again = nvme["reads"] - (nvme["hits"] + prefetch["issued"] - prefetch["useful"])
    if mode == "refuse":
        assert not prefetch["issued"] and not again
    elif mode == "fail":  # known before the next layer's picks, or by whoever has taken it
        assert prefetch["issued"] and again == prefetch["useful"]
    else:
        assert 0 < prefetch["useful"] <= prefetch["issued"] < 2 * prefetch["useful"]
        assert (again > 0) == (mode == "spoil") and again <= prefetch["useful"]


def test_few_tokens_guess_nothing(model: Path) -> None:
    """Of 20 tokens' 60 pairs some experts of 16 get none."""
    assert read(model, PROMPT[:20])[1]["prefetch"]["issued"] == 0


@pytest.mark.parametrize(
    "more",
    [
        {"tiers": Tiers(0.19, 0.0)}, {"policy": "lru", "tiers": Tiers(0.19, 0.5), "reader": "pread"},
        {"tuning": Tuning(reads_in_place=True), "lookahead": 1}, {"car": "ratio:0.5"},
    ],
    ids=["fewest", "lru", "in-place", "car"],
)  # fmt: skip
def test_other_settings(model: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """The same with and without it, and what a trace of the run says is what the simulator makes of it."""
    expected, off = answer(model, **(more | {"lookahead": "off"}))
    logits, on = answer(model, **more, trace=tmp_path / "t")
    assert logits == expected and decisions(on)[:-1] == decisions(off)[:-1]
    assert on["prefetch"]["issued"] > 0 and (on["substitutions"] > 0) == ("car" in more)
    trace = Trace.load(tmp_path / "t")
    policy = more.get("policy", "decayed")
    c = replay(trace, np.array(trace.header.slots), policy=policy, decay=trace.header.decay, as_chosen=True).counters
    hits = [tier["hits"] for tier in on["tiers"].values()]
    assert [c["vram_hits"], c["dram_hits"], c["nvme_hits"]] == hits and c["substitutions"] == on["substitutions"]


def test_off_launches_what_it_launched_before(model: Path) -> None:
    found = []
    for mode in ("off", "on"):
        with Engine.open(model, settings(lookahead=mode)) as engine:
            assert isinstance(engine.backend, GpuBackend)
            token = engine.backend.recorded.token
            assert all(s.beside for s in token.launches(1, guesses=True) if s.guesses)  # not on the token's own way
            found.append([[(s.kernel, s.grid) for s in token.launches(1, guesses)] for guesses in (False, True)])
    (off, same), (without, with_it) = found
    assert off == same == without
    more = [kernel for kernel, _ in with_it]
    for kernel, _ in off:
        more.remove(kernel)
    # of all layers but the first, and of the third once more
    assert sorted(more) == sorted(3 * ["mat_vec_f32", "post_guesses", "rms_norm", "route"])


# the second chooses by more than logits
@pytest.mark.parametrize(("architecture", "rule"), [("qwen3moe", "ratio:1e-30"), ("minimax-m2", "prior:1")])
def test_what_others_stand_in_for_is_not_read(tmp_path: Path, architecture: str, rule: str) -> None:
    """A guess that cache-aware routing would replace; where all are, nothing is read ahead, but all is counted."""
    other = write_tiny(tmp_path / "model.gguf", replace(MODEL, architecture=architecture), seed=3)
    for car, is_all in ((f"{rule},swaps=16,keep=0", True), ("ratio:0.5", False)):
        assert answer(other, car=car)[0] == answer(other, lookahead="off", car=car)[0]
        with Engine.open(other, settings(car=car)) as engine:
            assert isinstance(engine.backend, GpuBackend)
            launches = [spec.kernel for spec in engine.backend.recorded.token.launches(1, guesses=True)]
            decoded(engine)
            engine.reset_statistics()  # from here on there are enough to stand in
            decoded(engine)
            s = engine.statistics()
        assert s["substitutions"] > 0 and s["prefetch"]["recall"][1] > 0
        assert (s["prefetch"]["issued"] == 0) == is_all
        assert launches.count("substitute_and_post") == 2 + 1 and "post_guesses" not in launches


def test_auto_measures_while_it_runs(
    model: Path, plain: tuple[bytes, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in {"WARM_TOKENS": 1, "STRETCH_TOKENS": 2, "LONG_STRETCHES": 4, "SKIPPED_TOKENS": 0}.items():
        monkeypatch.setattr(lookahead, name, count)
    assert EngineConfig().lookahead == "auto"
    with Engine.open(model, settings(lookahead="auto")) as engine:
        assert isinstance(engine.backend, GpuBackend)
        assert decoded(engine) == plain[0]
        s, backend = engine.statistics(), engine.backend
        assert len(backend.tokens.all_graphs()) == 2 and backend._lookahead.trials == 1
    assert decisions(s) == decisions(plain[1])
    assert s["prefetch"]["issued"] > 0 and s["prefetch"]["is_on"] in (False, True)


def budgets(model: Path, **more: Any) -> tuple[Budgets, int, list[str]]:
    """What was shared, how many graphs ten tokens took, and a token's launches."""
    with Engine.open(model, settings(**({"ram_bytes": 4 << 30} | more))) as engine:
        assert isinstance(engine.backend, GpuBackend)
        decoded(engine)
        backend, s = engine.backend, engine.statistics()["prefetch"]
        assert s["is_on"] == (backend.sharing.guesses > 0 and more["lookahead"] != "off")
        launches = [spec.kernel for spec in backend.recorded.token.launches(1, guesses=True)]
        return backend.budgets, len(backend.tokens.all_graphs()), launches


def test_auto_costs_nothing_where_nothing_is_missed(model: Path) -> None:
    """No buffers, no guesses in device memory, one graph of the same launches."""
    auto, off, on = (budgets(model, tiers=None, lookahead=mode) for mode in ("auto", "off", "on"))
    assert auto == off and auto[1] == 1
    assert on[0].lookahead_bytes > 0 and on[0].workspace_bytes > off[0].workspace_bytes and len(on[2]) > len(off[2])


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("tiers", [Tiers(0.5, 0.5), Tiers(0.25, 0.5)], ids=["all", "some"])
def test_what_lies_in_dram_is_sent_ahead(model: Path, tiers: Tiers, mode: str) -> None:
    """Into buffers of the device, before its layer has asked; no bit and no decision is another."""
    logits, s = answer(model, tiers=tiers, lookahead=mode)
    expected, off = answer(model, tiers=tiers, lookahead="off")
    assert logits == expected and decisions(s) == decisions(off)
    ahead = s["prefetch"]
    assert ahead["sent"] >= ahead["sent_useful"] > 0 and (ahead["sent_wasted_bytes"] > 0) == (
        ahead["sent"] > ahead["sent_useful"]
    )
    assert s["link"]["up_bytes"] == off["link"]["up_bytes"] + ahead["sent_wasted_bytes"]
    assert not any(off["prefetch"].values())
    if mode == "auto" and tiers.vram + tiers.dram == 1:
        assert s["budgets"]["lookahead_bytes"] == 0


def least_vram_bytes(model: Path) -> int:
    """Without lookahead."""
    enough, too_little = 64 << 20, 0
    while enough - too_little > 256:
        middle = (enough + too_little) // 2
        try:
            Engine.open(model, settings(vram_bytes=middle, lookahead="off", tiers=None)).close()
            enough = middle
        except BudgetError:
            too_little = middle
    return enough


def test_auto_yields_where_memory_is_short(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest budgets, of the device and of the host, are those without it; slots come first."""
    monkeypatch.setattr("fomoe_io.ram_budget.held_since", lambda _: 0)  # pytest's
    vram: dict[str, Any] = {"vram_bytes": least_vram_bytes(model), "tiers": None}
    assert budgets(model, lookahead="auto", **vram) == budgets(model, lookahead="off", **vram)
    with pytest.raises(BudgetError):
        Engine.open(model, settings(lookahead="on", **vram))
    for how in ({}, vram | {"slots": 9}):
        least, same = (smallest_ram_bytes(model, lookahead=mode, **how) for mode in ("off", "auto"))
        assert same == least
        found = budgets(model, ram_bytes=least, lookahead="auto", **how)
        assert found == budgets(model, ram_bytes=least, lookahead="off", **how)
        with pytest.raises(BudgetError):
            Engine.open(model, settings(ram_bytes=least, lookahead="on", **how))


def smallest_ram_bytes(model: Path, **how: Any) -> int:
    """What the error names, of a budget of nearly nothing and then of that."""
    asked = 1 << 20
    for _ in range(3):
        try:
            Engine.open(model, settings(ram_bytes=asked, **how)).close()
        except BudgetError as error:
            asked = error.smallest_bytes
    return asked


def test_several_devices(model: Path, plain: tuple[bytes, dict[str, Any]]) -> None:
    """A device guesses what follows on itself; in turn, each the next layer by what the other hands it early."""
    one = answer(model)[1]["prefetch"]["recall"]
    for mode, device, guessed in (
        ("layer", "hip:0,0", [False, True, False]),
        ("pingpong", "hip:0,0", [False, True, True]),
        ("pingpong", "hip:0,0,0", [False, True, True]),
    ):
        logits, s = answer(model, device=device, split_mode=mode)
        assert logits == plain[0] and decisions(s)[:-1] == decisions(plain[1])[:-1]
        assert s["prefetch"]["recall"] == [
            share if is_guessed else None for share, is_guessed in zip(one, guessed, strict=True)
        ]
        assert (s["prefetch"]["issued"] > 0) == any(guessed)
        with Engine.open(model, settings(device=device, split_mode=mode, lookahead="auto")) as engine:
            assert isinstance(engine.backend, ChainBackend)
            assert decoded(engine) == plain[0]
            staged = [stage.sharing.staged for stage in engine.backend.stages]
            s = engine.statistics()
        # of a device of which nothing is guessed: no buffers
        assert [count > 0 for count in staged] == ([True, False] if mode == "layer" else [True] * len(staged))
        assert s["prefetch"]["is_on"] == any(guessed) == ("recall" in s["prefetch"]) == (s["prefetch"]["issued"] > 0)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_device_that_hands_nothing_early_holds_nobody_up(
    model: Path, plain: tuple[bytes, dict[str, Any]], silent: int
) -> None:
    """Whoever waits for what to guess by goes on with the rows that come anyway."""
    with Engine.open(model, settings(device="hip:0,0", split_mode="pingpong", lookahead="on")) as engine:
        assert isinstance(engine.backend, ChainBackend)
        engine.backend.stages[silent].sharing.guesses = 0
        assert decoded(engine) == plain[0]
        s = engine.statistics()
    assert s["prefetch"]["issued"] > 0


@pytest.mark.parametrize("tiers", [Tiers(0.25, 0.25), Tiers(0.5, 0.0)], ids=["dram", "vram"])
def test_back_fill_is_that_of_the_processor(model: Path, tiers: Tiers) -> None:
    """Picks that others stood in for come in at the same points of the text; with lookahead beside it, too."""
    found = {}
    for name, more in {
        "cpu": {"device": "cpu"}, "gpu": {}, "without": {"car": "ratio:0.3"}, "ahead": {"lookahead": "on"},
    }.items():  # fmt: skip
        logits, s = answer(model, **({"tiers": tiers, "car": "ratio:0.3,backfill=2", "lookahead": "off"} | more))
        found[name] = logits, decisions(s)[:-1], s["tiers"]["nvme"]["reads"], s["prefetch"]["useful"]
    assert found["cpu"][1:3] == found["gpu"][1:3] != found["without"][1:3]
    assert found["gpu"][1][1] > 0 and found["gpu"][2] > found["gpu"][1][-1] > 0  # substitutions; reads, misses
    assert found["ahead"][:2] == found["gpu"][:2]


@pytest.mark.parametrize("car", [None, "ratio:0.9,backfill=2"])
def test_failures_leave_nothing_behind(model: Path, tmp_path: Path, fake: Fake, car: str | None) -> None:
    """A read that somebody waits for fails; the device fails; it closes: with reads ahead on their way."""
    before, copy, whole = fake.live(), tmp_path / "copy.gguf", model.read_bytes()
    copy.write_bytes(whole)
    with drives("hold") as made:
        engine = Engine.open(copy, settings(tiers=Tiers(0.25, 0.25), car=car))
    expected = decoded(engine)
    for error in (ReadError, ReadError, DeviceError):
        session = engine.session()
        if error is DeviceError:
            fake.fail("hipMemcpyHtoDAsync", 719, 20)
        else:
            with copy.open("r+b") as stream:
                stream.truncate(len(whole) // 8)
        with pytest.raises(error):
            for token in range(60):
                session.decode(token)
        fake.fail("", 0)
        copy.write_bytes(whole)
        session.close()
        if error is ReadError:
            assert decoded(engine) == expected or car  # what stands in depends on what is in memory
    made[0].held.clear()
    engine.close()
    del engine, session
    assert fake.live() == before


def test_an_interrupt_ends_a_run_with_reads_ahead(model: Path, plain: tuple[bytes, dict[str, Any]]) -> None:
    """Closed from another thread, at any time, on a slow drive."""
    for delay_seconds in (0.02, 0.05):
        engine = Engine.open(model, settings(pace="2M,5ms"))
        session = engine.session()
        timer = threading.Timer(delay_seconds, engine.close)
        timer.start()
        with pytest.raises(UsageError):
            for token in range(60):
                session.decode(token)
        timer.join()
    assert answer(model)[0] == plain[0]
