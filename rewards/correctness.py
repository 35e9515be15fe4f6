"""Is the final answer right? Range: 0 to 1. Abuse: none by deleting, since only the final answer counts."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal, InvalidOperation
from typing import Any

_LENIENT = Context(traps=[])  # an answer may be any number; one out of range is infinitely far from the reference


def checked(
    completions: Sequence[Any], task: Any, rows: Sequence[dict[str, Any]], ends: Sequence[str], **_: Any
) -> list[float]:
    """1 when the task's own checker accepts a finished answer, else 0; where several answers are right, any."""
    return [
        float(end == "eos" and task.correct(row, _text(completion)))
        for completion, row, end in zip(completions, rows, ends, strict=True)
    ]


def exact(completions: Sequence[Any], answer: Sequence[str], ends: Sequence[str], **_: Any) -> list[float]:
    """1 when a finished answer equals the reference but for surrounding white space, else 0."""
    return [
        float(end == "eos" and _text(completion).strip() == expected.strip())
        for completion, expected, end in zip(completions, answer, ends, strict=True)
    ]


def numeric(
    completions: Sequence[Any], answer: Sequence[str], ends: Sequence[str], tolerance: float = 0.0, **_: Any
) -> list[float | None]:
    """1 when a finished answer is a number within `tolerance` of the reference; None where that is no number.

    Decimal and exact: with a tolerance of 0 integers of any length differ when one digit does.
    """
    return [
        None
        if (expected := _number(reference)) is None
        else float(
            end == "eos"
            and (got := _number(_text(completion))) is not None
            and _LENIENT.subtract(got, expected).copy_abs() <= Decimal(str(tolerance))
        )
        for completion, reference, end in zip(completions, answer, ends, strict=True)
    ]


def _text(completion: Any) -> str:
    """The text of a completion, plain or as chat messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _number(text: str) -> Decimal | None:
    """A finite number, else None."""
    try:
        number = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
