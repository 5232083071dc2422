"""Errors that a user can mend: one line that says what, where and why, and the command that fixes it."""

from __future__ import annotations


class FomoeError(Exception):
    """Base of all errors of this package.

    Parameters
    ----------
    message : str
        What is wrong, where, and the likely cause, in one line.
    hint : str, optional
        The command or option that mends it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.hint}" if self.hint else self.message


class FormatError(FomoeError):
    """A GGUF file that is damaged, hostile or of an unsupported kind."""


class StoreError(FomoeError):
    """A store that is damaged, incomplete or of another model."""


class ReadError(FomoeError):
    """A read failed while the model was running."""


class BudgetError(FomoeError):
    """A memory budget that is too small."""


class DeviceError(FomoeError):
    """A GPU or its driver refused a call."""


class UsageError(FomoeError):
    """Arguments that do not go together."""
