"""fomoe-doctor: what of this machine helps or hinders, and the command that mends it."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe_io import commands
from fomoe_io._uring import LIBURING_VERSION
from fomoe_io.cli.common import run_command
from fomoe_io.cli.parser import Parser, checked, new_parser, package_version
from fomoe_io.config import device_name
from fomoe_io.cpu import dot_library
from fomoe_io.errors import DeviceError, FomoeError, UsageError, printable
from fomoe_io.ram_budget import RAM_SHARE
from fomoe_io.storage.manifest import MANIFEST
from fomoe_io.storage.reader import ALIGNMENT, IO_URING_FIX, aligned_memory, open_reader, probe_modes
from fomoe_io.storage.store import Store
from fomoe_io.system import memory
from fomoe_io.system.system_card import drive_of, processor, system_card
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io.gpu.device import DeviceInfo

PROGRAM = "fomoe-doctor"
OK, WARN, FAIL = "OK", "WARN", "FAIL"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
COOP_KERNEL = (5, 19)
"""IORING_SETUP_COOP_TASKRUN."""
READ_KERNEL = (5, 6)
"""IORING_OP_READ."""
TRIED_BUFFER_BYTES = 64 << 20
LEAST_LOCKED_BYTES = 1 << 20
"""A ring of its own takes some hundred KiB."""
LEAST_MEMORY_BYTES = 1 << 30
GPU_NODES = ("/dev/kfd", "/dev/nvidia0")
"""What the drivers of AMD and NVIDIA make."""
GOOD_FILE_SYSTEMS = "ext4 or xfs"
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
VIRTUAL_DRIVES = ("vd", "xvd", "loop", "nbd", "zram")
"""Whether these spin is made up by the host, or the kernel's default."""
PACKAGES = ("numpy", "gguf", "tokenizers", "jinja2", "xxhash", "libggml-python")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes
    ----------
    name : str
    status : {"OK", "WARN", "FAIL"}
        WARN: it runs, slower than it could.  FAIL: it does not run.
    found : str
    fix : str
        The command that mends it; empty when there is nothing to mend.
    """

    name: str
    status: str
    found: str
    fix: str = ""


# ---- kernel ----


def check_kernel(release: str) -> Check:
    """Version of the kernel, such as "6.8.0-31-generic"."""
    match = re.match(r"(\d+)\.(\d+)", release)
    number = (int(match[1]), int(match[2])) if match else (0, 0)
    if number < READ_KERNEL:
        return Check("kernel", WARN, f"Linux {release}: no reads by io_uring before 5.6", "install a kernel >= 5.19")
    if number < COOP_KERNEL:
        found = f"Linux {release}: before 5.19, completions interrupt the reader"
        return Check("kernel", WARN, found, "install a kernel >= 5.19")
    return Check("kernel", OK, f"Linux {release}")


def check_io_uring(disabled: str, modes: dict[str, str]) -> Check:
    """The sysctl's value, and what happened to a real read in every mode (reader.probe_modes)."""
    working = [mode for mode, problem in modes.items() if not problem]
    refused = "; ".join(f"{mode}: {problem}" for mode, problem in modes.items() if problem)
    if not working:
        cause, fix = _why_no_ring(disabled, set(modes.values()))
        return Check("io_uring", WARN, f"{cause} (pread threads read instead): {refused}", fix)
    choice = "coop" if "coop" in working else "plain"
    reason = {
        "coop": "completions wait for the reader's next call instead of interrupting it; any thread may read",
        "plain": "the kernel has no cooperative completions",
    }[choice]
    found = f"{', '.join(working)} read a file; {choice} is used: {reason}"
    return Check("io_uring", OK, f"{found}{f' (not here: {refused})' if refused else ''}")


def _why_no_ring(disabled: str, problems: set[str]) -> tuple[str, str]:
    """(cause, fix) where no mode of the ring has read the file."""
    if disabled in ("1", "2"):
        return "forbidden by the system", IO_URING_FIX
    if any("wrong bytes" in problem for problem in problems):
        return "the kernel reads files of this file system wrongly by it", f"a store on {GOOD_FILE_SYSTEMS}"
    if any(os.strerror(errno.ENOMEM) in problem for problem in problems):
        return "no memory may be locked for it", "ulimit -l unlimited"
    if problems <= {os.strerror(errno.EINVAL), os.strerror(errno.EOPNOTSUPP)}:
        return "it does not read files of this file system", f"a store on {GOOD_FILE_SYSTEMS}"
    return "forbidden", "allow io_uring in the container (seccomp profile)"


def check_locked_memory(limit: int, registered: bool, problem: str) -> Check:
    """RLIMIT_MEMLOCK in bytes (-1: none), and whether TRIED_BUFFER_BYTES could be registered."""
    text = "no limit" if limit == resource.RLIM_INFINITY else format_bytes(limit)
    if registered:
        return Check("locked memory", OK, f"{text}; {format_bytes(TRIED_BUFFER_BYTES)} of buffers were registered")
    if not problem and (limit == resource.RLIM_INFINITY or limit >= LEAST_LOCKED_BYTES):
        return Check("locked memory", OK, f"{text}; of no use without io_uring")
    found = f"{text}; buffers cannot be registered, each read pins its own pages: {problem}"
    if not problem:
        found = f"{text}: too little for io_uring's own buffers"
    user = os.environ.get("USER", "*")
    fix = f"echo '{user} - memlock unlimited' | sudo tee /etc/security/limits.d/fomoe.conf, then log in again"
    return Check("locked memory", WARN, found, fix)


def check_huge_pages(text: str) -> Check:
    """Contents of transparent_hugepage/enabled."""
    choice = text[text.find("[") + 1 : text.find("]")] if "[" in text else ""
    if choice in ("always", "madvise"):
        return Check("huge pages", OK, choice)
    return Check(
        "huge pages",
        WARN,
        f"{choice or 'not in this kernel'}: weights take more of the processor's address translation",
        f"echo madvise | sudo tee {HUGE_PAGES}" if choice else "",
    )


# ---- storage ----


@contextmanager
def probe_file(place: Path) -> Iterator[Path]:
    """A file to read at a place: itself, a temporary one in a directory, or the largest one there."""
    if place.is_file() and place.stat().st_size:
        yield place
        return
    if not place.is_dir():
        raise UsageError(f"{place} is neither a directory nor a file with something in it")
    try:
        stream = tempfile.NamedTemporaryFile(dir=place, prefix=".fomoe-doctor.")  # noqa: SIM115
    except OSError:
        files = [path for path in place.iterdir() if path.is_file() and path.stat().st_size]
        if not files:
            raise UsageError(f"{place} is not writable and has no file to read") from None
        yield max(files, key=lambda path: path.stat().st_size)
        return
    with stream:
        stream.write(os.urandom(ALIGNMENT * 16))
        stream.flush()
        os.fsync(stream.fileno())
        yield Path(stream.name)


def check_direct(path: Path) -> Check:
    """A real O_DIRECT read."""
    kind = drive_of(path).file_system or "a file system that is not told here"
    with open_reader([path], depth=1) as reader:
        memory_ = aligned_memory(reader.block_bytes, huge_pages=False)
        try:
            reader.read_into([(0, 0, memory_.address, reader.block_bytes)])
        except FomoeError as error:
            return Check("O_DIRECT", FAIL, error.message, error.hint or "")
        if kind in MEMORY_FILE_SYSTEMS:
            found = f"{kind} keeps files in memory: no drive is read, and nothing is saved by reading experts from it"
            return Check("O_DIRECT", WARN, found, f"a store on a drive, {GOOD_FILE_SYSTEMS}")
        if not reader.direct:
            return Check("O_DIRECT", WARN, "; ".join(reader.notes) or kind, f"a store on {GOOD_FILE_SYSTEMS}")
        blocks = f" in blocks of {reader.block_bytes:,} bytes" if reader.block_bytes > ALIGNMENT else ""
    return Check("O_DIRECT", OK, f"works on {kind}{blocks}")


def check_model(place: Path, store: Store) -> Check:
    """Whether the model at hand runs, and what this machine's memory holds of it."""
    from fomoe_io.cli.forecast import needs_of

    try:
        needs = needs_of(place, store=store)
    except FomoeError as error:
        return Check("model", FAIL, error.message, error.hint or "")
    available = memory.available_bytes()
    size = format_bytes(sum(store.file_bytes))
    found = f"{store.model_name}, {store.kind}, {size}: at least {format_bytes(needs.smallest_bytes)} of memory"
    if needs.smallest_bytes > available:
        found = f"{found}, and {format_bytes(available)} are available"
        return Check("model", FAIL, found, "a smaller context (-c 1024), or end other programs")
    share = needs.share(int(RAM_SHARE * available))
    found = f"{found}; {RAM_SHARE:.0%} of what is available holds {share:.0%} of its experts (fomoe plan: how fast)"
    if store.lost_copies:
        return Check("model", WARN, f"{found}; {store.lost_copies[0]}", f"fomoe-layout verify {place}")
    return Check("model", OK, found)


def check_drive(path: Path) -> Check:
    """The drive: kind, scheduler, link."""
    drive = drive_of(path)
    if drive.rotational and not drive.device.startswith(VIRTUAL_DRIVES):
        return Check("drive", WARN, f"{drive.describe()}: a spinning disk", "pack the store to an NVMe drive")
    if drive.device.startswith("nvme") and drive.scheduler not in ("", "none"):
        fix = f"echo none | sudo tee /sys/block/{drive.device}/queue/scheduler"
        return Check("drive", WARN, f"{drive.describe()}: a scheduler costs an NVMe drive time", fix)
    if drive.link and drive.link != drive.link_limit:
        found = f"{drive.describe()}: its link could be {drive.link_limit}"
        return Check("drive", WARN, found, "move the drive to a slot with that link, or look at the BIOS settings")
    return Check("drive", OK, drive.describe())


# ---- compute ----


def check_memory() -> Check:
    """What is free."""
    available = memory.available_bytes()
    found = f"{format_bytes(available)} available"
    if available < LEAST_MEMORY_BYTES:
        fix = "end other programs, or raise the container's limit"
        return Check("memory", WARN, f"{found}: little room for experts", fix)
    return Check("memory", OK, found)


def check_processor() -> Check:
    """Processor and the kernels that compute on it."""
    kernels = dot_library.open_kernels("auto").name
    found = f"{processor()}, {len(os.sched_getaffinity(0))} threads, {kernels} kernels"
    if kernels != "ggml" and platform.machine() == "x86_64":
        return Check("processor", WARN, found, "pip install 'libggml-python>=0.20,<0.21'")
    return Check("processor", OK, found)


def check_gpu() -> Check:
    """GPU and driver."""
    from fomoe_io.gpu import device  # loads driver libraries

    try:
        found = device.all_devices()
    except DeviceError as error:
        nodes = [node for node in GPU_NODES if Path(node).exists()]
        if not nodes:
            return Check("GPU", OK, "none: the processor computes")
        return Check(
            "GPU", WARN, f"{', '.join(nodes)} exist, but {error.message}", "install the driver's user libraries"
        )
    return Check("GPU", OK, ", ".join(_described(d) for d in found))


def _described(d: DeviceInfo) -> str:
    note = ", a part of the processor: only by its number" if d.is_integrated else ""
    return f"{d.option} {d.name} ({d.architecture}, {format_bytes(d.memory_bytes)}{note}) by {d.provider}"


def examine_gpu(name: str) -> Iterator[Check]:
    """What the engine takes for granted of a device, tried out."""
    from fomoe_io.gpu import self_test

    for finding in self_test.run(name):
        yield Check(finding.name, finding.status, finding.found, finding.fix)


def check_versions() -> Check:
    """Libraries."""
    found = [f"fomoe_io {package_version()}", f"Python {platform.python_version()}", f"liburing {LIBURING_VERSION}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return Check("libraries", OK, ", ".join(found))


# ---- all of them ----


def _tried_registration(path: Path) -> Check:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    area = aligned_memory(TRIED_BUFFER_BYTES)
    with open_reader([path], depth=1) as reader:
        if reader.name != "uring":
            return check_locked_memory(limit, False, "")
        registered = reader.register_buffers(area.address, TRIED_BUFFER_BYTES)
        return check_locked_memory(limit, registered, reader.registration_error)


def model_at(place: Path) -> Store | None:
    """The model that a place is; None for a directory or a file of another kind.

    Raises
    ------
    FomoeError
        It is one that can't be opened.
    """
    is_model = (place / MANIFEST).exists() if place.is_dir() else place.suffix == ".gguf"
    return Store.open(place) if is_model else None


def examine(place: Path) -> list[Check]:
    """All checks, those of storage for the drive under a place; of a model for the drive with its weights."""
    models: list[Check] = []
    try:
        store = model_at(place)
    except FomoeError as error:
        store, models = None, [Check("model", FAIL, error.message, error.hint or "")]
    if store is not None:
        models = [check_model(place, store)]
        place = max(store.paths, key=lambda path: path.stat().st_size)

    def read(path: Path) -> str:
        return path.read_text().strip() if path.exists() else ""

    with probe_file(place) as path:
        checks: list[Callable[[], Check]] = [
            lambda: check_kernel(platform.release()),
            lambda: check_io_uring(read(IO_URING_DISABLED), probe_modes(path)),
            lambda: _tried_registration(path),
            lambda: check_direct(path),
            lambda: check_drive(path),
            lambda: check_huge_pages(read(HUGE_PAGES)),
            check_memory,
            check_processor,
            check_gpu,
            check_versions,
        ]
        return [*models, *(check() for check in checks)]


def _json(checks: Sequence[Check], place: Path) -> dict[str, Any]:
    return {"checks": [asdict(check) for check in checks], "system": system_card([place])}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 when something fails."""
    return run_command(PROGRAM, _main, argv)


def parser() -> Parser:
    """The command line."""
    p = new_parser(PROGRAM, "Look at this machine: what helps, what hinders, and the command that mends it.")
    p.add_argument("place", nargs="?", type=Path, default=Path(), metavar="PATH", help="store, GGUF or directory")
    p.add_argument("--json", action="store_true", help="for programs")
    p.add_argument("--gpu", action="store_true", help="try out a GPU and its driver instead: a minute at most")
    p.add_argument("--device", type=checked(device_name), metavar="NAME", help="which GPU (with --gpu), such as hip:1")
    return p


def _main(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    if options.device is not None and not options.gpu:
        raise UsageError("--device names the GPU to try out", hint="--gpu --device NAME")
    if options.device == "cpu":
        raise UsageError("--gpu tries out a GPU, and cpu is none", hint="--device auto, hip:0 or cuda:0")
    found = examine_gpu(options.device or "auto") if options.gpu else iter(examine(options.place))
    checks = []
    for check in found:  # a GPU's come one by one
        checks.append(check)
        if not options.json:
            print(printable(f"{check.status:5}{check.name:15}{check.found}"), flush=True)
            if check.fix:
                print(printable(f"{'':5}{'':15}fix: {check.fix}"), flush=True)
    if options.json:
        print(json.dumps(_json(checks, options.place), indent=1))
    return int(any(check.status == FAIL for check in checks))


if __name__ == "__main__":
    sys.exit(commands.doctor())
