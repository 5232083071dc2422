"""Sizes, rates and times, read and written."""

from __future__ import annotations

import re

from fomoe_io.errors import UsageError

_SUFFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `512M` or `16G` (binary multiples, as llama.cpp's flags have them).

    Raises
    ------
    UsageError
        When the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no size", hint="a number with K, M, G or T, such as 16G")
    return int(float(match[1]) * 1024 ** _SUFFIXES[match[2].upper()])


def parse_rate(text: str) -> float:
    """Bytes a second, such as `7G` or `500M`: decimal multiples, as drives' data sheets have them.

    Raises
    ------
    UsageError
        When the text is no rate.
    """
    match = _SIZE.fullmatch(text.strip().removesuffix("/s"))
    if match is None or not float(match[1]):
        raise UsageError(f"{text!r} is no rate", hint="bytes a second with M or G, such as 7G")
    return float(match[1]) * 1000.0 ** _SUFFIXES[match[2].upper()]


def format_bytes(count: float) -> str:
    """`1.23 GB`, `45.6 MB`: decimal multiples, as drives and fio's parentheses have them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def format_rate(bytes_per_second: float) -> str:
    """`1.23 GB/s`."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `3m07s`, `2h05m`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
