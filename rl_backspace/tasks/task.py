"""What every task is, and the split that keeps its test rows out of all training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rl_backspace.errors import UserError

Row = dict[str, Any]
"""One example: the columns `prompt` and `answer` (str) and whatever else the task's checker reads."""


def _equals_reference(row: Row, text: str) -> bool:
    return text.strip() == row["answer"].strip()


def _starts_reference(row: Row, text: str) -> bool:
    whole = row["answer"].strip()  # as where the finished answer is compared
    return whole.startswith(text.lstrip()) or text.strip() == whole


@dataclass(frozen=True)
class Task:
    """Prompts with reference answers, and what counts as right.

    Attributes:
        train, test: rows, disjoint in their prompts.
        correct: (row, visible text) -> whether it is a right answer. Default: equal to the reference.
        alive: (row, visible text) -> whether the text can still become a right answer. Where only the
            reference is known (the default), the first deviation from it is the error.
        complete: (row, visible text that is alive, rng) -> a right answer that starts with it, drawn as reference
            answers are, or None where there is none; one that is not right is passed over. Without it, one is found
            by asking `alive` token by token, which is slower, and as likely to find an odd one as a usual one.
        typo_rate: share of typed tokens that the keyboard swaps for another one (`keyboard`).
        ceiling: highest accuracy that a policy can have without deleting, where that is known.
    """

    train: list[Row]
    test: list[Row]
    correct: Callable[[Row, str], bool] = _equals_reference
    alive: Callable[[Row, str], bool] = _starts_reference
    complete: Callable[[Row, str, random.Random], str | None] | None = None
    typo_rate: float = 0.0
    ceiling: float | None = None

    def without_checks(self) -> Task:
        """The same, where nothing is known of prefixes but what the reference answers tell."""
        return replace(self, alive=_starts_reference, complete=None)

    @property
    def tells_errors(self) -> bool:
        """Whether another right answer can be told from an error: its prefixes are checked, or there is but one."""
        return self.alive is not _starts_reference or self.correct is _equals_reference


def split_of(prompt: str) -> str:
    """`test` for one prompt in ten, by its hash: the same for every seed, so that no base model,
    warm-up or RL run ever trains on a prompt that another one tests on."""
    return "test" if hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % 10 == 0 else "train"


def generate(draw: Callable[[random.Random], Row], train: int, test: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draw distinct prompts until both splits are full.

    Raises:
        UserError: the task has too few distinct prompts.
    """
    wanted = {"train": train, "test": test}
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    seen: set[str] = set()
    rng = random.Random(seed)
    misses = 0
    while any(len(rows[split]) < wanted[split] for split in rows):
        row = draw(rng)
        split = split_of(row["prompt"])
        if row["prompt"] in seen or len(rows[split]) >= wanted[split]:
            misses += 1
            if misses > 50 * (train + test) + 10_000:
                found = ", ".join(f"{len(rows[split])} {split}" for split in rows)
                raise UserError(
                    f"the task has too few distinct prompts: found {found}, wanted {train} train and {test} test; "
                    "ask for fewer rows or for larger problems"
                )
            continue
        seen.add(row["prompt"])
        rows[split].append(row)
    return rows["train"], rows["test"]
