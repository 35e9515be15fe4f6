"""Tasks: prompts, reference answers and a checker. A task function returns a `Task`; YAML names it by `fn`.

task: {fn: signs, count: 5}                                   a bundled task
task: {fn: data, path: mine.jsonl, prompt: q, answer: a}      your own data
task: {fn: "my_task.py:make", size: 3}                        your own function
"""

from collections.abc import Callable

from rl_backspace.tasks.arithmetic import arithmetic
from rl_backspace.tasks.countdown import countdown, games
from rl_backspace.tasks.data import data
from rl_backspace.tasks.graph import graph
from rl_backspace.tasks.signs import signs
from rl_backspace.tasks.sudoku import sudoku
from rl_backspace.tasks.task import Row, Task, split_of
from rl_backspace.tasks.typos import typos

BUNDLED: dict[str, Callable[..., Task]] = {
    "signs": signs,
    "arithmetic": arithmetic,
    "countdown": countdown,
    "games": games,
    "sudoku": sudoku,
    "graph": graph,
    "typos": typos,
    "data": data,
}

__all__ = [
    "BUNDLED",
    "Row",
    "Task",
    "arithmetic",
    "countdown",
    "data",
    "games",
    "graph",
    "signs",
    "split_of",
    "sudoku",
    "typos",
]
