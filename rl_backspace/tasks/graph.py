"""Star graph: find the one way from the middle to a goal, node by node."""

from __future__ import annotations

import itertools
import random
import string

from rl_backspace.errors import UserError
from rl_backspace.tasks.task import Row, Task, generate

NODES = string.ascii_letters


def graph(
    arms: int = 4,
    length: int = 4,
    nodes: int = 26,
    train: int = 20_000,
    test: int = 1024,
    seed: int = 0,
) -> Task:
    """`bd ma ab mc m>d:` asks for `abd`: arms go out from `m`, listed edge by edge, and one of them ends at `d`.

    The task at which next-token prediction is known to fail (Bachmann & Nagarajan 2024, arXiv:2403.06963): the first
    node is a guess unless the whole way is found ahead, and each later one is the only edge that goes on. One answer is
    right, so a prefix is alive while it starts that answer.

    Args:
        arms: how many ways lead out of the middle.
        length: nodes of each arm, without the middle.
        nodes: names to choose from, letters; at least arms * length + 1, and at most 52.
        train, test: how many prompts of each split.
    """
    if arms < 1 or length < 1:
        raise UserError(f"graph: got arms={arms}, length={length}; expected both from 1 up")
    if arms * length >= len(NODES):
        raise UserError(f"graph: got {arms} arms of {length}; there are names for less than {len(NODES)} in all")
    if not arms * length < nodes <= len(NODES):
        raise UserError(
            f"graph: got nodes={nodes}; expected more than {arms * length}, for {arms} arms of {length}, and at most "
            f"{len(NODES)}"
        )

    def draw(rng: random.Random) -> Row:
        middle, *others = rng.sample(NODES[:nodes], 1 + arms * length)
        ways = [others[start : start + length] for start in range(0, arms * length, length)]
        edges = ["".join(edge) for way in ways for edge in itertools.pairwise([middle, *way])]
        rng.shuffle(edges)
        way = rng.choice(ways)
        return {"prompt": f"{' '.join(edges)} {middle}>{way[-1]}:", "answer": "".join(way)}

    return Task(*generate(draw, train, test, seed))
