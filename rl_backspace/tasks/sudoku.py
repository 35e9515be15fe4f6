"""Sudoku of four rows: complete the grid, so that no row, column or quarter holds a digit twice."""

from __future__ import annotations

import functools
import itertools
import random

from rl_backspace.errors import UserError
from rl_backspace.tasks.task import Row, Task, generate

SIDE = 4
CELLS = SIDE * SIDE


def sudoku(givens: int = 5, train: int = 20_000, test: int = 1024, seed: int = 0) -> Task:
    """`..3./4..1/..../.2..:` asks for the whole grid, row by row; every grid that fits is right.

    A prefix is alive while some grid that fits the given digits starts with it.

    Args:
        givens: how many digits are given, 1 to 15; with fewer, more grids fit.
        train, test: how many prompts of each split.
    """
    if not 1 <= givens < CELLS:
        raise UserError(f"sudoku: got givens={givens}; expected 1 to {CELLS - 1} of the {CELLS} cells")

    def draw(rng: random.Random) -> Row:
        grid = rng.choice(grids())
        shown = set(rng.sample(range(CELLS), givens))
        puzzle = _rows("".join(digit if i in shown else "." for i, digit in enumerate(grid)))
        return {"prompt": f"{puzzle}:", "answer": _rows(grid), "puzzle": puzzle}

    return Task(*generate(draw, train, test, seed), correct=correct, alive=alive, complete=complete)


def correct(row: Row, text: str) -> bool:
    """Whether the grid is whole and fits."""
    return text in solutions(row["puzzle"])


def alive(row: Row, text: str) -> bool:
    """Whether a grid that fits starts like this."""
    return any(grid.startswith(text) for grid in solutions(row["puzzle"]))


def complete(row: Row, text: str, rng: random.Random) -> str | None:
    """A random one of the grids that fit and start like this."""
    fitting = [grid for grid in solutions(row["puzzle"]) if grid.startswith(text)]
    return rng.choice(fitting) if fitting else None


@functools.lru_cache(maxsize=100_000)
def solutions(puzzle: str) -> tuple[str, ...]:
    """Every grid that fits the given digits, written as answers are."""
    given = [(i, digit) for i, digit in enumerate(puzzle.replace("/", "")) if digit != "."]
    return tuple(_rows(grid) for grid in grids() if all(grid[i] == digit for i, digit in given))


@functools.cache
def grids() -> tuple[str, ...]:
    """All 288 grids: sixteen digits each."""
    lines = ["".join(line) for line in itertools.permutations("1234")]
    return tuple("".join(rows) for rows in itertools.product(lines, repeat=SIDE) if _is_grid(rows))


def _is_grid(rows: tuple[str, ...]) -> bool:
    columns = all(len(set(column)) == SIDE for column in zip(*rows, strict=True))
    return columns and all(
        len({*rows[top][left : left + 2], *rows[top + 1][left : left + 2]}) == SIDE
        for top, left in itertools.product((0, 2), repeat=2)
    )


def _rows(cells: str) -> str:
    return "/".join(cells[start : start + SIDE] for start in range(0, CELLS, SIDE))
