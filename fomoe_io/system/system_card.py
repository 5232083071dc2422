"""What a measurement was made on: kernel, processor, memory, and the drive behind a file."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SYSFS = Path("/sys")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Drive:
    """The block device and file system under a path; empty strings and None where the kernel does not say.

    Attributes
    ----------
    path : str
    file_system : str
        Such as "ext4".
    mount_point : str
    device : str
        Kernel name of the whole drive, such as "nvme0n1".
    model : str
    scheduler : str
        The I/O scheduler in use, such as "none".
    size_bytes, requests, max_sectors_kib, dma_alignment : int or None
        Size; nr_requests; largest request; what the address of a direct read must be a multiple of, less one.
    rotational, polled : bool or None
    link, link_limit : str
        PCIe link of the drive: as negotiated, and the most it can do.
    """

    path: str
    file_system: str = ""
    mount_point: str = ""
    device: str = ""
    model: str = ""
    scheduler: str = ""
    size_bytes: int | None = None
    requests: int | None = None
    max_sectors_kib: int | None = None
    dma_alignment: int | None = None
    rotational: bool | None = None
    polled: bool | None = None
    link: str = ""
    link_limit: str = ""

    def describe(self) -> str:
        """One line."""
        parts = [self.model, self.device, self.link, self.file_system, self.scheduler and f"scheduler {self.scheduler}"]
        return ", ".join(part for part in parts if part) or "unknown drive"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _flag(path: Path) -> bool | None:
    value = _integer(path)
    return None if value is None else value != 0


def _mount_of(path: Path) -> tuple[str, str, str]:
    """(mount point, file system, source) of a path."""
    real = path.resolve()
    best = ("", "", "")
    for line in _text(PROC / "self/mountinfo").splitlines():
        fields, _, tail = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")
        # of two mounts on one point the later one counts
        if (real == Path(point) or Path(point) in real.parents) and len(point) >= len(best[0]):
            kind, source = tail.split()[:2]
            best = (point, kind, source)
    return best


def _device_of(path: Path, source: str) -> Path | None:
    """sysfs directory of the whole drive under a file."""
    status = path.stat()
    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    if os.major(number) == 0 and source.startswith("/dev/") and Path(source).exists():
        number = Path(source).stat().st_rdev  # btrfs and overlays hide the drive behind a number of their own
    device = SYSFS / f"dev/block/{os.major(number)}:{os.minor(number)}"
    if not device.exists():
        return None
    device = device.resolve()
    return device.parent if (device / "partition").exists() else device


def _link(device: Path, which: str) -> str:
    """PCIe link of the drive's controller, the nearest parent that has one."""
    for folder in (device / "device").resolve(), *(device / "device").resolve().parents:
        speed, width = _text(folder / f"{which}_link_speed"), _text(folder / f"{which}_link_width")
        if speed and width:
            return f"PCIe {speed.removesuffix(' PCIe')} x{width}"
    return ""


def _scheduler(text: str) -> str:
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else text


def drive_of(path: str | Path) -> Drive:
    """The drive under an existing path."""
    path = Path(path)
    point, kind, source = _mount_of(path)
    device = _device_of(path, source)
    if device is None:
        return Drive(str(path), kind, point)
    queue = device / "queue"
    sectors = _integer(device / "size")
    return Drive(
        path=str(path),
        file_system=kind,
        mount_point=point,
        device=device.name,
        model=_text(device / "device/model"),
        scheduler=_scheduler(_text(queue / "scheduler")),
        size_bytes=None if sectors is None else 512 * sectors,  # sysfs counts in 512 bytes whatever the drive does
        requests=_integer(queue / "nr_requests"),
        max_sectors_kib=_integer(queue / "max_sectors_kb"),
        dma_alignment=_integer(queue / "dma_alignment"),
        rotational=_flag(queue / "rotational"),
        polled=_flag(queue / "io_poll"),
        link=_link(device, "current"),
        link_limit=_link(device, "max"),
    )


def processor() -> str:
    """The processor's name."""
    for line in _text(PROC / "cpuinfo").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def system_card(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Everything above, for the record: JSON values under stable keys.

    Parameters
    ----------
    paths : sequence of path
        Existing files or directories; drives are listed once each.
    """
    drives: dict[str, Drive] = {}
    for path in paths:
        drive = drive_of(path)
        drives.setdefault(drive.device or drive.mount_point, drive)
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "processors": os.cpu_count(),
        "processors_allowed": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "drives": [asdict(drive) for drive in drives.values()],
    }


def format_card(card: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"{card['kernel']}, {card['processor']} x {card['processors_allowed']}, "
        f"{card['memory_bytes'] / 1e9:.1f} GB, load {card['load_average'][0]:.2f}"
    ]
    return lines + [f"{drive['path']}: {Drive(**drive).describe()}" for drive in card["drives"]]
