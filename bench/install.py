"""What an installation costs: the sdist and the wheel, each into a clean virtual environment of each Python.

Processor seconds are of pip and all that it starts, dependencies included (from the registry or pip's cache); then the
package must import, name its version and continue a prompt with a model when one is given.  Prints a markdown table.

    python bench/install.py --python python3.11 --python ~/.pyenv/versions/3.13.0/bin/python [--model models/X.gguf]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FOMOE", "PIP_NO_INDEX", "VIRTUAL_ENV"))}


def timed(command: list[str], where: Path, **variables: str) -> tuple[float, float, str]:
    """(processor seconds of it and its children, wall seconds, stdout); ends this program where it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=where, env=CLEAN | variables, capture_output=True, text=True)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, done.stdout


def built(python: str, folder: Path) -> tuple[Path, Path]:
    """(sdist, wheel), as `make dist` makes them: from the tracked files of this tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree = folder / "tree"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.endswith(".gguf"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
            (tree / name).chmod((ROOT / name).stat().st_mode)
    dist = folder / "dist"
    timed([python, "-m", "venv", str(folder / "builder")], folder)
    tool = str(folder / "builder/bin/python")
    timed([tool, "-m", "pip", "install", "-q", "build"], folder)
    timed([tool, "-m", "build", "-o", str(dist), str(tree)], folder, FOMOE_STATIC_LIBURING="1")
    return next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))


def starts(bin_: Path, model: Path | None, where: Path) -> str:
    """What a newcomer does first; what it said last."""
    said = timed([str(bin_ / "fomoe"), "--version"], where)[2].strip()
    timed([str(bin_ / "fomoe-run"), "--help"], where)
    if model is not None:
        run = [str(bin_ / "fomoe-run"), str(model), "-p", "Once upon a time", "-n", "8", "-s", "1", "--no-profile"]
        said = timed([*run, "-q", "--device", "cpu"], where)[2].strip()
    return said.replace("\n", " ")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter (repeat); default: this one")
    parser.add_argument("--model", type=lambda text: Path(text).resolve(), help="a GGUF to continue a prompt with")
    options = parser.parse_args()
    print("| Python | from | CPU seconds | wall seconds | the first words |\n|---|---|---:|---:|---|")
    for python in [str(Path(p).expanduser()) for p in options.python] or [sys.executable]:
        version = subprocess.run([python, "-c", "import platform; print(platform.python_version())"],
            capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            for kind, archive in zip(("sdist", "wheel"), built(python, Path(folder)), strict=True):
                timed([python, "-m", "venv", str(Path(folder) / kind)], Path(folder))
                bin_ = Path(folder) / kind / "bin"
                cpu, wall, _ = timed([str(bin_ / "python"), "-m", "pip", "install", "-q", str(archive)], Path(folder))
                said = starts(bin_, options.model, Path(folder))
                print(f"| {version} | {kind} | {cpu:.1f} | {wall:.1f} | {said} |", flush=True)
    print(f"\n{platform.platform()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
