"""Every error a user can meet. The message says what happened; the hint says what to do.

CompressionError            exit code 1
├── UsageError              2   a wrong option, config or plan
├── BudgetError             3   no plan meets the target
├── VerifyError             4   the compressed model differs too much from its input
├── ModelError              5   the input model is not one we can compile
└── RuntimeMissingError     6   ONNX Runtime or the operator library cannot be loaded
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BudgetError",
    "CompressionError",
    "ModelError",
    "RuntimeMissingError",
    "UsageError",
    "VerifyError",
]


class CompressionError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What happened, with the offending values.
        hint: What the user can do about it; may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CompressionError):
    """An option, a configuration file or a plan asks for something impossible."""

    exit_code = 2


class BudgetError(CompressionError):
    """No plan reaches the asked size or error."""

    exit_code = 3


class VerifyError(CompressionError):
    """The compressed model does not compute what it should."""

    exit_code = 4


class ModelError(CompressionError):
    """The input file or graph is invalid or unsupported."""

    exit_code = 5


class RuntimeMissingError(CompressionError):
    """ONNX Runtime or the operator library is missing or does not fit."""

    exit_code = 6
