"""fomoe-doctor --gpu on the double: it passes, and what is injected is found by the right line."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from fomoe_io import _hip
from fomoe_io.cli.doctor import main
from fomoe_io.errors import DeviceError
from fomoe_io.gpu import device, hop_test, self_test
from tests.fake_hip.build import Fake

NAMES = ["device", "queues", "replays", "copied under", "copies", "round trip", "hops", "peers"]

DELAY_US = 0  # of the double


@pytest.fixture(autouse=True)
def small(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    sizes = {"NODES": 20, "REPLAYS": 10, "REWRITES": 3, "REWRITTEN_BYTES": 1 << 16, "COPIES": 5, "ROUND_TRIPS": 20}
    for name, value in (sizes | {"PEER_BYTES": 1 << 16}).items():
        monkeypatch.setattr(self_test, name, value)
    abandoned: list[object] = []
    monkeypatch.setattr(_hip, "abandon", lambda *things: abandoned.extend(things))
    yield
    _hip.set_patience()
    fake.hang("", -1)
    fake.release()
    if abandoned:  # here what hung goes on, and is given back after all
        _hip.synchronize(0)
        abandoned.clear()


def found() -> dict[str, self_test.Finding]:
    return {finding.name: finding for finding in self_test.run("hip")}


def test_a_sound_device_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "--device", "hip:0", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in checks] == NAMES
    assert {check["status"] for check in checks} == {"OK"}
    assert (
        "hip:0 fake gfx0 device, gfx90a:sramecc+:xnack-" in checks[0]["found"]
        and "driver HIP 7.0" in checks[0]["found"]
    )
    assert "no second device" in checks[-1]["found"]
    # what the engine does not do is stale here: a header that is copied, and read by plain loads
    assert checks[2]["found"].endswith("plain 0, copied 0, copied and plain 190)")


def test_a_line_for_each_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "--device", "hip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:20].strip() for line in lines] == NAMES


def test_shared_queues_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ordinary streams share a queue with the graph, the note says so; where urgent ones do, the check fails."""
    monkeypatch.setattr(self_test, "LIMIT_SECONDS", 0.3)
    monkeypatch.setenv("FAKE_HIP_QUEUES", "1")
    queues = found()["queues"]
    assert queues.status == "OK" and "ordinary streams beside two branches do not" in queues.found
    monkeypatch.setattr(device.Gpu, "new_stream", lambda gpu, is_urgent=False: _hip.Stream(gpu.info.ordinal))
    assert found()["queues"].status == "FAIL"


def test_stale_words_are_found() -> None:
    assert self_test.judge_replays([3, 9, 0, 9], 10, 2.0).status == "FAIL"
    assert self_test.judge_replays([0, 9, 9, 9], 10, 2.0).status == "OK"


def test_rows_go_from_device_to_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop_test, "HOPS", 2)
    monkeypatch.setattr(hop_test, "COLUMNS", 256)
    monkeypatch.setenv("FAKE_HIP_DEVICES", "2")
    hops = found()["hops"]
    assert hops.status == "OK" and "to hip:1 take" in hops.found


def test_contents_that_change_between_devices_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HIP_DEVICES", "2")
    assert "contents arrive whole" in found()["peers"].found
    monkeypatch.setenv("FAKE_HIP_PEER", "2")
    peers = found()["peers"]
    assert peers.status == "WARN" and "copies arrive damaged" in peers.found
    monkeypatch.setenv("FAKE_HIP_PEER", "0")
    assert "cannot be reached" in found()["peers"].found


@pytest.mark.parametrize(
    ("call", "after", "name"), [("hipMemcpyHtoDAsync", 0, "queues"), ("hipGraphLaunch", 3, "replays")]
)
def test_a_hang_ends_in_a_line(fake: Fake, monkeypatch: pytest.MonkeyPatch, call: str, after: int, name: str) -> None:
    monkeypatch.setattr(self_test, "LIMIT_SECONDS", 0.3)
    fake.hang(call, after)
    seen = found()
    assert seen[name].status == "FAIL"
    assert list(seen) == NAMES


def test_what_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "--device", "cpu"]) != 0
    assert main(["--device", "hip:0"]) != 0
    assert main(["--gpu", "--device", "hip:7"]) != 0
    assert "numbered from 0: there is no 7" in capsys.readouterr().err


def test_devices_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the processor by its number only; of the others the one with the most memory."""
    monkeypatch.setenv("FAKE_HIP_DEVICES", "4")
    monkeypatch.setenv("FAKE_HIP_INTEGRATED", "1,0,0,0")
    monkeypatch.setenv("FAKE_HIP_MEMORY", "4000000000,1000000000,2000000000,2000000000")
    assert device.find_device("hip") == ("hip", 2)
    assert device.find_device("hip:0") == ("hip", 0)
    assert [d.option for d in device.list_devices("hip")] == ["hip:0", "hip:1", "hip:2", "hip:3"]
    monkeypatch.setenv("FAKE_HIP_INTEGRATED", "1")
    with pytest.raises(DeviceError, match="--device hip:0 takes it all the same"):
        device.find_device("hip")
