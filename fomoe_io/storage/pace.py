"""The pace of a drive that is not at hand: a bandwidth and a latency that a faster reader is held back to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fomoe_io.errors import UsageError

_PACE = re.compile(r"(\d+(?:\.\d+)?)([KMG])(?:B/s)?,(\d+(?:\.\d+)?)(us|ms)")
_BYTES = {"K": 1e3, "M": 1e6, "G": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3}


@dataclass(frozen=True, slots=True)
class Pace:
    """What a drive gives.

    Attributes
    ----------
    bandwidth : float
        Bytes a second.
    latency_seconds : float
        From a read's submission to its first byte.
    """

    bandwidth: float
    latency_seconds: float

    @classmethod
    def parse(cls, text: str) -> Pace:
        """Of a text such as `14.5G,80us`: decimal multiples, as drives' data sheets have them.

        Raises
        ------
        UsageError
            When the text is no pace.
        """
        match = _PACE.fullmatch(text.strip())
        if match is None or not float(match[1]):
            raise UsageError(f"{text!r} is no pace of a drive", hint="bytes a second and latency, such as 14.5G,80us")
        return cls(float(match[1]) * _BYTES[match[2]], float(match[3]) * _SECONDS[match[4]])

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:g}G,{self.latency_seconds * 1e6:g}us"
