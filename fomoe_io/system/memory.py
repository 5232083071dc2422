"""How much memory there is, how much of it the process holds, and what it is reckoned to hold."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

from fomoe_io.system.direct_io import round_down, round_up

ROOT = Path("/")

PROCESS_BYTES = 49 << 20
TOKEN_BYTES = 380
EXPERT_BYTES = 430
"""The interpreter and its libraries; a token of the vocabulary with its merge; an expert of a packed store.  Measured
when memory is shared, for vocabularies of 300 to 248,320 tokens and up to 30,720 experts."""

LEEWAY_BYTES = 12 << 20
"""More than reckoned is no matter up to here: what is left free for later (engine.RESERVE_BYTES) takes it."""
HELD_UNIT_BYTES = 64 << 20
"""What a process that holds more than that is rounded up to: a GPU's driver, or a program around the engine."""


def _status_bytes(field: str, root: Path = ROOT) -> int:
    for line in (root / "proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes(root: Path = ROOT) -> int:
    """Resident set of this process now (VmRSS)."""
    return _status_bytes("VmRSS", root)


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far (VmHWM)."""
    return _status_bytes("VmHWM")


def held_since(peak_bytes_before: int) -> int:
    """The most that the process has held since its peak was `peak_bytes_before`, as far as can be told.

    Where the peak has not risen since, it is what the process holds now: a program that needed much before it opened
    an engine is no reason to refuse a budget.
    """
    peak = peak_resident_bytes()
    return peak if peak > peak_bytes_before else resident_bytes()


# ---- a number that does not change from run to run ----


def process_bytes(vocabulary: int, experts: int) -> int:
    """What the process holds beside what an engine allocates, reckoned from the model alone.

    The resident set at one moment varies by some pages from run to run, and what is shared by it would vary, too.

    Parameters
    ----------
    vocabulary : int
        Tokens.
    experts : int
        Of all layers together.
    """
    give_back_freed()
    reckoned = round_up(PROCESS_BYTES + TOKEN_BYTES * vocabulary + EXPERT_BYTES * experts, 1 << 20)
    held = resident_bytes()
    return reckoned if held <= reckoned + LEEWAY_BYTES else round_up(held, HELD_UNIT_BYTES)


def give_back_freed() -> None:
    """What reading a vocabulary took and freed again goes back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def rounded_budget(size: int) -> int:
    """Down to five significant bits: what is available varies from run to run, and this rarely does."""
    return round_down(size, 1 << max(20, size.bit_length() - 5))


# ---- what is available ----


def available_bytes(root: Path = ROOT) -> int:
    """What a new allocation could get without swapping: MemAvailable, or less under a control group's limit.

    Parameters
    ----------
    root : Path
        Where /proc and /sys are.
    """
    available = 0
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return max(0, min([available, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each limit of this process's control groups and of all groups above them leaves, in bytes."""
    mounts = _group_mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else 0
        for shown, point in mounts.get(version, []):
            for folder in _with_ancestors(shown, point, path):
                yield from _left_in(folder, version, resident_bytes(root))


def _group_mounts(root: Path) -> dict[int, list[tuple[str, Path]]]:
    """Version -> (path of the group that the mount shows, mount point) of every mount with memory limits."""
    mounts: dict[int, list[tuple[str, Path]]] = {1: [], 2: []}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields, _, tail = line.partition(" - ")
        kind, _, options = [*tail.split(" "), "", ""][:3]
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options.split(",") else 0
        if version:
            shown, point = (_unescaped(text) for text in fields.split(" ")[3:5])
            mounts[version].append((shown, root / point.lstrip("/")))
    return mounts


def _unescaped(text: str) -> str:
    """Of mountinfo, where a blank is \\040."""
    return text.encode("latin-1", "replace").decode("unicode_escape") if "\\" in text else text


def _with_ancestors(shown: str, point: Path, path: str) -> list[Path]:
    """The group's folder and those above it, as far up as the mount shows them.

    Inside a container the path is often that of the host while the mount begins at the container's own group, or
    anywhere: of the path's ends the longest that exists below the mount is the group, and the mount point itself if
    none does.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    above = [part for part in shown.split("/") if part not in ("", "..")]
    if parts[: len(above)] == above:
        parts = parts[len(above) :]
    while parts and not point.joinpath(*parts).is_dir():
        parts = parts[1:]
    return [point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


_LIMITS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
_USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
_CACHES = {1: ("total_inactive_file", "total_active_file"), 2: ("inactive_file", "active_file")}


def _left_in(folder: Path, version: int, resident: int) -> Iterator[int]:
    """What the limits of a group leave: of what is used, files that the kernel can drop do not count."""
    statistics = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    limits = [_text(folder / name) for name in _LIMITS[version]]
    limits.append(statistics.get("hierarchical_memory_limit", ""))  # v1: of groups above that no mount shows as well
    used = _text(folder / _USAGE[version])
    caches = sum(int(statistics.get(name, 0)) for name in _CACHES[version])
    taken = max(int(used) - caches, resident) if used.isdigit() else resident
    yield from (int(limit) - taken for limit in limits if limit.isdigit())


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
