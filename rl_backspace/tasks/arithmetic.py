"""Integer arithmetic: addition and multiplication, written most significant digit first."""

from __future__ import annotations

import operator
import random

from rl_backspace.errors import UserError
from rl_backspace.tasks.task import Row, Task, generate

OPERATIONS = {"+": operator.add, "*": operator.mul}


def arithmetic(operations: str = "+*", digits: int = 2, train: int = 20_000, test: int = 1024, seed: int = 0) -> Task:
    """`47*86=` asks for `4042`. One answer is right, so a prefix is alive while it starts that answer.

    Args:
        operations: which of + and * to draw from.
        digits: most digits of each operand; lengths are drawn uniformly.
        train, test: how many prompts of each split.
    """
    unknown = set(operations) - set(OPERATIONS)
    if unknown or not operations or digits < 1:
        raise UserError(
            f"arithmetic: got operations={operations!r}, digits={digits}; expected some of '+*' and digits >= 1"
        )

    def operand(rng: random.Random) -> int:
        length = rng.randint(1, digits)
        return rng.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1)

    def draw(rng: random.Random) -> Row:
        sign = rng.choice(operations)
        left, right = operand(rng), operand(rng)
        return {"prompt": f"{left}{sign}{right}=", "answer": str(OPERATIONS[sign](left, right))}

    return Task(*generate(draw, train, test, seed))
