"""The store's read side: every kind of store gives the same bytes, and no damaged manifest is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io.errors import FormatError, StoreError
from fomoe_io.experts.profile import Profile
from fomoe_io.storage.manifest import MANIFEST, METADATA, PAGE_BYTES, seal
from fomoe_io.storage.store import Store
from layout_tool.main import main
from tests.model_files import EXPERTS, TYPES, expert_bytes, read_expert, read_resident, write_model

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "tiny.gguf"
    return path, write_model(path, 11)


@pytest.fixture
def packed(tmp_path: Path, model: tuple[Path, dict[str, np.ndarray]]) -> Path:
    assert main(["pack", str(model[0]), "--to", str(tmp_path / "store")]) == 0
    return tmp_path / "store"


def edit_manifest(directory: Path, edit: Edit) -> None:
    """Change a manifest and seal it again, as an attacker would."""
    body = json.loads((directory / MANIFEST).read_text())
    del body["xxh3_64"]
    edit(body)
    (directory / MANIFEST).write_bytes(seal(body))


def assert_same_weights(store: Store, tensors: dict[str, np.ndarray]) -> None:
    experts = {name for name in tensors if "_exps" in name}
    assert set(store.resident) == set(tensors) - experts
    for name, info in store.resident.items():
        assert read_resident(store, name) == tensors[name].tobytes()
        assert info.bytes == tensors[name].nbytes
    for layer, types in enumerate(TYPES):
        found = store.experts[layer]
        assert [part.name for part in found.parts] == ["gate", "up", "down"]
        assert found.parts[2].type == types[2]
        for expert in range(found.n_experts):
            assert read_expert(store, layer, expert) == expert_bytes(tensors, layer, expert)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shard_tensors", [0, 3])
def test_every_kind_of_store_gives_the_same_bytes(tmp_path: Path, fused: bool, shard_tensors: int) -> None:
    tensors = write_model(tmp_path / "m.gguf", 21, fused=fused, shard_tensors=shard_tensors)
    path = sorted(tmp_path.glob("m*.gguf"))[0]
    assert_same_weights(Store.open(path), tensors)
    targets = [tmp_path / f"drive{i}" for i in range(3)]
    assert main(["pack", str(path), "--to", str(targets[0])]) == 0
    assert main(["pack", str(path), *(f"--to={target}" for target in targets[1:])]) == 0
    assert main(["index", str(path), "--to", str(tmp_path / "index")]) == 0
    fingerprints = set()
    for directory in (targets[0], targets[1], tmp_path / "index"):
        store = Store.open(directory)
        assert_same_weights(store, tensors)
        fingerprints.add(store.fingerprint)
        assert (store.architecture, store.model_name) == ("qwen35moe", "tiny")
        assert store.metadata["tokenizer.ggml.tokens"][7] == "token 7 ü"
    assert len(fingerprints) == 1
    assert {path.parent for path in Store.open(targets[1]).paths} == set(targets[1:])


def test_records_are_aligned_and_contiguous(packed: Path) -> None:
    store = Store.open(packed)
    assert store.kind == "packed"
    for layer in store.experts.values():
        file, offset, size = (layer.extents[:, :, i] for i in range(3))
        assert (offset[:, 0] % PAGE_BYTES == 0).all()
        assert (offset[:, 1:] == offset[:, :-1] + size[:, :-1]).all()
        assert (file == file[0, 0]).all()
        starts = np.sort(offset[:, 0])
        assert (np.diff(starts) == layer.record_bytes).all()
        assert 0 <= layer.record_bytes - layer.expert_bytes < PAGE_BYTES
    assert all(info.offset % PAGE_BYTES == 0 for info in store.resident.values())


def test_a_store_may_be_moved(packed: Path, tmp_path: Path, model: tuple[Path, dict[str, np.ndarray]]) -> None:
    packed.rename(tmp_path / "elsewhere")
    model[0].unlink()  # nor does it need the GGUF
    assert_same_weights(Store.open(tmp_path / "elsewhere"), model[1])


# ---- what must not be believed ----


def test_a_manifest_changed_anywhere_is_refused(packed: Path) -> None:
    path = packed / MANIFEST
    text = path.read_bytes()
    rng = np.random.default_rng(31)
    for at in [*rng.integers(0, len(text), 150).tolist(), *range(len(text) - 40, len(text))]:
        damaged = bytearray(text)
        damaged[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        with pytest.raises(StoreError):
            Store.open(packed)
    path.write_bytes(text)
    Store.open(packed)


def part(body: dict[str, Any], layer: int = 1, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = body["experts"][layer]["parts"][index]
    return found


def move_record(body: dict[str, Any], by: int, expert: int = 2) -> None:
    for index in range(3):
        part(body, index=index)["offset"][expert] += by


def overlap_resident(body: dict[str, Any]) -> None:
    body["resident"][1]["offset"] = body["resident"][0]["offset"]


def set_field(*path: Any) -> Edit:
    *way, last, value = path

    def edit(body: dict[str, Any]) -> None:
        place: Any = body
        for step in way:
            place = place[step]
        place[last] = value

    return edit


HOSTILE: dict[str, Edit] = {
    "version": set_field("version", 2),
    "format": set_field("format", "something"),
    "kind": set_field("kind", "mirrored"),
    "fingerprint": set_field("fingerprint", "abc"),
    "no layers": set_field("experts", []),
    "layers no list": set_field("experts", {"0": 1}),
    "no files": set_field("files", []),
    "file out of the directory": set_field("files", 1, "name", "../../etc/passwd"),
    "file size": set_field("files", 1, "bytes", 1 << 50),
    "target": set_field("files", 1, "target", 3),
    "metadata checksum": set_field("metadata", "xxh3_64", "0" * 16),
    "record beyond the file": lambda body: move_record(body, 1 << 40),
    "negative offset": lambda body: move_record(body, -(1 << 40)),
    "record off its page": lambda body: move_record(body, 512),
    "records overlap": lambda body: move_record(body, -PAGE_BYTES),
    "record on the header": lambda body: move_record(body, PAGE_BYTES - part(body)["offset"][2] - PAGE_BYTES),
    "offsets of another type": lambda body: part(body)["offset"].__setitem__(0, "8192"),
    "offsets with fractions": lambda body: part(body)["offset"].__setitem__(0, 8192.5),
    "offset too large for 64 bits": lambda body: part(body)["offset"].__setitem__(0, 1 << 70),
    "offsets nested": lambda body: part(body)["offset"].__setitem__(0, [1, 2]),
    "too few offsets": lambda body: part(body)["offset"].pop(),
    "file index": lambda body: part(body)["file"].__setitem__(0, 99),
    "negative file index": lambda body: part(body)["file"].__setitem__(0, -1),
    "part bytes": lambda body: part(body).__setitem__("bytes", part(body)["bytes"] + 144),
    "part type": lambda body: part(body).__setitem__("type", "Q9_X"),
    "part shape": lambda body: part(body).__setitem__("shape", [256]),
    "part shape empty": lambda body: part(body).__setitem__("shape", [256, 0]),
    "part order": lambda body: body["experts"][0]["parts"].reverse(),
    "no parts": lambda body: body["experts"][0].pop("parts"),
    "experts": lambda body: body["experts"][0].__setitem__("experts", EXPERTS + 1),
    "absurd experts": lambda body: body["experts"][0].__setitem__("experts", 1 << 60),
    "checksum": lambda body: body["experts"][0]["xxh3_64"].__setitem__(0, "zz"),
    "long checksum": lambda body: body["experts"][0]["xxh3_64"].__setitem__(0, "f" * 20),
    "frequency": set_field("experts", 0, "picks_per_token", [-1.0] * EXPERTS),
    "layer twice": lambda body: body["experts"].append(body["experts"][0]),
    "tensor twice": lambda body: body["resident"].append(body["resident"][0]),
    "tensor beyond the file": set_field("resident", 0, "offset", 1 << 40),
    "tensor bytes": set_field("resident", 0, "bytes", 4096),
    "tensors overlap": overlap_resident,
    "profile": set_field("profile", {"tokens": 0}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_sealed_but_hostile_manifest_is_refused(packed: Path, case: str) -> None:
    edit_manifest(packed, HOSTILE[case])
    with pytest.raises(StoreError) as caught:
        Store.open(packed)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def swap_places(body: dict[str, Any], one: int, other: int, layer: int = 1) -> None:
    """Two experts' records in each other's place, checksums too: nothing overlaps, everything is whole."""
    for index in range(3):
        offsets = part(body, layer, index)["offset"]
        offsets[one], offsets[other] = offsets[other], offsets[one]
    sums = body["experts"][layer]["xxh3_64"] or [0] * EXPERTS
    sums[one], sums[other] = sums[other], sums[one]


def swap_resident(body: dict[str, Any]) -> None:
    """Two tensors of one shape in each other's place."""
    one, other = (t for t in body["resident"] if t["name"] in ("blk.0.attn_norm.weight", "blk.1.attn_norm.weight"))
    one["offset"], other["offset"] = other["offset"], one["offset"]


def swap_parts(body: dict[str, Any]) -> None:
    """A gate in its up's place and the other way round: of one type and shape."""
    gate, up = part(body, 1, 0)["offset"], part(body, 1, 1)["offset"]
    gate[2], up[2] = up[2], gate[2]


PLAUSIBLE: dict[str, Edit] = {
    "records change places": lambda body: swap_places(body, 0, 4),
    "neighbours change places": lambda body: swap_places(body, 2, 3),
    "tensors change places": swap_resident,
    "gate and up change places": swap_parts,
    "an extent moves": lambda body: part(body, 2, 2)["offset"].__setitem__(5, part(body, 2, 2)["offset"][4]),
    "a layer of another's": lambda body: body["experts"][1].__setitem__("layer", 7),
}


@pytest.mark.parametrize("kind", ["pack", "index"])
@pytest.mark.parametrize("case", PLAUSIBLE)
def test_a_manifest_that_lies_plausibly_is_refused(
    tmp_path: Path, model: tuple[Path, dict[str, np.ndarray]], kind: str, case: str
) -> None:
    """Every extent in its file, of the right size, on no other: but of another place than the layout says."""
    assert main([kind, str(model[0]), "--to", str(tmp_path / "store")]) == 0
    edit_manifest(tmp_path / "store", PLAUSIBLE[case])
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path / "store")
    assert "\n" not in caught.value.message and caught.value.hint


def test_places_follow_from_profile_and_striping(tmp_path: Path, model: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Equally hot experts have their order too; a store from before the striping was written still opens."""
    counts = {layer: np.array([3, 3, 9, 3, 1, 9]) for layer in range(len(TYPES))}
    Profile(50, counts, "p").save(tmp_path / "p.json")
    command = ["pack", str(model[0]), "--profile", str(tmp_path / "p.json")]
    assert main([*command, "--to", str(tmp_path / "a"), "--to", str(tmp_path / "b")]) == 0
    assert_same_weights(Store.open(tmp_path / "a"), model[1])
    manifest = (tmp_path / "a" / MANIFEST).read_bytes()
    for lie in (
        lambda body: swap_places(body, 0, 3),
        lambda body: body["weights"].__setitem__(0, 2),
        lambda body: body["weights"].__setitem__(0, 0),
        lambda body: body["weights"].append(1),
    ):
        edit_manifest(tmp_path / "a", lie)
        with pytest.raises(StoreError):
            Store.open(tmp_path / "a")
        (tmp_path / "a" / MANIFEST).write_bytes(manifest)
    edit_manifest(tmp_path / "a", lambda body: body.pop("weights"))
    assert_same_weights(Store.open(tmp_path / "a"), model[1])


STRANGE = (None, True, -1, 0, 1, 1 << 70, 1.5, float("nan"), "", "x", "0" * 16, [], [0], [[1, 2]], {}, {"bytes": 1})


def leaves(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in list(items) for place in [(value, key), *leaves(inner)]]


@pytest.mark.parametrize("kind", ["pack", "index"])
def test_a_manifest_of_other_types_is_refused_in_one_line(
    tmp_path: Path, model: tuple[Path, dict[str, np.ndarray]], kind: str
) -> None:
    """Every kind of field once with every strange value: an error of ours, or the change means nothing."""
    assert main([kind, str(model[0]), "--to", str(tmp_path / "store")]) == 0
    manifest = (tmp_path / "store" / MANIFEST).read_bytes()
    random = np.random.default_rng(7)
    body = json.loads(manifest)
    kinds: dict[str, int] = {}
    for index, (container, key) in enumerate(leaves(body)):
        kinds.setdefault(f"{type(container).__name__} {key if isinstance(container, dict) else ''}", index)
    places = sorted({*kinds.values(), *random.integers(0, len(leaves(body)), 4).tolist()})
    for index in places:
        for strange in STRANGE:

            def edit(found: dict[str, Any], index: int = index, strange: Any = strange) -> None:
                usable = {key: inner for key, inner in body.items() if key != "xxh3_64"}
                container, key = leaves(found)[min(index, len(leaves(usable)) - 1)]
                container[key] = strange

            edit_manifest(tmp_path / "store", edit)
            try:
                Store.open(tmp_path / "store")
            except (StoreError, FormatError) as error:
                assert "\n" not in error.message
            (tmp_path / "store" / MANIFEST).write_bytes(manifest)


def test_data_files_must_be_the_manifests_own(packed: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other.gguf", 12)
    assert main(["pack", str(tmp_path / "other.gguf"), "--to", str(tmp_path / "other")]) == 0
    own = (packed / "experts-00.bin").read_bytes()
    stranger = (tmp_path / "other" / "experts-00.bin").read_bytes()
    assert len(own) == len(stranger)
    (packed / "experts-00.bin").write_bytes(stranger)
    with pytest.raises(StoreError, match="another store"):
        Store.open(packed)
    for percent in range(0, 100, 7):
        (packed / "experts-00.bin").write_bytes(own[: len(own) * percent // 100])
        with pytest.raises(StoreError, match=r"experts-00\.bin has"):
            Store.open(packed)
    (packed / "experts-00.bin").unlink()
    with pytest.raises(StoreError, match="missing"):
        Store.open(packed)
    (packed / "experts-00.bin").write_bytes(own)
    Store.open(packed)


def test_a_missing_second_drive_is_named(tmp_path: Path, model: tuple[Path, dict[str, np.ndarray]]) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert main(["pack", str(model[0]), "--to", str(first), "--to", str(second)]) == 0
    second.rename(tmp_path / "c")
    with pytest.raises(StoreError, match=r"b/experts-01\.bin.*missing") as caught:
        Store.open(first)
    assert caught.value.hint
    with pytest.raises(StoreError, match=r"holds experts-01\.bin, a part of a store"):
        Store.open(tmp_path / "c")


def test_metadata_must_match(packed: Path) -> None:
    path = packed / METADATA
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="checksum"):
        Store.open(packed)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        Store.open(packed)


def test_an_in_place_store_notices_that_its_model_changed(
    tmp_path: Path, model: tuple[Path, dict[str, np.ndarray]]
) -> None:
    path, _ = model
    assert main(["index", str(path), "--to", str(tmp_path / "index")]) == 0
    original = path.read_bytes()
    write_model(path, 12)  # the same header, other weights
    assert path.stat().st_size == len(original)
    with pytest.raises(StoreError, match="not the model that was indexed"):
        Store.open(tmp_path / "index")
    path.write_bytes(original + b"x")
    with pytest.raises(StoreError, match="when indexed"):
        Store.open(tmp_path / "index")
    path.unlink()
    with pytest.raises(StoreError, match="does not exist") as caught:
        Store.open(tmp_path / "index")
    assert caught.value.hint
    path.write_bytes(original)
    Store.open(tmp_path / "index")


def test_a_name_gives_no_commands_to_the_terminal(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", 1, name="red\x1b[31m\n")
    assert Store.open(tmp_path / "m.gguf").model_name == r"red\x1b[31m"


def test_directories_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a store"):
        Store.open(tmp_path)
    write_model(tmp_path / "m.gguf", 1)
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path)
    assert "m.gguf" in str(caught.value.hint)
    (tmp_path / "pack.journal").write_text("{}\n")
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path)


def retyped(tensors: dict[str, tuple[int, ...]]) -> Callable[[Path], None]:
    """A writer of a GGUF with F32 tensors of the given (numpy order) shapes."""

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "qwen35moe")
        for name, shape in tensors.items():
            writer.add_tensor(name, np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


B = "blk.0.ffn"


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"token_embd.weight": (8, 4)}, "no routed experts"),
        ({"blk.0.ffn_gate.3.weight": (8, 4)}, "tensor of its own"),
        ({f"{B}_gate_exps.weight": (2, 8, 4), f"{B}_down_exps.weight": (2, 4, 8)}, "found down, gate"),
        (
            {f"{B}_gate_exps.weight": (2, 8, 4), f"{B}_up_exps.weight": (3, 8, 4), f"{B}_down_exps.weight": (2, 4, 8)},
            "do not go together",
        ),
        (
            {f"{B}_gate_exps.weight": (2, 8, 4), f"{B}_up_exps.weight": (2, 8, 4), f"{B}_down_exps.weight": (2, 8, 4)},
            "do not go together",
        ),
        ({f"{B}_gate_up_exps.weight": (2, 7, 4), f"{B}_down_exps.weight": (2, 4, 3)}, "do not go together"),
        (
            {f"{B}_gate_exps.weight": (8, 4), f"{B}_up_exps.weight": (8, 4), f"{B}_down_exps.weight": (4, 8)},
            "expected .columns, rows, experts",
        ),
    ],
)
def test_models_whose_experts_make_no_sense(tmp_path: Path, tensors: dict[str, tuple[int, ...]], expected: str) -> None:
    retyped(tensors)(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=expected):
        Store.open(tmp_path / "m.gguf")


def test_reference_fixtures_hold_the_same_weights(shared: Path) -> None:
    fixtures = shared / "reference" / "fixtures"
    names = ("nano-f32.gguf", "nano-fused-f32.gguf", "nano-00001-of-00003.gguf")
    one, fused, sharded = (Store.open(fixtures / name) for name in names)
    for layer, found in one.experts.items():
        for expert in range(found.n_experts):
            expected = read_expert(one, layer, expert)
            assert read_expert(fused, layer, expert) == expected
            assert read_expert(sharded, layer, expert) == expected
