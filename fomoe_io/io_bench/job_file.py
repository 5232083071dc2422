"""fio's job files, as far as their common keys go: an unknown key is an error, never ignored."""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fomoe_io.errors import UsageError
from fomoe_io.io_bench.job import IOJob, Share
from fomoe_io.units import parse_bytes

FIO_ENGINES = {
    "io_uring": "uring",
    "sync": "pread",
    "psync": "pread",
    **{name: name for name in ("auto", "uring", "pread", "mmap", "python-liburing")},
}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """fio's times: `10`, `10s`, `500ms`, `2m`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)?", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no time", hint="a number of seconds, or with us, ms, s, m, h")
    return float(match[1]) * _SECONDS[match[2] or ""]


def parse_flag(text: str) -> bool:
    """fio's booleans; a key without a value is 1."""
    if text not in ("0", "1", ""):
        raise UsageError(f"{text!r} is neither 0 nor 1")
    return text != "0"


def parse_engine(text: str) -> str:
    """fio's name of an engine or ours."""
    if text not in FIO_ENGINES:
        raise UsageError(f"ioengine {text!r} is unknown", hint=", ".join(FIO_ENGINES))
    return FIO_ENGINES[text]


def _integer(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise UsageError(f"{text!r} is no number")
    return int(text)


def _files(text: str) -> tuple[Path, ...]:
    return tuple(Path(name) for name in text.split(":"))


KEYS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "rw": ("rw", str),
    "readwrite": ("rw", str),
    "bs": ("block_bytes", parse_bytes),
    "blocksize": ("block_bytes", parse_bytes),
    "iodepth": ("depth", _integer),
    "numjobs": ("jobs", _integer),
    "runtime": ("runtime_seconds", parse_seconds),
    "ramp_time": ("ramp_seconds", parse_seconds),
    "time_based": ("time_based", parse_flag),
    "size": ("size", Share.parse),
    "offset": ("offset", Share.parse),
    "direct": ("direct", parse_flag),
    "ioengine": ("engine", parse_engine),
    "filename": ("filenames", _files),
    "randseed": ("seed", _integer),
    "fixedbufs": ("fixed_buffers", parse_flag),
    "overwrite": ("overwrite", parse_flag),
    "store": ("store", Path),
    "trace": ("trace", Path),
}
"""Key of a job file -> field of IOJob and how its value is read."""

FIO_DEFAULTS = {"rw": "read", "direct": False, "engine": "pread", "fixed_buffers": False}
"""Where fio's defaults are not ours."""


def read_job_file(path: Path) -> list[list[IOJob]]:
    """Groups of jobs to run side by side, one group after another (`stonewall`, `wait_for_previous`).

    Raises
    ------
    UsageError
        An unknown key, a value that does not parse, or no jobs.
    """
    parser = configparser.RawConfigParser(
        allow_no_value=True, strict=True, delimiters=("=",), comment_prefixes=(";", "#"), default_section="\n"
    )
    try:
        parser.read_string(path.read_text(), str(path))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no job file: {str(error).splitlines()[0]}") from None
    shared = dict(parser.items("global")) if parser.has_section("global") else {}
    groups: list[list[IOJob]] = []
    for section in parser.sections():
        if section == "global":
            continue
        pairs = {**shared, **dict(parser.items(section))}
        alone = any(parse_flag(pairs.pop(key) or "") for key in ("stonewall", "wait_for_previous") if key in pairs)
        for key in ("group_reporting", "thread"):  # jobs are threads, always reported together
            pairs.pop(key, None)
        if alone or not groups:
            groups.append([])
        groups[-1].append(_job(path, section, pairs))
    if not groups:
        raise UsageError(f"{path} has no jobs", hint="a section such as [randread] with its keys")
    return groups


def _job(path: Path, section: str, pairs: Mapping[str, str | None]) -> IOJob:
    values: dict[str, Any] = {"name": section, **FIO_DEFAULTS}
    for key, text in pairs.items():
        if key == "name":
            values["name"] = text
            continue
        if key not in KEYS:
            raise UsageError(f"{path}: [{section}] has an unknown key {key!r}", hint=f"known are {', '.join(KEYS)}")
        name, parse = KEYS[key]
        try:
            values[name] = parse((text or "").strip())
        except UsageError as error:
            raise UsageError(f"{path}: [{section}] {key}: {error.message}", hint=error.hint) from None
    return IOJob(**values)
