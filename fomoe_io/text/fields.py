"""Metadata keys by type: what a file says is not trusted to be what it should be."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fomoe_io.errors import FormatError

MOST_ELEMENTS = 1 << 21
"""Of a list.  The largest vocabularies have 262,144 tokens and as many merges; a sparse file may claim 30 million."""


class Fields:
    """Typed reading of keys; each method returns None for a key that is absent.

    Parameters
    ----------
    values : mapping
    prefix : str
        Of all keys.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self._values = values
        self._prefix = prefix

    def _error(self, key: str, value: Any, expected: str) -> FormatError:
        return FormatError(f"metadata key {self._prefix}{key} is {reprlib.repr(value)}, expected {expected}")

    def text(self, key: str) -> str | None:
        """A string."""
        value = self._values.get(self._prefix + key)
        if value is not None and not isinstance(value, str):
            raise self._error(key, value, "a text")
        return value

    def flag(self, key: str) -> bool | None:
        """True or false."""
        value = self._values.get(self._prefix + key)
        if value is not None and not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def index(self, key: str, count: int) -> int | None:
        """An integer from 0 to below `count`."""
        value = self._values.get(self._prefix + key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise self._error(key, value, f"an integer from 0 to {count - 1}")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of strings."""
        value = self._list(key, "a list of texts")
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(element, str) for element in value):
            raise self._error(key, value, "a list of texts")
        return value

    def integers(self, key: str) -> list[int] | None:
        """A list of integers."""
        value = self._list(key, "a list of integers")
        if value is None:
            return None
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer):
            return [int(element) for element in value.tolist()]
        if not isinstance(value, list) or not all(type(element) is int for element in value):
            raise self._error(key, value, "a list of integers")
        return value

    def _list(self, key: str, expected: str) -> Any:
        """The value of a key, not loaded when it is too long; long arrays of numbers come as numpy arrays."""
        name = self._prefix + key
        if name not in self._values:
            return None
        length = getattr(self._values, "length", lambda name: len(self._values[name]))
        try:
            count = length(name)
        except TypeError:
            value = self._values[name]
            if value is None:
                return None
            raise self._error(key, value, expected) from None
        if count > MOST_ELEMENTS:
            raise FormatError(f"metadata key {name} has {count:,} elements, at most {MOST_ELEMENTS:,} make sense")
        return self._values[name]
