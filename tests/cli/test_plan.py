"""fomoe plan: memory and speed before the conversion and, by the header alone, before the download; and downloads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.cli import forecast as forecasts
from fomoe_io.cli import hub, remote
from fomoe_io.cli.forecast import Drive, Forecast, Misses, Needs
from fomoe_io.cli.remote import Remote, download, fetch_headers
from fomoe_io.errors import BudgetError, FormatError, UsageError
from fomoe_io.experts.profile import Profile
from fomoe_io.storage.store import Store
from fomoe_io.system import memory
from layout_tool.main import main
from tests.cli.hub_server import HubServer, hub_server
from tests.model_files import write_model

Capture = pytest.CaptureFixture[str]
LARGE = Needs(
    smallest_bytes=8 << 30, row_bytes=60 * 7_100_000, experts=512, used=10, token_bytes=600 * 7_100_000,
    weight_bytes=6 << 30, multiplied={12: 10_000_000_000},
)  # fmt: skip
"""A 397B's."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a repository has it: a model in one file, another in shards, and what is none."""
    folder = tmp_path_factory.mktemp("repository")
    write_model(folder / "tiny-Q4_K_M.gguf", 91)
    (folder / "Q8_0").mkdir()
    write_model(folder / "Q8_0" / "tiny-Q8_0.gguf", 92, shard_tensors=20)
    (folder / "notes-Q2_K.gguf").write_text("no model")
    return folder


@pytest.fixture
def server(models: Path) -> Iterator[HubServer]:
    with hub_server(models) as running:
        yield running


def planned(capsys: Capture, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pytest holds is no part of what a command needs."""
    monkeypatch.setattr(memory, "resident_bytes", lambda *_: 52 << 20)
    monkeypatch.setattr("fomoe_io.ram_budget.held_since", lambda _: 0)


# ---- the arithmetic ----


def test_the_smallest_memory_is_the_engines_own(models: Path) -> None:
    path = models / "tiny-Q4_K_M.gguf"
    needs = forecasts.needs_of(path, EngineConfig(context_tokens=256))
    with pytest.raises(BudgetError) as caught:
        Engine.open(path, EngineConfig(context_tokens=256, ram_bytes=needs.smallest_bytes - (1 << 20)))
    assert caught.value.smallest_bytes == needs.smallest_bytes
    store = Store.open(path)
    assert needs.row_bytes == sum(layer.record_bytes for layer in store.experts.values())
    exact = needs.used * sum(layer.expert_bytes for layer in store.experts.values())
    assert exact <= needs.token_bytes <= exact + needs.used * len(store.experts) * 3 * 2 * 4096
    assert sum(needs.multiplied.values()) > exact


def test_more_memory_and_faster_drives_are_faster() -> None:
    for misses in (Misses("others"), Misses("own", Profile(5000, {0: np.arange(512) ** 2}, "p"))):
        speeds = []
        for rate in (1e9, 7e9, 14e9):
            rows = Forecast(LARGE, Drive(rate, "named"), misses, 0.1).rows([20 << 30])
            assert [row.ram_bytes for row in rows] == sorted({row.ram_bytes for row in rows})
            assert all(row.low <= row.likely <= row.high for row in rows)
            assert all(a.likely <= b.likely for a, b in pairwise(rows))
            assert rows[-1].share == 1 and rows[-1].read_bytes == 0 and rows[-1].likely == pytest.approx(10)
            speeds.append([row.likely for row in rows])
        assert (np.diff(np.array(speeds), axis=0) >= 0).all()


def test_the_arithmetic_of_a_row_can_be_done_by_hand() -> None:
    row = Forecast(LARGE, Drive(6.5e9, "named"), Misses("others"), 0.0).row(LARGE.ram_bytes(0.17))
    assert row.share == pytest.approx(0.17, abs=1e-3) and row.missed == pytest.approx(0.362, abs=2e-3)
    assert row.likely == pytest.approx(6.5e9 / (row.missed * LARGE.token_bytes), rel=1e-6)
    assert 3.5 < row.likely < 5


def test_recommended_memory_hides_the_drive() -> None:
    forecast = Forecast(LARGE, Drive(7e9, "named"), Misses("others"), 0.2)
    best = forecast.row(forecast.recommended_bytes)
    assert best.drive_seconds <= best.compute_seconds * 1.05
    assert LARGE.smallest_bytes <= forecast.recommended_bytes < LARGE.everything_bytes
    assert forecast.row(LARGE.smallest_bytes).drive_seconds > best.compute_seconds


def test_a_card_is_bounded_by_drive_and_link() -> None:
    forecast = Forecast(LARGE, Drive(6.5e9, "named"), Misses("others"), 0.1)
    text = "\n".join(forecast.card_lines(16 << 30, 28 << 30))
    assert "of the experts there" in text and "at most" in text and "link" in text
    assert "too small" in forecast.card_lines(4 << 30, None)[0]


# ---- the command ----


@pytest.mark.usefixtures("known_machine")
def test_plan_shows_memory_and_speed(models: Path, capsys: Capture) -> None:
    path = models / "tiny-Q4_K_M.gguf"
    assert main(["plan", str(path), "--ram", "200M", "--vram", "150M,150M", "--drive", "7G"]) == 0
    out = capsys.readouterr().out
    for words in ("runs it", "is recommended", "7 GB/s (as --drive says)", "tok/s", "<- --ram", "--vram"):
        assert words in out, words
    found = planned(capsys, str(path), "--ram", "200M")["forecast"]
    assert found["smallest_ram_bytes"] <= found["recommended_ram_bytes"] <= found["everything_ram_bytes"]
    assert 200 << 20 in [row["ram_bytes"] for row in found["rows"]]
    assert main(["plan", str(path), "--ram", "1M"]) == 0
    assert "less than the least that runs it" in capsys.readouterr().out


@pytest.mark.usefixtures("known_machine")
def test_a_store_is_forecast_too(models: Path, tmp_path: Path, capsys: Capture) -> None:
    path = models / "tiny-Q4_K_M.gguf"
    assert main(["pack", str(path), "--to", str(tmp_path / "s")]) == 0
    packed, whole = planned(capsys, str(tmp_path / "s")), planned(capsys, str(path))
    assert "store_bytes" not in packed
    assert packed["forecast"]["token_bytes"] <= whole["forecast"]["token_bytes"]
    assert main(["plan", str(tmp_path / "s"), "--to", str(tmp_path / "t")]) == 1
    assert "is a store" in capsys.readouterr().err


def test_the_machine_is_measured(demo_model: Path, capsys: Capture) -> None:
    found = planned(capsys, str(demo_model), "-c", "256")["forecast"]
    assert found["drive"]["bytes_per_second"] > 1e6 and "measured here" in found["drive"]["source"]
    assert 0 < found["compute_seconds"] < 5
    assert all(row["likely"] > 0 for row in found["rows"])


# ---- models that are elsewhere ----


@pytest.mark.usefixtures("known_machine")
def test_a_model_behind_an_address(server: HubServer, models: Path, capsys: Capture) -> None:
    """The same plan as of the file itself, of which only the header was fetched."""
    here = planned(capsys, str(models / "tiny-Q4_K_M.gguf"))
    there = planned(capsys, f"{server.url}/store/tiny-Q4_K_M.gguf")
    assert there["forecast"].pop("drive")["source"].startswith("assumed") and here["forecast"].pop("drive")
    for report in (here, there):
        del report["fingerprint"], report["forecast"]["rows"]
    assert here == there
    assert server.sent <= remote.FIRST_BYTES < (models / "tiny-Q4_K_M.gguf").stat().st_size
    assert all(asked for method, path, asked in server.log if path.startswith("/store/"))


@pytest.mark.usefixtures("known_machine")
def test_a_repository(server: HubServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded, gated, redirected: the token stays with the hub."""
    at_home(monkeypatch, server)
    server.token = "hf_secret"
    found = planned(capsys, "-hf", "user/model:Q8_0", "-hft", "hf_secret", "--drive", "2G")
    assert found["shards"] > 1 and found["forecast"]["drive"]["bytes_per_second"] == 2e9
    assert main(["plan", "-hf", "user/model:Q8_0"]) == 1
    assert "can't be had" in capsys.readouterr().err
    assert main(["plan", "-hf", "user/model", f"{server.url}/store/tiny-Q4_K_M.gguf"]) == 1
    assert "name one model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "ranges", "said"),
    [
        ("absent.gguf", True, "answers 404"),
        ("notes-Q2_K.gguf", True, "not a GGUF file"),
        ("tiny-Q4_K_M.gguf", False, "gives no parts of files"),
    ],
)
def test_what_is_no_model_there(server: HubServer, tmp_path: Path, name: str, ranges: bool, said: str) -> None:
    server.ranges = ranges
    with pytest.raises((UsageError, FormatError), match=said):
        fetch_headers(f"{server.url}/store/{name}", tmp_path)


def test_nobody_there(capsys: Capture) -> None:
    assert main(["plan", "http://127.0.0.1:9/x.gguf"]) == 1
    assert "can't be reached" in capsys.readouterr().err


def test_a_long_header_is_fetched_piece_by_piece(
    server: HubServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 512)
    path, fetched = fetch_headers(f"{server.url}/store/tiny-Q4_K_M.gguf", tmp_path)
    header = gguf.GGUFReader(models / "tiny-Q4_K_M.gguf").data_offset
    assert header <= fetched + 32 and fetched < 2 * header + 512
    assert path.stat().st_size == (models / "tiny-Q4_K_M.gguf").stat().st_size
    assert path.stat().st_blocks * 512 < 4 * fetched + 65536
    starts = [int(asked.partition("=")[2].partition("-")[0]) for _, _, asked in server.log]
    assert starts == sorted(set(starts))  # nothing twice


# ---- downloads ----


def at_home(monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path | None = None) -> None:
    """The hub's own client, of a hub that is here."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants, file_download, hf_api

    for module in (constants, file_download, hf_api):
        monkeypatch.setattr(module, "ENDPOINT", server.url, raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    if cache is not None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_a_download_goes_on(
    server: HubServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Cut at once and cut by the user: no byte is fetched twice, and the file is the hub's own afterwards."""
    at_home(monkeypatch, server, tmp_path / "hub")
    original = (models / "tiny-Q4_K_M.gguf").read_bytes()
    server.cut_after = [2_000_000] + [0] * 10
    with pytest.raises(UsageError, match=r"the connection was cut|IncompleteRead") as caught:
        hub.fetched("user/model", None, None, offline=False)
    assert caught.value.hint == "the same command goes on where it stopped"
    server.cut_after = [1_000_000]  # mended within a run
    path = hub.fetched("user/model", None, None, offline=False)
    assert path.read_bytes() == original and server.sent == len(original)
    assert "2 MB are there" in capsys.readouterr().err
    assert path.is_symlink() and not list((tmp_path / "hub").rglob("*.incomplete"))
    sent = server.sent
    assert hub.fetched("user/model", None, None, offline=False) == path
    assert hub.fetched("user/model", None, None, offline=True) == path
    assert server.sent == sent


def test_shards_are_fetched_all(
    server: HubServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home(monkeypatch, server, tmp_path / "hub")
    first = hub.fetched("user/model:q8_0", None, None, offline=False)
    assert Store.open(first).file_bytes == [p.stat().st_size for p in sorted((models / "Q8_0").glob("*.gguf"))]


def test_no_room_for_a_download(
    server: HubServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """What is there already of a file needs no room."""
    at_home(monkeypatch, server, tmp_path / "hub")
    size = (models / "tiny-Q4_K_M.gguf").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1_000_000))
    with pytest.raises(UsageError, match="do not fit") as caught:
        hub.fetched("user/model", None, None, offline=False)
    assert "HF_HOME" in str(caught.value.hint) and not any(method == "HEAD" for method, *_ in server.log)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    server.cut_after = [2_000_000] + [0] * 10
    with pytest.raises(UsageError):
        hub.fetched("user/model", None, None, offline=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1_000_000))
    assert hub.fetched("user/model", None, None, offline=False).stat().st_size == size


def test_no_such_repository(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_home(monkeypatch, server, tmp_path / "hub")
    with pytest.raises(UsageError, match="can't be had from the hub") as caught:
        hub.fetched("no/model", None, None, offline=False)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("hurt", [lambda size: size + 1, lambda size: size - 1])
def test_another_file_than_announced(
    server: HubServer, models: Path, tmp_path: Path, hurt: Callable[[int], int]
) -> None:
    size = (models / "tiny-Q4_K_M.gguf").stat().st_size
    with pytest.raises(UsageError, match="were announced"):
        download(Remote(f"{server.url}/store/tiny-Q4_K_M.gguf"), tmp_path / "x", hurt(size), "x")
    assert not (tmp_path / "x").exists()
