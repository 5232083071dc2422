"""How much memory there is, and how much of it the process holds."""

from __future__ import annotations

from pathlib import Path


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes() -> int:
    """Resident set of this process now (VmRSS)."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far (VmHWM)."""
    return _status_bytes("VmHWM")


def _cgroup_limits() -> list[int]:
    """Memory limits of the control groups this process is in (v2 and v1), in bytes."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = [Path(f"/sys/fs/cgroup{path}/memory.max")]
        elif "memory" in controllers.split(","):
            files = [Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")]
        else:
            continue
        for file in files:
            try:
                text = file.read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return limits


def available_bytes() -> int:
    """What a new allocation could get without swapping: MemAvailable, or less under a control group's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min([available, *(limit - resident_bytes() for limit in _cgroup_limits())])
