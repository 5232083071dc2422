"""Memory limits of control groups on made-up machines, and numbers that do not change from run to run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fomoe_io.system import memory

GB = 1 << 30
MINE = 1 << 28
V2_MOUNT = "30 24 0:26 {shown} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = (
    "31 24 0:27 {shown} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "32 24 0:28 {shown} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
)


def machine(root: Path, cgroup: str, mounts: str, files: dict[str, object]) -> Path:
    """A root directory of a machine with 64 GiB, whose process holds 256 MiB."""
    files = {
        "proc/meminfo": f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {48 * GB // 1024} kB\n",
        "proc/self/status": f"Name: x\nVmRSS:\t{MINE // 1024} kB\n",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "24 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts,
        **{f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in files.items()},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def left(root: Path, cgroup: str, mounts: str, files: dict[str, object]) -> int:
    return memory.available_bytes(machine(root, cgroup, mounts, files))


def test_no_limit(tmp_path: Path) -> None:
    assert left(tmp_path / "none", "0::/\n", "", {}) == 48 * GB
    assert left(tmp_path / "max", "0::/a\n", V2_MOUNT.format(shown="/"), {"a/memory.max": "max"}) == 48 * GB
    unlimited = {"memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000}
    assert left(tmp_path / "v1", "4:memory:/\n", V1_MOUNT.format(shown="/"), unlimited) == 48 * GB


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
@pytest.mark.parametrize("group", ["a/b/c", "a/b", "a", "."])
def test_of_every_ancestor_v2(tmp_path: Path, name: str, group: str) -> None:
    files = {f"{group}/{name}": 4 * GB, "a/b/c/memory.max": "max" if group != "a/b/c" else 4 * GB}
    assert left(tmp_path, "0::/a/b/c\n", V2_MOUNT.format(shown="/"), files) == 4 * GB - MINE


@pytest.mark.parametrize("group", ["a/b", "a", "."])
def test_of_every_ancestor_v1(tmp_path: Path, group: str) -> None:
    files = {f"memory/{group}/memory.limit_in_bytes": 4 * GB, "memory/a/b/tasks": ""}
    cgroup = "5:cpu:/other\n4:hugetlb,memory:/a/b\n0::/\n"
    assert left(tmp_path, cgroup, V1_MOUNT.format(shown="/"), files) == 4 * GB - MINE


def test_of_groups_that_no_mount_shows(tmp_path: Path) -> None:
    """The kernel's own answer for v1: the least of all groups above."""
    stat = {"memory/memory.stat": f"cache 5\nhierarchical_memory_limit {2 * GB}"}
    assert left(tmp_path, "4:memory:/\n", V1_MOUNT.format(shown="/"), stat) == 2 * GB - MINE


@pytest.mark.parametrize("shown", ["/docker/1234", "/", "/../../somewhere"])
def test_inside_a_container(tmp_path: Path, shown: str) -> None:
    """/proc/self/cgroup names the host's path; the mount shows the container's group as its root."""
    files = {"memory/memory.limit_in_bytes": 3 * GB}
    found = left(tmp_path, "4:memory:/docker/1234\n", V1_MOUNT.format(shown=shown), files)
    assert found == 3 * GB - MINE


def test_a_group_of_its_own_inside_a_container(tmp_path: Path) -> None:
    files = {"memory/mine/memory.limit_in_bytes": GB, "memory/memory.limit_in_bytes": 3 * GB}
    for number, shown in enumerate(("/docker/1234", "/elsewhere")):
        root = tmp_path / str(number)
        assert left(root, "4:memory:/docker/1234/mine\n", V1_MOUNT.format(shown=shown), files) == GB - MINE


@pytest.mark.parametrize("path", ["/", "/../../host", "/kubepods/pod7/abc"])
def test_a_namespace(tmp_path: Path, path: str) -> None:
    assert left(tmp_path, f"0::{path}\n", V2_MOUNT.format(shown="/"), {"memory.max": 5 * GB}) == 5 * GB - MINE


def test_both_versions(tmp_path: Path) -> None:
    mounts = V1_MOUNT.format(shown="/") + V2_MOUNT.format(shown="/").replace("/cgroup rw", "/cgroup/unified rw")
    files = {"memory/a/memory.limit_in_bytes": 6 * GB, "unified/a/b/memory.max": 7 * GB}
    assert left(tmp_path, "4:memory:/a\n0::/a/b\n", mounts, files) == 6 * GB - MINE


def test_what_others_use_is_not_left(tmp_path: Path) -> None:
    """Files in the page cache can be dropped; what another process of the group holds can't."""
    files = {
        "a/memory.max": 8 * GB,
        "a/b/memory.max": "max",
        "a/memory.current": 6 * GB,
        "a/memory.stat": f"anon {2 * GB}\ninactive_file {3 * GB}\nactive_file {GB}",
    }
    assert left(tmp_path, "0::/a/b\n", V2_MOUNT.format(shown="/"), files) == 6 * GB


def test_never_negative(tmp_path: Path) -> None:
    assert left(tmp_path, "0::/a\n", V2_MOUNT.format(shown="/"), {"a/memory.max": MINE // 2}) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="making control groups needs root")
def test_this_machine(tmp_path: Path) -> None:
    """A real limit on a parent group."""
    mounts = memory._group_mounts(memory.ROOT)
    for version, name in ((1, "memory.limit_in_bytes"), (2, "memory.max")):
        for _, point in mounts[version]:
            parent, child = point / f"fomoe-test-{os.getpid()}", point / f"fomoe-test-{os.getpid()}" / "child"
            try:
                child.mkdir(parents=True)
                (parent / name).write_text(str(GB))
            except OSError:
                continue
            finally:
                for folder in (child, parent):
                    if folder.is_dir() and not (parent / name).exists():
                        folder.rmdir()
            try:
                pid = os.fork()
                if not pid:
                    (child / "cgroup.procs").write_text(str(os.getpid()))
                    os._exit(0 if memory.available_bytes() <= GB else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            finally:
                child.rmdir()
                parent.rmdir()
            return
    pytest.skip("no control groups that limit memory can be made here")


# ---- numbers that repeat ----


def test_the_process_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages more or less change nothing; a program that holds far more is counted."""
    reckoned = memory.PROCESS_BYTES + (1 << 20)
    found = set()
    for held in (1 << 20, reckoned - 4096, reckoned, reckoned + 4096, reckoned + memory.LEEWAY_BYTES // 2):
        monkeypatch.setattr(memory, "resident_bytes", lambda held=held: held)
        found.add(memory.process_bytes(1000, 100))
    assert len(found) == 1 and found.pop() <= reckoned
    for held in (200 << 20, (200 << 20) + 4096):
        monkeypatch.setattr(memory, "resident_bytes", lambda held=held: held)
        assert memory.process_bytes(1000, 100) == 256 << 20
    assert memory.process_bytes(1 << 20, 0) > 256 << 20


def test_budgets_are_rounded() -> None:
    assert memory.rounded_budget(19_800_000_000) == memory.rounded_budget(19_400_000_000) == 18 << 30
    for size in (5 << 20, 100 << 20, 7 * GB, 1 << 40):
        assert 0.93 * size <= memory.rounded_budget(size + 12345) <= size + 12345
