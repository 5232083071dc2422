"""The GGUF reader: what it reads is what package gguf wrote, and nothing hostile gets further than one error."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from fomoe_io.errors import FormatError
from fomoe_io.storage.gguf import GGUFFile, read_metadata
from fomoe_io.storage.gguf_cursor import EAGER_ELEMENTS
from tests.model_files import write_model

U32, STRING, ARRAY = 4, 8, 9


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(keys: list[bytes], tensors: list[bytes], version: int = 3, n_keys: int = -1, n_tensors: int = -1) -> bytes:
    counts = (len(tensors) if n_tensors < 0 else n_tensors, len(keys) if n_keys < 0 else n_keys)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)


ARCHITECTURE = key("general.architecture", STRING, string("qwen35moe"))


def test_reads_what_package_gguf_reads(demo_model: Path) -> None:
    found, reference = GGUFFile.open(demo_model), gguf.GGUFReader(demo_model)
    assert len(found.tensors) == len(reference.tensors) > 100
    for expected in reference.tensors:
        info = found.tensors[expected.name]
        assert (info.offset, info.bytes) == (expected.data_offset, expected.n_bytes)
        assert (info.shape, info.type) == (tuple(expected.shape.tolist()), expected.tensor_type)
    keys = [name for name in reference.fields if not name.startswith("GGUF.")]
    assert list(found.metadata) == keys
    for name in keys:
        value = found.metadata[name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == reference.fields[name].contents()
        assert name not in ("tokenizer.ggml.tokens",) or found.metadata.length(name) == len(value)


@pytest.mark.parametrize("count", [0, 1, EAGER_ELEMENTS, EAGER_ELEMENTS + 1, 50_000])
def test_arrays_of_any_length(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(count)
    words = ["".join(map(chr, rng.integers(0x20, 0x3000, rng.integers(0, 9)))) for _ in range(count)]
    numbers = rng.normal(size=count).astype("<f4")
    flags = rng.integers(0, 2, count, np.uint8)
    raw = header(
        [
            key("words", ARRAY, struct.pack("<IQ", STRING, count) + b"".join(map(string, words))),
            key("numbers", ARRAY, struct.pack("<IQ", 6, count) + numbers.tobytes()),
            key("flags", ARRAY, struct.pack("<IQ", 7, count) + flags.tobytes()),
        ],
        [],
    )
    (tmp_path / "a.gguf").write_bytes(raw)
    found = GGUFFile.open(tmp_path / "a.gguf")
    assert found.metadata["words"] == words
    np.testing.assert_array_equal(np.array(found.metadata["numbers"], "<f4"), numbers)
    np.testing.assert_array_equal(np.array(found.metadata["flags"], bool), flags.astype(bool))
    assert found.metadata.length("words") == count
    # The keys written out as a file of their own read the same.
    (tmp_path / "b.gguf").write_bytes(found.metadata_bytes())
    assert read_metadata(tmp_path / "b.gguf")["words"] == words


def test_scalars_and_version_2(tmp_path: Path) -> None:
    values = [(0, "<B", 200), (1, "<b", -3), (2, "<H", 60000), (3, "<h", -9), (4, "<I", 1 << 31), (5, "<i", -5)]
    values += [(6, "<f", 0.5), (7, "<B", True), (10, "<Q", 1 << 63), (11, "<q", -(1 << 62)), (12, "<d", 1e300)]
    keys = [key(f"k{kind}", kind, struct.pack(form, value)) for kind, form, value in values]
    (tmp_path / "a.gguf").write_bytes(header(keys, [], version=2))
    found = GGUFFile.open(tmp_path / "a.gguf").metadata
    for kind, _, value in values:
        assert found[f"k{kind}"] == value
        assert type(found[f"k{kind}"]) is type(value)
    with pytest.raises(KeyError):
        found["absent"]
    assert found.get("absent", 7) == 7


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    expected = write_model(tmp_path / "one.gguf", 1)
    write_model(tmp_path / "many.gguf", 1, shard_tensors=4)
    shards = sorted(tmp_path.glob("many-*.gguf"))
    assert len(shards) > 2
    found = GGUFFile.open(shards[0])
    assert found.paths == shards
    assert set(found.tensors) == set(expected)
    assert {info.file for info in found.tensors.values()} == set(range(len(shards)))
    for name, data in expected.items():
        info = found.tensors[name]
        with found.paths[info.file].open("rb") as stream:
            stream.seek(info.offset)
            assert stream.read(info.bytes) == data.tobytes()


def test_fingerprint_follows_the_content_not_the_name(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_model(tmp_path / f"{name}.gguf", seed)
    a, b, c = (GGUFFile.open(tmp_path / f"{name}.gguf") for name in "abc")
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert a.header_bytes == c.header_bytes  # only the weights differ


def test_truncation_at_every_percent(tmp_path: Path) -> None:
    write_model(tmp_path / "whole.gguf", 3)
    whole = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for percent in range(100):
        cut.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(FormatError) as caught:
            GGUFFile.open(cut)
        assert "cut.gguf" in caught.value.message
        assert "\n" not in caught.value.message
    cut.write_bytes(whole)
    GGUFFile.open(cut)


HUGE = 1 << 62
LENGTHS = struct.pack("<Q", HUGE)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "magic": (b"GGML" + bytes(100), "not a GGUF"),
    "version": (header([], [], version=9) + bytes(64), "version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "key count": (header([ARCHITECTURE], [], n_keys=HUGE), "metadata keys"),
    "tensor count": (header([ARCHITECTURE], [], n_tensors=HUGE), "tensors"),
    "key length": (header([LENGTHS + b"x" * 64], [], n_keys=1), "bytes of text"),
    "long key": (header([string("k" * 70_000) + bytes(8)], []), "make sense"),
    "string length": (header([string("k") + struct.pack("<I", STRING) + LENGTHS], []), "bytes of text"),
    "string array": (header([key("k", ARRAY, struct.pack("<IQ", STRING, HUGE) + bytes(99))], []), "array elements"),
    "string in array": (header([key("k", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE) + bytes(99))], []), "truncated"),
    "number array": (header([key("k", ARRAY, struct.pack("<IQ", 12, HUGE))], []), "array elements"),
    "nested array": (header([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(99))], []), "value type 9"),
    "value type": (header([key("k", 77, bytes(99))], []), "value type 77"),
    "key twice": (header([ARCHITECTURE, ARCHITECTURE], []), "twice"),
    "key not UTF-8": (header([string(b"\xff\xfe\xfa") + bytes(12)], []), "UTF-8"),
    "alignment": (header([key("general.alignment", U32, struct.pack("<I", 33))], []), "power of two"),
    "alignment zero": (header([key("general.alignment", U32, bytes(4))], []), "power of two"),
    "alignment text": (header([key("general.alignment", STRING, string("32"))], []), "power of two"),
    "no dimensions": (header([], [tensor("t", ())]) + bytes(99), "dimensions"),
    "five dimensions": (header([], [tensor("t", (1, 1, 1, 1, 1))]) + bytes(99), "dimensions"),
    "absurd dimensions": (header([], [string("t") + struct.pack("<I", 1 << 31) + bytes(99)]), "dimensions"),
    "empty dimension": (header([], [tensor("t", (4, 0))]) + bytes(99), "empty"),
    "huge dimension": (header([], [tensor("t", (HUGE,))]) + bytes(99), "does not fit"),
    "dimensions that wrap": (header([], [tensor("t", (1 << 32, 1 << 32))]) + bytes(99), "does not fit"),
    "control characters in a key": (header([key("k\x1b[2J", U32, bytes(4))], []), "control characters"),
    "control characters in a tensor": (header([], [tensor("t\n", (4,))]) + bytes(99), "control characters"),
    "tensor type": (header([], [tensor("t", (4,), kind=999)]) + bytes(99), "type number 999"),
    "removed tensor type": (header([], [tensor("t", (4,), kind=4)]) + bytes(99), "type number 4"),
    "half a block": (header([], [tensor("t", (100,), kind=12)]) + bytes(999), "blocks of"),
    "misaligned": (header([], [tensor("t", (4,), offset=8)]) + bytes(99), "alignment"),
    "offset beyond": (header([], [tensor("t", (4,), offset=1 << 40)]) + bytes(99), "does not fit"),
    "offset wraps": (header([], [tensor("t", (4,), offset=(1 << 64) - 32)]) + bytes(99), "does not fit"),
    "data beyond": (header([], [tensor("t", (64,), offset=32)]) + bytes(99), "truncated"),
    "overlap": (header([], [tensor("a", (16,)), tensor("b", (16,), offset=32)]) + bytes(999), "overlap"),
    "tensor twice": (header([], [tensor("a", (4,)), tensor("a", (4,), offset=32)]) + bytes(999), "twice"),
    "long tensor name": (header([], [tensor("t" * 300, (4,))]) + bytes(999), "make sense"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    raw, expected = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=expected) as caught:
            GGUFFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_sparse_file_does_not_make_a_huge_header(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as stream:
        stream.write(header([key("k", ARRAY, struct.pack("<IQ", 0, 1 << 40))], []))
        stream.truncate(1 << 41)
    with pytest.raises(FormatError, match="256 MiB"):
        GGUFFile.open(path)


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    write_model(tmp_path / "whole.gguf", 5)
    whole = bytearray((tmp_path / "whole.gguf").read_bytes())
    header_bytes = GGUFFile.open(tmp_path / "whole.gguf").header_bytes[0]
    rng = np.random.default_rng(6)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole)
    refused = 0
    with path.open("r+b") as stream:
        for _ in range(400):
            # Most of the header is token text, where damage is harmless: prefer its two ends.
            at = int(rng.choice([rng.integers(0, 600), rng.integers(header_bytes - 1200, header_bytes)]))
            stream.seek(at)
            stream.write(rng.integers(0, 256, 2, np.uint8).tobytes())
            stream.flush()
            try:
                GGUFFile.open(path)
            except FormatError:
                refused += 1
            stream.seek(at)
            stream.write(whole[at : at + 2])
    assert refused > 100


def rename(shards: list[Path]) -> Path:
    return shards[0].rename(shards[0].with_name("renamed.gguf"))


def remove_last(shards: list[Path]) -> Path:
    shards[-1].unlink()
    return shards[0]


def repeat_second(shards: list[Path]) -> Path:
    shards[2].write_bytes(shards[1].read_bytes())
    return shards[0]


def other_model(shards: list[Path]) -> Path:
    write_model(shards[0].with_name("other.gguf"), 9, shard_tensors=5)
    shards[1].write_bytes(sorted(shards[0].parent.glob("other-*.gguf"))[1].read_bytes())
    return shards[0]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (rename, "name does not end in"),
        (remove_last, "does not exist"),
        (repeat_second, "expected 2 of"),
        (other_model, "of another model|tensors.count says"),
        (lambda shards: shards[1], "is shard 2 of"),
    ],
)
def test_shards_that_do_not_belong_together(
    tmp_path: Path, damage: Callable[[list[Path]], Path], expected: str
) -> None:
    write_model(tmp_path / "many.gguf", 1, shard_tensors=4)
    path = damage(sorted(tmp_path.glob("many-*.gguf")))
    with pytest.raises(FormatError, match=expected) as caught:
        GGUFFile.open(path)
    assert caught.value.hint


def test_absent_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="is a directory"):
        GGUFFile.open(tmp_path)


def test_an_array_that_changes_under_us(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    words = [f"word {i}" for i in range(EAGER_ELEMENTS + 1)]
    value = struct.pack("<IQ", STRING, len(words)) + b"".join(map(string, words))
    path.write_bytes(header([key("words", ARRAY, value)], []))
    found = GGUFFile.open(path)
    size = path.stat().st_size
    for byte in (b"\xff", b"\0"):
        path.write_bytes(byte * size)
        with pytest.raises(FormatError, match="changed while in use"):
            found.metadata["words"]
    path.write_bytes(bytes(size - 9))
    with pytest.raises(FormatError, match="cut while in use"):
        found.metadata["words"]


def test_pipes_are_no_models(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        GGUFFile.open(tmp_path / "pipe")


def test_a_large_vocabulary_stays_in_the_file(tmp_path: Path) -> None:
    count = 248_320
    raw = b"".join(string(f"w{i}") for i in range(count))
    (tmp_path / "a.gguf").write_bytes(header([key("tokens", ARRAY, struct.pack("<IQ", STRING, count) + raw)], []))
    tracemalloc.start()
    try:
        found = GGUFFile.open(tmp_path / "a.gguf")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000 < peak
    tokens = found.metadata["tokens"]
    assert (len(tokens), tokens[0], tokens[-1]) == (count, "w0", f"w{count - 1}")


def test_reference_fixtures(shared: Path) -> None:
    fixtures = shared / "reference" / "fixtures"
    one, many = GGUFFile.open(fixtures / "nano-f32.gguf"), GGUFFile.open(fixtures / "nano-00001-of-00003.gguf")
    assert len(many.paths) == 3
    assert set(one.tensors) <= set(many.tensors)
    for name, info in one.tensors.items():
        other = many.tensors[name]
        assert (info.type, info.bytes) == (other.type, other.bytes)
