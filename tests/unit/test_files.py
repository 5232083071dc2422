"""Files appear whole or not at all, and nothing that is not a file is replaced by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fomoe_io.stats import write_json
from fomoe_io.system.files import check_targets, write_atomically

ROOT = Path(__file__).resolve().parent.parent.parent


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"third")
    assert path.read_bytes() == b"second" and names(tmp_path) == ["result"]


def test_a_directory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(IsADirectoryError, match="there"):
        write_json(tmp_path / "there", {"a": 1})
    assert names(tmp_path) == ["there"]


def test_targets_are_checked_before_the_work(tmp_path: Path) -> None:
    check_targets([None, tmp_path / "new", Path("new"), Path("/dev/stdout"), Path("/dev/null")])
    for bad in (tmp_path, Path(), Path("/"), Path(".."), tmp_path / "missing" / "file", Path("/proc/version/x")):
        with pytest.raises(OSError, match=str(bad)):
            check_targets([bad])
    assert names(tmp_path) == []


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        write_json(pipe, {"a": 1})
        assert reader.communicate(timeout=30)[0] == b'{\n "a": 1\n}\n'
    assert pipe.is_fifo() and names(tmp_path) == ["pipe"]


def test_standard_output_redirected_to_a_file(tmp_path: Path) -> None:
    program = "from pathlib import Path; from fomoe_io.stats import write_json; write_json(Path('/proc/self/fd/1'), {})"
    with (tmp_path / "out").open("wb") as stream:
        subprocess.run([sys.executable, "-c", program], stdout=stream, check=True)
    assert (tmp_path / "out").read_bytes() == b"{}\n"


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    program = (
        "import os, sys; from pathlib import Path; from fomoe_io.system.files import write_atomically\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "write_atomically(Path(sys.argv[1]), b'half')"
    )
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert killed.returncode == -9
        assert len(names(tmp_path)) == 1  # each removed the one before it
    (tmp_path / ".profile.json.123.tmp").write_bytes(b"of an earlier version")
    others = [".profile.json.backup.tmp", ".other.json.1-ab.tmp", "profile.json.1.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    write_atomically(path, b"whole")
    assert sorted(names(tmp_path)) == sorted([*others, "profile.json"]) and path.read_bytes() == b"whole"


def test_a_writer_at_work_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result"
    fsync = os.fsync

    def another(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"second")
        assert len(names(tmp_path)) == 2
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", another)
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first" and names(tmp_path) == ["result"]
