"""fomoe-layout's advice: a fix costs no more than what is wrong, and nothing is measured by writing unless asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_io.errors import StoreError
from fomoe_io.storage.manifest import MANIFEST, PAGE_BYTES
from fomoe_io.storage.store import Store
from layout_tool import striping
from layout_tool import targets as target_tools
from layout_tool.main import main
from tests.model_files import write_model

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("known_machine")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and its store: striped over `a` and `b`, mirrored in `m`."""
    root = tmp_path_factory.mktemp("made")
    write_model(root / "tiny.gguf", 81)
    write_model(root / "other.gguf", 82)
    assert main(["pack", str(root / "tiny.gguf"), "--to", str(root / "a"), "--to", str(root / "b")]) == 0
    assert main(["mirror", str(root / "a"), "--to", str(root / "m")]) == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of that, moved here."""
    for name in "abm":
        shutil.copytree(made / name, tmp_path / name)
    for name in ("tiny.gguf", "other.gguf"):
        os.link(made / name, tmp_path / name)
    path = tmp_path / "a" / MANIFEST
    text = path.read_text().replace(str(made), str(tmp_path))
    from fomoe_io.storage.manifest import seal

    body = json.loads(text)
    del body["xxh3_64"]
    path.write_bytes(seal(body))
    return tmp_path


def fix_of(argv: list[str], capsys: Capture) -> str:
    """The command fails; its advice."""
    capsys.readouterr()
    assert main(argv) == 1
    return capsys.readouterr().err.rpartition("  fix: ")[2].strip()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))


def follow(fix: str) -> None:
    """Do what was advised."""
    for command in fix.split("; "):
        program, *arguments = command.split()
        if program == "fomoe-layout":
            assert main(arguments) == 0
        else:
            subprocess.run([program, *arguments], check=True)


@pytest.mark.parametrize(
    ("hurt", "begin"),
    [
        (lambda root: shutil.rmtree(root / "m"), "fomoe-layout mirror "),
        (lambda root: (root / "m" / "experts-01.bin").unlink(), "fomoe-layout mirror "),
        (lambda root: flip(root / "m" / "experts-00.bin", PAGE_BYTES + 7), "cp "),
        (lambda root: flip(root / "a" / "experts-00.bin", PAGE_BYTES + 7), "cp "),
        (lambda root: (root / "b" / "experts-01.bin").unlink(), "cp "),
    ],
)
def test_one_copy_that_is_whole_mends_the_other(root: Path, capsys: Capture, hurt, begin: str) -> None:
    hurt(root)
    fix = fix_of(["verify", str(root / "a")], capsys)
    assert fix.startswith(begin) and "overwrite" not in fix
    follow(fix)
    assert main(["verify", str(root / "a"), "--against", str(root / "tiny.gguf")]) == 0


def test_what_both_copies_lost_is_packed_again(root: Path, capsys: Capture) -> None:
    for name in "am":
        flip(root / name / "experts-00.bin", PAGE_BYTES + 7)
    fix = fix_of(["verify", str(root / "a")], capsys)
    assert fix == f"fomoe-layout pack tiny.gguf --to {root / 'a'} --to {root / 'b'} --overwrite"


def test_against_another_model_names_the_right_one(root: Path, capsys: Capture) -> None:
    fix = fix_of(["verify", str(root / "a"), "--against", str(root / "other.gguf")], capsys)
    assert fix == "--against tiny.gguf, which it was made from"


def test_other_directories_of_a_store_are_known(root: Path) -> None:
    for name in "bm":
        with pytest.raises(StoreError, match="a part of a store whose manifest is elsewhere"):
            Store.open(root / name)


def test_a_mirror_is_removed(root: Path, capsys: Capture) -> None:
    (root / "m" / "precious").write_text("mine")
    assert main(["mirror", str(root / "a"), "--remove"]) == 0
    assert [path.name for path in (root / "m").iterdir()] == ["precious"]
    assert not any(Store.open(root / "a").mirrors)
    assert main(["verify", str(root / "a")]) == 0
    assert "inspect" in fix_of(["mirror", str(root / "a"), "--remove"], capsys)


def test_a_mirror_that_is_needed_stays(root: Path, capsys: Capture) -> None:
    (root / "b" / "experts-01.bin").unlink()
    assert "mount the drive" in fix_of(["mirror", str(root / "a"), "--remove"], capsys)
    assert (root / "m" / "experts-01.bin").exists() and Store.open(root / "a").lost_copies


def test_plan_onto_a_finished_store(root: Path, capsys: Capture) -> None:
    targets = [f"--to={root / name}" for name in "ab"]
    assert main(["plan", str(root / "tiny.gguf"), *targets]) == 0
    out = capsys.readouterr().out
    assert "holds this store already" in out and "takes" not in out
    assert main(["plan", str(root / "other.gguf"), *targets]) == 0
    assert "another store, of tiny: pack asks for --overwrite" in capsys.readouterr().out


def test_plan_writes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Not even a file that it removes again, unless that is asked for."""
    calls: list[Path] = []
    monkeypatch.setattr(target_tools, "probe", lambda target, **_: (calls.append(target), (1e9, 1e9))[1])
    command = ["plan", str(root / "tiny.gguf"), "--to", str(root / "new")]
    assert main(command) == 0
    assert not calls and "at least: reading is measured" in capsys.readouterr().out
    assert main([*command, "--probe"]) == 0
    assert calls and "writing measured" in capsys.readouterr().out


def test_an_index_is_made_again_without_being_asked_twice(root: Path, capsys: Capture) -> None:
    command = ["index", str(root / "tiny.gguf"), "--to", str(root / "i")]
    assert main(command) == 0
    assert main([*command, "--checksums"]) == 0  # what it lacked
    before = (root / "i" / MANIFEST).stat().st_mtime_ns
    assert main([*command, "--checksums"]) == 0 and main(command) == 0  # nothing to do, nothing lost
    assert (root / "i" / MANIFEST).stat().st_mtime_ns == before
    assert main(["verify", str(root / "i")]) == 0
    (root / "tiny.gguf").rename(root / "moved.gguf")
    assert main(["index", str(root / "moved.gguf"), "--to", str(root / "i")]) == 0
    assert Store.open(root / "i").paths == [root / "moved.gguf"]
    assert "overwrite" in fix_of(["index", str(root / "other.gguf"), "--to", str(root / "i")], capsys)
    assert "as it is" in fix_of(["index", str(root / "moved.gguf"), "--to", str(root / "a")], capsys)


def test_pack_says_what_else_lies_there(root: Path, capsys: Capture) -> None:
    (root / "home").mkdir()
    (root / "home" / "thesis.tex").write_text("...")
    assert main(["pack", str(root / "tiny.gguf"), "--to", str(root / "home")]) == 0
    assert "holds other files (thesis.tex), which stay" in capsys.readouterr().err
    assert (root / "home" / "thesis.tex").exists()


# ---- several drives ----


@pytest.fixture
def drives(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """A large drive and one with room for little, the faster one."""
    places = [root / "large", root / "small"]
    for place, size in zip(places, ("64M", "8M"), strict=True):
        place.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if made.returncode:
            pytest.skip("no right to mount")
    rates = {places[0] / "s": 1e9, places[1] / "s": 4e9}
    monkeypatch.setattr(target_tools, "probe", lambda target, **_: (1e9, rates[target]))
    monkeypatch.setattr(target_tools, "MANIFEST_ROOM_BYTES", 0)
    yield [place / "s" for place in places]
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def weights_of(store: Path) -> list[int]:
    found = json.loads((store / MANIFEST).read_text())["weights"]
    assert isinstance(found, list)
    return found


def test_a_drive_without_room_for_its_share_by_speed(root: Path, drives: list[Path], capsys: Capture) -> None:
    write_model(root / "many.gguf", 83, experts=40)  # 40 MB of experts
    command = ["pack", str(root / "many.gguf"), *(f"--to={drive}" for drive in drives)]
    assert main([*command, "--by", "even"]) == 1
    assert re.search(r"small/s needs", capsys.readouterr().err)
    assert main(command) == 0
    assert "shared out by free space" in capsys.readouterr().err
    large, small = weights_of(drives[0])
    assert small / large < 0.2
    assert main(["verify", str(drives[0]), "--against", str(root / "many.gguf")]) == 0


def test_shares_by_speed_and_by_space(root: Path, drives: list[Path]) -> None:
    command = ["pack", str(root / "tiny.gguf"), *(f"--to={drive}" for drive in drives), "--overwrite"]
    for by, expected in (("speed", [2, 8]), ("even", [1, 1])):
        assert main([*command, "--by", by]) == 0
        assert weights_of(drives[0]) == expected
    assert main([*command, "--by", "space"]) == 0
    assert weights_of(drives[0])[0] == striping.STEPS_OF_SPACE > 6 * weights_of(drives[0])[1]
