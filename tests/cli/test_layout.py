"""fomoe-layout: what it writes, what it says, and the profiles it orders experts by."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from fomoe_io.errors import FormatError
from fomoe_io.experts.profile import Profile, shrunk
from fomoe_io.storage.expert_layers import FILE, OFFSET
from fomoe_io.storage.gguf import GGUFFile
from fomoe_io.storage.manifest import MANIFEST, PAGE_BYTES
from fomoe_io.storage.store import Store
from layout_tool import targets as target_tools
from layout_tool.direct import DirectFile, Piece, aligned_buffer, gather
from layout_tool.main import main
from layout_tool.placement import place, runs
from tests.model_files import EXPERTS, TYPES, USED, expert_bytes, read_expert, write_model

LAYERS = len(TYPES)
pytestmark = pytest.mark.usefixtures("known_machine")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "tiny.gguf", 41)
    return tmp_path / "tiny.gguf"


def write_profile(path: Path, seed: int, tokens: int = 50) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = {layer: rng.permutation(EXPERTS) * 7 + 1 for layer in range(LAYERS)}
    Profile(tokens, counts, path.name).save(path)
    return counts


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- pack ----


def test_a_pack_is_reproducible_and_idempotent(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        assert main(["pack", str(model), "--to", str(tmp_path / name)]) == 0
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert set(a) == {"manifest.json", "metadata.gguf", "resident.bin", "experts-00.bin"}
    assert all(a[name] == b[name] for name in a if name != MANIFEST)
    before = (tmp_path / "a" / "experts-00.bin").stat().st_mtime_ns
    assert main(["pack", str(model), "--to", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "experts-00.bin").stat().st_mtime_ns == before
    assert "already holds this store" in capsys.readouterr().err


def test_records_stand_in_order_of_frequency(model: Path, tmp_path: Path) -> None:
    counts = write_profile(tmp_path / "p.json", 42)
    command = ["pack", str(model), "--profile", str(tmp_path / "p.json")]
    assert main([*command, "--to", str(tmp_path / "one")]) == 0
    assert main([*command, "--to", str(tmp_path / "two"), "--to", str(tmp_path / "too")]) == 0
    store, striped = Store.open(tmp_path / "one"), Store.open(tmp_path / "two")
    assert store.profile_tokens == striped.profile_tokens == 50
    for layer, picks in counts.items():
        hottest_first = np.argsort(-picks, kind="stable")
        found = store.experts[layer]
        assert np.argsort(found.extents[:, 0, OFFSET]).tolist() == hottest_first.tolist()
        assert found.frequency is not None
        np.testing.assert_allclose(found.frequency.sum(), picks.sum() / 50, rtol=1e-6)
        assert np.argsort(-found.frequency).tolist() == hottest_first.tolist()
        # Striped: neighbours in the order lie on different drives.
        drives = striped.experts[layer].extents[hottest_first, 0, FILE]
        assert (drives[1:] != drives[:-1]).all()


def test_uneven_drives_get_uneven_shares(model: Path) -> None:
    source = Store.open(model)
    placement = place(source, {}, (3, 1))
    drives = np.concatenate([layer.extents[:, 0, FILE] for layer in placement.experts.values()])
    assert np.bincount(drives)[1:].tolist() == [14, 4]
    layers = placement.experts.values()
    for file in (1, 2):  # no holes: each file is as long as its records
        used = sum((layer.extents[:, 0, FILE] == file).sum() * layer.record_bytes for layer in layers)
        assert placement.files[file].bytes == PAGE_BYTES + used


def test_runs_cover_every_record_once(model: Path) -> None:
    placement = place(Store.open(model), {}, (2, 1, 1))
    for layer in placement.experts.values():
        seen = []
        for run in runs(layer, limit_bytes=2 * layer.record_bytes):
            assert 1 <= len(run.experts) <= 2
            expected = run.offset + np.arange(len(run.experts)) * layer.record_bytes
            assert layer.extents[run.experts, 0, OFFSET].tolist() == expected.tolist()
            assert (layer.extents[run.experts, 0, FILE] == run.file).all()
            seen += run.experts.tolist()
        assert sorted(seen) == list(range(layer.n_experts))


def test_overwrite_replaces_a_store(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_model(tmp_path / "other.gguf", 43, name="other")
    to = ["--to", str(tmp_path / "store")]
    assert main(["pack", str(model), *to]) == 0
    assert main(["pack", str(tmp_path / "other.gguf"), *to]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert Store.open(tmp_path / "store").model_name == "tiny"
    assert main(["pack", str(tmp_path / "other.gguf"), *to, "--overwrite"]) == 0
    store = Store.open(tmp_path / "store")
    assert store.model_name == "other"
    assert read_expert(store, 2, 3) == expert_bytes(tensors, 2, 3)
    assert main(["index", str(model), *to, "--overwrite"]) == 0
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["manifest.json", "metadata.gguf"]


@pytest.mark.parametrize("mib", [0, 3])
def test_large_tensors_are_copied_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    """Chunks of a few pages, so that every tensor and layer takes several, with a rest."""
    tensors = write_model(tmp_path / "m.gguf", 44, experts=19)
    for module in ("records", "placement", "index"):
        monkeypatch.setattr(f"layout_tool.{module}.CHUNK_BYTES", (mib << 20) or 5 * PAGE_BYTES)
    monkeypatch.setattr("layout_tool.placement.runs.__defaults__", ((mib << 20) or 5 * PAGE_BYTES,))
    assert main(["pack", str(tmp_path / "m.gguf"), "--to", str(tmp_path / "store")]) == 0
    store = Store.open(tmp_path / "store")
    for layer in range(LAYERS):
        for expert in range(19):
            assert read_expert(store, layer, expert) == expert_bytes(tensors, layer, expert)
    assert main(["verify", str(tmp_path / "store"), "--against", str(tmp_path / "m.gguf")]) == 0


def test_gather_merges_neighbours(tmp_path: Path) -> None:
    data = np.random.default_rng(45).integers(0, 256, 3_000_000, np.uint8)
    (tmp_path / "f").write_bytes(data.tobytes())
    rng = np.random.default_rng(46)
    out = np.zeros(1 << 20, np.uint8)
    with DirectFile(tmp_path / "f") as file:
        for _ in range(50):
            sizes = rng.integers(1, 20_000, rng.integers(1, 20))
            places = np.cumsum(sizes) - sizes
            offsets = [int(rng.integers(0, len(data) - size + 1)) for size in sizes]
            offsets[-1] = len(data) - int(sizes[-1])  # up to the last byte of the file
            pieces = [Piece(0, o, int(s), int(p)) for o, s, p in zip(offsets, sizes, places, strict=True)]
            reads = gather([file], pieces, aligned_buffer(int(rng.integers(40_000, 400_000))), out)
            assert 1 <= reads <= len(pieces)
            for piece in pieces:
                expected = data[piece.offset : piece.offset + piece.size]
                assert (out[piece.place : piece.place + piece.size] == expected).all()
        contiguous = [Piece(0, 1000 + 100 * i, 100, 100 * i) for i in range(50)]
        assert gather([file], contiguous, aligned_buffer(1 << 16), out) == 1


# ---- the other commands ----


def test_plan_tells_and_writes_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "not" / "yet"
    assert main(["plan", str(model), "--to", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "not").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]
    assert (report["layers"], report["experts_per_layer"], report["experts_used"]) == (LAYERS, [EXPERTS], USED)
    assert report["fits"] and report["targets"][0]["free_bytes"] > report["targets"][0]["needs_bytes"]
    assert main(["pack", str(model), "--to", str(target)]) == 0
    written = sum(path.stat().st_size for path in target.glob("*.bin"))
    assert report["store_bytes"] == written
    everything = sum(path.stat().st_size for path in target.iterdir())
    assert written <= everything <= report["targets"][0]["needs_bytes"]
    source = Store.open(model)
    assert report["bytes_per_token"] == USED * sum(layer.expert_bytes for layer in source.experts.values())
    capsys.readouterr()
    assert main(["plan", str(model)]) == 0
    assert f"{LAYERS} layers x {EXPERTS} experts, top-{USED}" in capsys.readouterr().out


def test_plan_says_when_it_does_not_fit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(target_tools, "free_bytes", lambda path: 12 << 20)
    monkeypatch.setattr(target_tools, "MANIFEST_ROOM_BYTES", 12 << 20)
    assert main(["plan", str(model), "--to", str(tmp_path / "a")]) == 1
    assert "TOO LITTLE" in capsys.readouterr().out


def test_inspect_stores_and_models(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_profile(tmp_path / "p.json", 47)
    assert main(["pack", str(model), "--to", str(tmp_path / "s"), "--profile", str(tmp_path / "p.json")]) == 0
    assert main(["index", str(model), "--to", str(tmp_path / "i")]) == 0
    capsys.readouterr()
    reports = []
    for path in (model, tmp_path / "s", tmp_path / "i"):
        assert main(["inspect", str(path), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
        assert main(["inspect", str(path)]) == 0
        assert "tiny  qwen35moe" in capsys.readouterr().out
    of_model, packed, indexed = reports
    assert [report["kind"] for report in reports] == ["in-place", "packed", "in-place"]
    assert [report["checksums"] for report in reports] == [False, True, False]
    assert packed["profile_tokens"] == 50
    assert len({report["fingerprint"] for report in reports}) == 1
    assert of_model["expert_types"] == {"Q4_K/Q4_K/Q6_K": 1, "Q4_K/Q4_K/Q4_K": 1, "Q8_0/Q8_0/F16": 1}
    assert indexed["vocabulary"] == 2000


def test_verify(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(model), "--to", str(tmp_path / "s"), "--to", str(tmp_path / "t")]) == 0
    assert main(["verify", str(tmp_path / "s")]) == 0
    assert main(["verify", str(tmp_path / "s"), "--against", str(model)]) == 0
    assert f"{LAYERS * EXPERTS} experts" in capsys.readouterr().err
    write_model(tmp_path / "other.gguf", 48)
    assert main(["verify", str(tmp_path / "s"), "--against", str(tmp_path / "other.gguf")]) == 1
    assert "not of" in capsys.readouterr().err
    assert main(["index", str(model), "--to", str(tmp_path / "i")]) == 0
    assert main(["verify", str(tmp_path / "i")]) == 1
    assert "--checksums" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "i"), "--against", str(model)]) == 0
    assert main(["index", str(model), "--to", str(tmp_path / "i"), "--checksums", "--overwrite"]) == 0
    assert main(["verify", str(tmp_path / "i")]) == 0
    indexed, packed = Store.open(tmp_path / "i"), Store.open(tmp_path / "s")
    assert indexed.resident_checksums == packed.resident_checksums
    for layer in range(LAYERS):
        np.testing.assert_array_equal(indexed.experts[layer].checksums, packed.experts[layer].checksums)


def test_relocate(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    assert main(["pack", str(model), "--to", str(a), "--to", str(b)]) == 0
    b.rename(c)
    before = (a / MANIFEST).read_bytes()
    assert main(["verify", str(a)]) == 1
    assert "fomoe-layout relocate" in capsys.readouterr().err
    for wrong in ([], [b], [c, b], [a]):
        arguments = [f"--to={target}" for target in wrong] or ["--to", str(tmp_path)]
        assert main(["relocate", str(a), *arguments]) == 1
        assert (a / MANIFEST).read_bytes() == before
    assert main(["relocate", str(a), "--to", str(c)]) == 0
    assert main(["verify", str(a), "--against", str(model)]) == 0


# ---- profiles ----


def freq_file(path: Path, counts: np.ndarray, tokens: int, *, version: int = 1, layers: int | None = None) -> None:
    """As pmerolla/fomoe writes it: experts that were seen, hottest first."""
    table = [(picks / tokens, layer, expert) for (layer, expert), picks in np.ndenumerate(counts) if picks]
    table.sort(key=lambda entry: -entry[0])
    raw = struct.pack("<4I", 0x46524551, version, counts.shape[0] if layers is None else layers, len(table))
    path.write_bytes(raw + b"".join(struct.pack("<HHf", layer, expert, f) for f, layer, expert in table))


def imatrix_file(path: Path, counts: np.ndarray, *, part: str = "down", chunks: int = 4, size: int = 512) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", size)
    for layer, picks in enumerate(counts):
        name = f"blk.{layer}.ffn_{part}_exps.weight"
        writer.add_tensor(f"{name}.in_sum2", np.ones((len(picks), 8), np.float32))
        writer.add_tensor(f"{name}.counts", picks.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tokens", [7, 150, 1999])
def test_freq_profiles(tmp_path: Path, tokens: int) -> None:
    counts = np.random.default_rng(tokens).integers(0, tokens + 1, (LAYERS, EXPERTS))
    counts[:, 0] = 1  # the rarest expert was seen once
    counts[1, 4:] = 0
    freq_file(tmp_path / "p.freq", counts, tokens)
    found = Profile.load(tmp_path / "p.freq")
    assert found.tokens == tokens
    fitted = found.fitted(dict.fromkeys(range(LAYERS), EXPERTS))
    assert np.array_equal([fitted[layer] for layer in range(LAYERS)], counts)


@pytest.mark.parametrize("part", ["gate", "up", "down", "gate_up"])
def test_imatrix_profiles(tmp_path: Path, part: str) -> None:
    counts = np.random.default_rng(49).integers(0, 900, (LAYERS, EXPERTS))
    imatrix_file(tmp_path / "im.gguf", counts, part=part)
    found = Profile.load(tmp_path / "im.gguf")
    assert found.tokens == 4 * 512
    assert np.array_equal([found.counts[layer] for layer in range(LAYERS)], counts)


def test_own_profiles_and_conversion(model: Path, tmp_path: Path) -> None:
    counts = np.random.default_rng(50).integers(1, 900, (LAYERS, EXPERTS))
    imatrix_file(tmp_path / "im.gguf", counts)
    command = ["profile", str(model), "--from", str(tmp_path / "im.gguf"), "-o", str(tmp_path / "p.json")]
    assert main(command) == 0
    found = Profile.load(tmp_path / "p.json")
    assert found.tokens == 2048
    assert np.array_equal([found.counts[layer] for layer in range(LAYERS)], counts)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gguf", ".gguf", ".json"]


def test_collecting_a_profile(demo_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fomoe_io._cpu")
    (tmp_path / "text").write_text("The house stood on the hill, and the wind went round it all night long. " * 9)
    command = ["profile", str(demo_model), "-f", str(tmp_path / "text"), "-c", "32", "--chunks", "3"]
    assert main([*command, "-o", str(tmp_path / "p.json")]) == 0
    found = Profile.load(tmp_path / "p.json")
    assert (found.tokens, len(found.counts)) == (96, 8)
    assert all(picks.sum() == 96 * 4 and len(picks) == 32 for picks in found.counts.values())
    assert found.fingerprint == GGUFFile.open(demo_model).fingerprint()
    command = ["pack", str(demo_model), "--to", str(tmp_path / "s"), "--profile", str(tmp_path / "p.json")]
    assert main(command) == 0
    layer = Store.open(tmp_path / "s").experts[5]
    assert layer.frequency is not None
    by_place = np.argsort(layer.extents[:, 0, OFFSET])
    assert by_place[0] == found.counts[5].argmax()
    # Collected from the packed store, the counts are the same.
    command = ["profile", str(tmp_path / "s"), "-f", str(tmp_path / "text"), "-c", "32", "--chunks", "3"]
    assert main([*command, "-o", str(tmp_path / "q.json")]) == 0
    again = Profile.load(tmp_path / "q.json")
    assert all(np.array_equal(again.counts[layer], picks) for layer, picks in found.counts.items())


def test_shrinking_keeps_the_picks_and_the_order() -> None:
    counts = np.array([0, 0, 1, 30, 69])
    found = shrunk(counts, 50)
    np.testing.assert_allclose(found.sum(), 2.0)
    assert (np.diff(found)[1:] > 0).all() and found[0] == found[1] > 0
    np.testing.assert_allclose(shrunk(counts * 10_000, 500_000), counts / 50, atol=1e-4)


def test_layers_without_counts_keep_their_order(model: Path, tmp_path: Path) -> None:
    Profile(9, {1: np.array([1, 2, 3, 4, 5, 6]), 2: np.zeros(EXPERTS, np.int64)}, "p").save(tmp_path / "p.json")
    assert main(["pack", str(model), "--to", str(tmp_path / "s"), "--profile", str(tmp_path / "p.json")]) == 0
    layers = Store.open(tmp_path / "s").experts
    assert [layers[i].frequency is None for i in range(LAYERS)] == [True, False, True]
    assert np.argsort(layers[0].extents[:, 0, OFFSET]).tolist() == list(range(EXPERTS))
    assert np.argsort(layers[1].extents[:, 0, OFFSET]).tolist() == list(range(EXPERTS))[::-1]


def test_the_seeds_profile_is_read(shared: Path) -> None:
    found = Profile.load(shared / "data" / "routing" / "fomoe-397b.freq")
    assert found.tokens == 150
    fitted = found.fitted(dict.fromkeys(range(60), 512))
    assert {int(picks.sum()) for picks in fitted.values()} == {1500}  # ten experts a token
    with pytest.raises(FormatError, match="the model 256"):
        found.fitted(dict.fromkeys(range(60), 256))
    with pytest.raises(FormatError, match="layer 48"):
        found.fitted(dict.fromkeys(range(48), 512))


JSON_HEAD = '{"format":"fomoe-profile","version":1,"fingerprint":null,'


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello",
        b"[1]",
        b"[" * 100_000,
        (JSON_HEAD + '"tokens":0,"picks":{"0":[1]}}').encode(),
        (JSON_HEAD + '"tokens":1e3,"picks":{"0":[1]}}').encode(),
        (JSON_HEAD + '"tokens":5,"picks":{"x":[1]}}').encode(),
        (JSON_HEAD + '"tokens":5,"picks":{"0":[-1]}}').encode(),
        (JSON_HEAD + '"tokens":5,"picks":{"0":[1.5]}}').encode(),
        (JSON_HEAD + '"tokens":5,"picks":{"0":[NaN]}}').encode(),
        (JSON_HEAD + '"tokens":5,"picks":{"0":[1e400]}}').encode(),
        (JSON_HEAD + '"tokens":5,"picks":{"0":"111"}}').encode(),
        (JSON_HEAD + '"tokens":5,"picks":[]}').encode(),
        struct.pack("<I", 0x46524551),
        struct.pack("<4I", 0x46524551, 2, 1, 0),
        struct.pack("<4I", 0x46524551, 1, 1, 0),
        struct.pack("<4I", 0x46524551, 1, 1, 1 << 31),
        struct.pack("<4IHHf", 0x46524551, 1, 1, 1, 3, 0, 0.5),
        struct.pack("<4IHHf", 0x46524551, 1, 1, 1, 0, 0, float("nan")),
        struct.pack("<4IHHf", 0x46524551, 1, 1, 1, 0, 0, -0.5),
        struct.pack("<4IHHf", 0x46524551, 1, 1, 1, 0, 0, 7.0),
    ],
)
def test_profiles_that_are_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "p").write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        Profile.load(tmp_path / "p")
    assert "\n" not in caught.value.message


def test_a_model_is_no_imatrix(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no importance matrix"):
        Profile.load(model)
    imatrix_file(tmp_path / "im.gguf", np.full((1, EXPERTS), np.nan))
    with pytest.raises(FormatError, match="whole number"):
        Profile.load(tmp_path / "im.gguf")
    with pytest.raises(FormatError, match="does not exist"):
        Profile.load(tmp_path / "absent")


def test_a_profile_of_another_shape_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Profile(9, {0: np.arange(1, EXPERTS)}, "p").save(tmp_path / "p.json")
    assert main(["pack", str(model), "--to", str(tmp_path / "s"), "--profile", str(tmp_path / "p.json")]) == 1
    assert f"the model {EXPERTS}" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_profile_of_another_file_is_used_with_a_note(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {layer: np.arange(1, EXPERTS + 1) for layer in range(LAYERS)}
    for name, fingerprint in (("own", GGUFFile.open(model).fingerprint()), ("other", "0" * 32)):
        Profile(9, counts, name, fingerprint).save(tmp_path / name)
        assert main(["plan", str(model), "--profile", str(tmp_path / name)]) == 0
        assert ("counted on another file" in capsys.readouterr().err) is (name == "other")
