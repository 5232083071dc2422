"""A model's metadata: GGUF keys, read by type.  Nobody looks at a value before its type is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.storage.gguf_cursor import LazyArray

MOST_INTEGER = (1 << 63) - 1

Default = TypeVar("Default")


class _Required:
    """The default of keys without one."""


REQUIRED = _Required()


def excerpt(value: object) -> str:
    """A value for an error message: one line, no control characters, not long."""
    text = f"an array of {value.count:,} values" if isinstance(value, LazyArray) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Metadata(Mapping[str, Any]):
    """GGUF keys and values; each accessor raises FormatError when the value is of another type, or out of range.

    Arrays of more than `EAGER_ELEMENTS` are read from the file at each access, so that a vocabulary occupies memory
    only while somebody holds it.  A key without a default is required; with ``default=None`` it may be absent.

    Parameters
    ----------
    values : mapping of str to value
    where : str
        The file, for error messages.

    Examples
    --------
    >>> Metadata({"general.alignment": 64}).integer("general.alignment", 32, least=8)
    64
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values: Mapping[str, Any] = values._values if isinstance(values, Metadata) else values
        self._where = f"{where}: " if where else ""

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return value.load() if isinstance(value, LazyArray) else value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _error(self, key: str, expected: str) -> FormatError:
        found = f"is {excerpt(self._values[key])}" if key in self._values else "is missing"
        return FormatError(f"{self._where}metadata key {key} {found}, expected {expected}")

    def is_array(self, key: str) -> bool:
        """Whether the key is there and holds a list."""
        return isinstance(self._values.get(key), (LazyArray, list, tuple, np.ndarray))

    def length(self, key: str) -> int:
        """Elements of an array, without loading it; 0 when the key is absent."""
        if key not in self._values:
            return 0
        if not self.is_array(key):
            raise self._error(key, "an array")
        value = self._values[key]
        return value.count if isinstance(value, LazyArray) else len(value)

    # ---- scalars ----

    def integer(
        self,
        key: str,
        default: Default | _Required = REQUIRED,
        *,
        least: int = 0,
        most: int = MOST_INTEGER,
        expected: str | None = None,
    ) -> int | Default:
        """An integer in [least, most]; `expected` is how errors call that."""
        if key not in self._values and not isinstance(default, _Required):
            return default
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            bounds = f"from {least}" if most == MOST_INTEGER else f"from {least} to {most}"
            raise self._error(key, expected or f"an integer {bounds}")
        return value

    def number(
        self, key: str, default: Default | _Required = REQUIRED, *, least: float = -math.inf, most: float = math.inf
    ) -> float | Default:
        """A finite number in [least, most]."""
        if key not in self._values and not isinstance(default, _Required):
            return default
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            bounds = {(-math.inf, math.inf): "a number", (0, math.inf): "a number from 0"}
            raise self._error(key, bounds.get((least, most), f"a number from {least:g} to {most:g}"))
        if not math.isfinite(value):
            raise self._error(key, "a finite number")
        return float(value)

    def text(self, key: str, default: Default | _Required = REQUIRED) -> str | Default:
        """A string."""
        if key not in self._values and not isinstance(default, _Required):
            return default
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self._error(key, "a text")
        return value

    def flag(self, key: str, default: Default | _Required = REQUIRED) -> bool | Default:
        """A truth value."""
        if key not in self._values and not isinstance(default, _Required):
            return default
        value = self._values.get(key)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    # ---- arrays ----

    def _array(self, key: str, length: int | None, of: str) -> Sequence[Any] | np.ndarray:
        if not self.is_array(key) or (length is not None and self.length(key) != length):
            raise self._error(key, f"a list of {of}" if length is None else f"a list of {length} {of}")
        found: Sequence[Any] | np.ndarray = self[key]
        return found

    def _typed(self, key: str, length: int | None, of: str, kinds: str) -> np.ndarray:
        found = self._array(key, length, of)
        if not isinstance(found, np.ndarray) and not all(isinstance(item, (bool, int, float)) for item in found):
            raise self._error(key, f"a list of {of}")
        values = np.array(found) if len(found) else np.zeros(0, {"b": bool}.get(kinds, np.int64))
        if values.ndim != 1 or values.dtype.kind not in kinds:
            raise self._error(key, f"a list of {of}")
        return values

    def integers(
        self, key: str, default: Default | _Required = REQUIRED, *, length: int | None = None
    ) -> np.ndarray | Default:
        """int64 [length]"""
        if key not in self._values and not isinstance(default, _Required):
            return default
        values = self._typed(key, length, "integers", "iu")
        if values.dtype.kind == "u" and (values > MOST_INTEGER).any():
            raise self._error(key, "a list of integers of 64 bits")
        return values.astype(np.int64)

    def numbers(
        self, key: str, default: Default | _Required = REQUIRED, *, length: int | None = None
    ) -> np.ndarray | Default:
        """float64 [length], finite."""
        if key not in self._values and not isinstance(default, _Required):
            return default
        values = self._typed(key, length, "numbers", "iuf").astype(np.float64)
        if not np.isfinite(values).all():
            raise self._error(key, "a list of finite numbers")
        return values

    def flags(
        self, key: str, default: Default | _Required = REQUIRED, *, length: int | None = None
    ) -> np.ndarray | Default:
        """bool [length]"""
        if key not in self._values and not isinstance(default, _Required):
            return default
        return self._typed(key, length, "truth values", "b")

    def texts(
        self, key: str, default: Default | _Required = REQUIRED, *, length: int | None = None
    ) -> list[str] | Default:
        """A list of strings."""
        if key not in self._values and not isinstance(default, _Required):
            return default
        found = self._array(key, length, "texts")
        if not all(isinstance(item, str) for item in found):
            raise self._error(key, "a list of texts")
        return list(found)
