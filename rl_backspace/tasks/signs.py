"""Sign choice: given numbers and a target, choose + or - before each number so that the sum is the target."""

from __future__ import annotations

import functools
import random

from rl_backspace.errors import UserError
from rl_backspace.tasks.task import Row, Task, generate

VALUE = {"+": 1, "-": -1}


def signs(count: int = 5, low: int = 1, high: int = 9, train: int = 20_000, test: int = 1024, seed: int = 0) -> Task:
    """A search task: `3 5 2 9 4=7:` asks for five signs, such as `++-+-`... any that reach the target count.

    A prefix is alive while some choice of the remaining signs reaches the target.

    Args:
        count: how many numbers.
        low, high: range of the numbers, inclusive.
        train, test: how many prompts of each split.
    """
    if count < 1 or low < 0 or high < low:
        raise UserError(f"signs: got count={count}, low={low}, high={high}; expected count >= 1 and 0 <= low <= high")

    def draw(rng: random.Random) -> Row:
        numbers = [rng.randint(low, high) for _ in range(count)]
        answer = "".join(rng.choice("+-") for _ in numbers)
        target = _sum(answer, tuple(numbers))
        prompt = f"{' '.join(map(str, numbers))}={target}:"
        return {"prompt": prompt, "answer": answer, "numbers": numbers, "target": target}

    return Task(*generate(draw, train, test, seed), correct=correct, alive=alive, complete=complete)


def correct(row: Row, text: str) -> bool:
    """Whether the signs reach the target."""
    numbers = tuple(row["numbers"])
    return len(text) == len(numbers) and set(text) <= set(VALUE) and _sum(text, numbers) == row["target"]


def alive(row: Row, text: str) -> bool:
    """Whether the signs so far can still reach the target."""
    numbers = tuple(row["numbers"])
    if len(text) > len(numbers) or not set(text) <= set(VALUE):
        return False
    return row["target"] - _sum(text, numbers[: len(text)]) in _reachable(numbers[len(text) :])


def complete(row: Row, text: str, rng: random.Random) -> str | None:
    """A random one of the choices that start like this and reach the target; each is as likely as the others."""
    if not alive(row, text):
        return None
    numbers = tuple(row["numbers"])
    left = row["target"] - _sum(text, numbers[: len(text)])
    for place in range(len(text), len(numbers)):
        ways = [_ways(numbers[place + 1 :], left - VALUE[sign] * numbers[place]) for sign in VALUE]
        (sign,) = rng.choices(list(VALUE), ways)
        text, left = text + sign, left - VALUE[sign] * numbers[place]
    return text


@functools.lru_cache(maxsize=100_000)
def _ways(numbers: tuple[int, ...], total: int) -> int:
    """How many choices of signs reach the total."""
    if not numbers:
        return int(total == 0)
    return sum(_ways(numbers[1:], total - value * numbers[0]) for value in VALUE.values())


def _sum(text: str, numbers: tuple[int, ...]) -> int:
    return sum(VALUE[sign] * number for sign, number in zip(text, numbers, strict=True))


@functools.lru_cache(maxsize=100_000)
def _reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    if not numbers:
        return frozenset([0])
    rest = _reachable(numbers[1:])
    return frozenset(total + sign * numbers[0] for total in rest for sign in (1, -1))
