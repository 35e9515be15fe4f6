"""Countdown: combine all of the numbers, step by step, into the target."""

from __future__ import annotations

import functools
import itertools
import operator
import random
from collections.abc import Callable, Iterator

from rl_backspace.errors import UserError
from rl_backspace.tasks.task import Row, Task, generate

Numbers = tuple[int, ...]
"""What is left to combine, in order of size."""
Way = tuple[str, Numbers]
"""A step as it is written, and the numbers that it leaves."""


def games(
    count: int = 3,
    low: int = 1,
    high: int = 30,
    limit: int = 99,
    train: int = 20_000,
    test: int = 1024,
    seed: int = 0,
) -> Task:
    """The same prompts, and any steps by the rules, until one number is left; the target only if it happens to be.

    For `pretrain`: the last step reaches the target if it can, those before it are drawn from all that are allowed. A
    model that has only seen games that reach the target writes it behind its last step whether that is true or not.
    """
    task = countdown(count, low, high, limit, train, test, seed)
    rng = random.Random(seed)

    def finished(row: Row, text: str) -> bool:
        numbers = _after(tuple(row["numbers"]), text.split(","), row["limit"])
        return numbers is not None and len(numbers) == 1

    def allowed(row: Row, text: str) -> bool:
        return bool(_next(row, text, _hitting))

    def go_on(row: Row, text: str, rng: random.Random) -> str | None:
        return _complete(row, text, rng, _hitting)

    def played(rows: list[Row]) -> list[Row]:
        return [{**row, "answer": go_on(row, "", rng)} for row in rows]

    return Task(played(task.train), played(task.test), correct=finished, alive=allowed, complete=go_on)


def countdown(
    count: int = 3,
    low: int = 1,
    high: int = 30,
    limit: int = 99,
    train: int = 20_000,
    test: int = 1024,
    seed: int = 0,
) -> Task:
    """`3 7 12=43:` asks for steps such as `3*12=36,7+36=43`: each takes two numbers that are there and gives one.

    Every result is a whole number from 1 to `limit`, and every number is used once: the game of Stream of
    Search (Gandhi et al. 2024, arXiv:2404.03683), with its search left to the delete token. A prefix is alive
    while some steps from it reach the target.

    Args:
        count: how many numbers, 2 to 5.
        low, high: range of the numbers, inclusive.
        limit: largest result of a step.
        train, test: how many prompts of each split.
    """
    if not 2 <= count <= 5 or not 1 <= low <= high <= limit:
        raise UserError(
            f"countdown: got count={count}, low={low}, high={high}, limit={limit}; "
            "expected count from 2 to 5 and 1 <= low <= high <= limit"
        )

    def draw(rng: random.Random) -> Row:
        targets: list[int] = []
        while not targets:
            numbers = tuple(sorted(rng.randint(low, high) for _ in range(count)))
            targets = reachable(numbers, limit)
        target = rng.choice(targets)
        prompt = f"{' '.join(map(str, numbers))}={target}:"
        row = {"prompt": prompt, "answer": "", "numbers": list(numbers), "target": target, "limit": limit}
        return {**row, "answer": complete(row, "", rng)}

    return Task(*generate(draw, train, test, seed), correct=correct, alive=alive, complete=complete)


def correct(row: Row, text: str) -> bool:
    """Whether the steps use every number once and end at the target."""
    numbers = _after(tuple(row["numbers"]), text.split(","), row["limit"])
    return numbers == (row["target"],)


def alive(row: Row, text: str) -> bool:
    """Whether the steps so far, and the one that is begun, can still reach the target."""
    return bool(_next(row, text, _winning))


def complete(row: Row, text: str, rng: random.Random) -> str | None:
    """Random steps to the target that start like this."""
    return _complete(row, text, rng, _winning)


def reachable(numbers: Numbers, limit: int) -> list[int]:
    """Every target that some steps from these numbers reach, in order of size."""
    found = _reachable(numbers, limit)
    return [target for target in range(1, limit + 1) if found >> target & 1]


@functools.lru_cache(maxsize=500_000)
def _reachable(numbers: Numbers, limit: int) -> int:
    """The same as a set of bits, which is small enough to keep."""
    if len(numbers) == 1:
        return 1 << numbers[0]
    return functools.reduce(
        operator.or_, (_reachable(rest, limit) for rest in {rest for *_, rest in _results(numbers, limit)}), 0
    )


def _reaches(numbers: Numbers, target: int, limit: int) -> bool:
    return bool(_reachable(numbers, limit) >> target & 1)


def _results(numbers: Numbers, limit: int) -> Iterator[tuple[int, str, int, int, Numbers]]:
    """Every step that the rules allow, a+b and b+a both: left, sign, right, result, and the numbers that it leaves."""
    for i, j in itertools.permutations(range(len(numbers)), 2):
        others = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for sign, result in _operations(numbers[i], numbers[j]):
            if 1 <= result <= limit:
                yield numbers[i], sign, numbers[j], result, tuple(sorted([*others, result]))


@functools.lru_cache(maxsize=10_000)
def _steps(numbers: Numbers, limit: int) -> dict[str, Numbers]:
    """Every step as it is written, with the numbers that it leaves."""
    return {f"{left}{sign}{right}={result}": rest for left, sign, right, result, rest in _results(numbers, limit)}


def _operations(left: int, right: int) -> Iterator[tuple[str, int]]:
    yield "+", left + right
    yield "-", left - right
    yield "*", left * right
    if left % right == 0:
        yield "/", left // right


def _after(numbers: Numbers, steps: list[str], limit: int) -> Numbers | None:
    """The numbers after whole steps, None where one of them breaks the rules."""
    for step in steps:
        if step not in _steps(numbers, limit):
            return None
        numbers = _steps(numbers, limit)[step]
    return numbers


def _winning(ways: list[Way], target: int, limit: int) -> list[Way]:
    """The steps from which the target can be reached."""
    return [(step, rest) for step, rest in ways if _reaches(rest, target, limit)]


def _hitting(ways: list[Way], target: int, limit: int) -> list[Way]:
    """The steps that end at the target, or all of them where none does."""
    return [(step, rest) for step, rest in ways if rest == (target,)] or ways


def _next(row: Row, text: str, worth: Callable[[list[Way], int, int], list[Way]]) -> list[Way]:
    """The steps worth taking that start as the text's last one does; none behind what breaks the rules."""
    *done, begun = text.split(",")
    numbers = _after(tuple(row["numbers"]), done, row["limit"])
    ways = [] if numbers is None else [way for way in _steps(numbers, row["limit"]).items() if way[0].startswith(begun)]
    return worth(ways, row["target"], row["limit"])


def _complete(row: Row, text: str, rng: random.Random, worth: Callable[[list[Way], int, int], list[Way]]) -> str | None:
    """Random steps worth taking that start like this, until one number is left; None where there are none."""
    left = len(row["numbers"]) - text.count(",") - 1  # to take
    for _ in range(left):
        ways = _next(row, text, worth)
        if not ways:
            return None
        text = ",".join([*text.split(",")[:-1], rng.choice(ways)[0], ""])
    return text.removesuffix(",") if left > 0 else None
