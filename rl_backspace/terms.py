"""Reward terms: the functions that YAML names, wrapped so that a bad one is named and stopped.

`rewards/` holds the bundled functions; this is the seam between them and TRL, which calls a term like any of
its own reward functions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from rl_backspace.config import Reward
from rl_backspace.errors import UserError, nearest, one_line
from rl_backspace.plugins import bind, resolve, signature
from rl_backspace.semantics import Rules
from rl_backspace.tasks import Task

Term = Callable[..., Any]
FROM_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
INPUTS = (*FROM_TRL, "rows", "actions", "deletes", "ends", "task", "rules")
"""What a function may ask for by name, besides the task's columns."""
TAKEN = (*INPUTS, "completion")  # TRL drops a column of this name


def load_terms(rewards: Mapping[str, Reward], task: Task | None, rules: Rules | None) -> tuple[list[Term], list[float]]:
    """The terms and their weights, in the file's order. A function that asks for `task` or `rules` gets them.

    Raises:
        UserError: every function that cannot be loaded or does not take its kwargs, a line each.
    """
    terms: list[Term] = []
    problems = [
        f"task: a column is called {column!r}, by which rewards know something else; rename it in your data"
        for column in (task.train[0] if task else ())
        if column in TAKEN
    ]
    for name, reward in rewards.items():
        where = f"rewards.{name}"
        try:
            function = resolve(reward.fn, f"{where}.fn", bundled="rl_backspace.rewards")
            bind(function, reward.kwargs, f"{where}.kwargs")
            if task is not None:
                _check_inputs(function, reward, task, where)
            terms.append(make_term(name, function, reward, {"task": task, "rules": rules}))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return terms, [reward.weight for reward in rewards.values()]


def _check_inputs(function: Callable[..., Any], reward: Reward, task: Task, where: str) -> None:
    """Refuse a function that cannot be called because it asks for what nobody gives it."""
    known = [*INPUTS, *task.train[0], *reward.kwargs]
    for name, parameter in signature(function, f"{where}.fn").items():
        optional = parameter.default is not parameter.empty
        if optional or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in known:
            continue
        raise UserError(
            f"{where}: {reward.fn} asks for {name!r}, which is no column of the task{nearest(name, known)}; "
            f"there are {', '.join(dict.fromkeys(known))}"
        )


def make_term(name: str, function: Callable[..., Any], reward: Reward, shared: Mapping[str, Any]) -> Term:
    """A function in TRL's signature, called `name`, sync or async as the plug-in is."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def arguments(inputs: dict[str, Any]) -> dict[str, Any]:
        everything = {**inputs, **shared, **reward.kwargs}
        return everything if takes_all else {key: value for key, value in everything.items() if key in parameters}

    def checked(values: Any, inputs: dict[str, Any]) -> list[float | None]:
        return _checked(values, len(inputs["completions"]), name, reward.fn)

    if is_async_callable(function):

        async def term(**inputs: Any) -> list[float | None]:
            try:
                values = await function(**arguments(inputs))
            except UserError:  # the task's own functions name themselves
                raise
            except Exception as error:
                raise _raised(name, reward.fn, error) from error
            return checked(values, inputs)
    else:

        def term(**inputs: Any) -> list[float | None]:  # type: ignore[misc]
            try:
                values = function(**arguments(inputs))
            except UserError:
                raise
            except Exception as error:
                raise _raised(name, reward.fn, error) from error
            return checked(values, inputs)

    term.__name__ = name
    return term


def is_async_callable(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an async function, or an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _raised(name: str, fn: str, error: Exception) -> UserError:
    return UserError(f"rewards.{name}: {fn} raised {one_line(error)}")


def _checked(values: Any, expected: int, name: str, fn: str) -> list[float | None]:
    """The plug-in's values, once they are a list of numbers or None of the right length."""
    try:
        values = list(values)
    except TypeError:
        raise UserError(
            f"rewards.{name}: {fn} returned a {type(values).__name__}; expected a list of numbers"
        ) from None
    if len(values) != expected:
        raise UserError(
            f"rewards.{name}: {fn} returned {len(values)} rewards for {expected} completions; give one for each"
        )
    checked: list[float | None] = []
    for row, value in enumerate(values):
        if value is not None:
            try:
                value = float(value) if not isinstance(value, str) else math.nan
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise UserError(
                    f"rewards.{name}: {fn} returned {values[row]!r} for row {row}; expected a finite number or None"
                )
        checked.append(value)
    return checked
