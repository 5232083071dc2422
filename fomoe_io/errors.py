"""Errors that a user can mend: one line that says what, where and why, and the command that fixes it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with what is not printable escaped: names and metadata come from files, and may control a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FomoeError(Exception):
    """Base of all errors of this package.  What is not printable in its texts is escaped.

    Parameters
    ----------
    message : str
        What is wrong, where, and the likely cause, in one line.
    hint : str, optional
        The command or option that mends it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(message)
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.hint}" if self.hint else self.message


class FormatError(FomoeError):
    """A GGUF file that is damaged, hostile or of an unsupported kind."""


class StoreError(FomoeError):
    """A store that is damaged, incomplete or of another model."""


class ReadError(FomoeError):
    """A read failed while the model was running."""


class ComputeError(FomoeError):
    """What a model computed is no number."""


class BudgetError(FomoeError):
    """A memory budget that is too small.

    Attributes
    ----------
    smallest_bytes : int
        The least that works; 0 where that is not known.
    """

    smallest_bytes = 0


class DeviceError(FomoeError):
    """A GPU or its driver refused a call."""


class UsageError(FomoeError):
    """Arguments that do not go together."""
