"""Typing on a bad keyboard: a control whose ceiling is known, with the delete token and without."""

from __future__ import annotations

import random
import string

from rl_backspace.errors import UserError
from rl_backspace.tasks.task import Row, Task, generate


def typos(length: int = 8, rate: float = 0.083, train: int = 20_000, test: int = 1024, seed: int = 0) -> Task:
    """`qhgmzeka:` asks for the same letters; the keyboard swaps each for another one with probability `rate`.

    Whoever cannot delete gets at most (1 - rate)^length of the answers right, half of them by default; whoever
    deletes perfectly gets all.

    Args:
        length: how many letters.
        rate: share of typed letters that the keyboard swaps, at most 0.9: beyond, erring on purpose would pay.
        train, test: how many prompts of each split.
    """
    if length < 1 or not 0 <= rate <= 0.9:
        raise UserError(f"typos: got length={length}, rate={rate}; expected length >= 1 and 0 <= rate <= 0.9")

    def draw(rng: random.Random) -> Row:
        letters = "".join(rng.choice(string.ascii_lowercase) for _ in range(length))
        return {"prompt": f"{letters}:", "answer": letters}

    return Task(*generate(draw, train, test, seed), typo_rate=rate, ceiling=(1 - rate) ** length)
