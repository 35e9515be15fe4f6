"""Reward terms: the functions that YAML names, wrapped so that a bad one is named and stopped.

`rewards/` holds the bundled functions; this is the seam between them and TRL, which calls a term like any of
its own reward functions.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerState

from rl_backspace.config import Reward
from rl_backspace.engine import Rollout
from rl_backspace.errors import UserError, nearest, one_line
from rl_backspace.plugins import bind, resolve, signature
from rl_backspace.policy import Policy
from rl_backspace.tasks import Row, Task

Term = Callable[..., Any]
"""A reward in TRL's signature, one number per row; `term.latest` keeps what it last gave, per action where it does."""
Value = float | list[float] | None
"""Of one rollout: a number, one for each of its actions, or None where there is nothing to say."""
FROM_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
INPUTS = (*FROM_TRL, "rows", "actions", "deletes", "ends", "task", "rules", "decode")
"""What a function may ask for by name, besides the task's columns."""
TAKEN = (*INPUTS, "completion")  # TRL drops a column of this name


def load_terms(
    rewards: Mapping[str, Reward], task: Task | None, policy: Policy | None
) -> tuple[list[Term], list[float]]:
    """The terms and their weights, in the file's order. A function that asks for `task`, the policy's `rules` or
    `decode` (visible token ids -> text) gets them.

    Raises:
        UserError: every function that cannot be loaded or does not take its kwargs, a line each.
    """
    terms: list[Term] = []
    shared = {"task": task, **({"rules": policy.rules, "decode": policy.text} if policy else {})}
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
            if taken := [key for key in reward.kwargs if key in INPUTS]:
                raise UserError(f"{where}.kwargs.{taken[0]}: every reward gets that from the run; take it out")
            if task is not None:
                _check_inputs(function, reward, task, where)
            terms.append(make_term(name, function, reward, shared))
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
        lengths = [len(actions) for actions in inputs["actions"]] if "actions" in inputs else None
        term.latest = _checked(values, len(inputs["completions"]), lengths, name, reward.fn)  # type: ignore[attr-defined]
        return [sum(value, 0.0) if isinstance(value, list) else value for value in term.latest]  # type: ignore[attr-defined]

    if is_async_callable(function):  # TRL runs those side by side

        async def term(**inputs: Any) -> list[float | None]:
            try:
                running = asyncio.run_coroutine_threadsafe(function(**arguments(inputs)), _loop())
                values = await asyncio.wrap_future(running)
            except UserError:  # the task's own functions name themselves
                raise
            except (Exception, SystemExit) as error:
                raise _raised(name, reward.fn, error) from error
            return checked(values, inputs)
    else:

        def term(**inputs: Any) -> list[float | None]:  # type: ignore[misc]
            try:
                values = function(**arguments(inputs))
            except UserError:
                raise
            except (Exception, SystemExit) as error:
                raise _raised(name, reward.fn, error) from error
            return checked(values, inputs)

    term.__name__ = name
    return term


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all async rewards, in checks and in training: a client or a semaphore belongs to one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def is_async_callable(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an async function, or an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def _finish(awaitable: Any) -> Any:
    return await awaitable


def _raised(name: str, fn: str, error: BaseException) -> UserError:
    return UserError(f"rewards.{name}: {fn} raised {one_line(error)}")


def _checked(values: Any, expected: int, lengths: Sequence[int] | None, name: str, fn: str) -> list[Value]:
    """The plug-in's values, once there is one for each completion: a number, None, or a number for each action."""
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
    checked: list[Value] = []
    for row, value in enumerate(values):
        if hasattr(value, "tolist"):  # an array or a tensor
            value = value.tolist()
        if lengths is not None and isinstance(value, (list, tuple)):
            if len(value) != lengths[row]:
                raise UserError(
                    f"rewards.{name}: {fn} returned {len(value)} numbers for the {lengths[row]} actions of row {row}; "
                    "give one for each, or one number for the row"
                )
            checked.append([_number(part, value, row, name, fn) for part in value])
        else:
            checked.append(None if value is None else _number(value, value, row, name, fn))
    return checked


def _number(part: Any, value: Any, row: int, name: str, fn: str) -> float:
    try:
        number = float(part) if not isinstance(part, str) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = " ".join(repr(value).split())[:80]
        raise UserError(
            f"rewards.{name}: {fn} returned {shown} for row {row}; expected a finite number, None, "
            "or a list with a number for each action"
        )
    return number


def per_action(value: Value, actions: int) -> list[float]:
    """A rollout's reward at each of its actions: what is one number for all of it stands at the last."""
    if isinstance(value, list):
        return value
    return [*[0.0] * (actions - 1), value or 0.0]


def call(
    terms: Sequence[Term], rollouts: list[Rollout], rows: list[Row], policy: Policy, step: int, steps: int
) -> list[list[Value]]:
    """What each term gives these rollouts at step `step` of `steps`, outside of any training."""
    prompts = [row["prompt"] for row in rows]
    inputs = {
        "prompts": prompts,
        "completions": visible_completions(rollouts, prompts, policy),
        "completion_ids": [rollout.visible for rollout in rollouts],
        "trainer_state": TrainerState(global_step=step, max_steps=steps, epoch=step / steps, num_train_epochs=1),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    entries = reward_inputs(rollouts, rows)
    columns = {key: [entry[key] for entry in entries] for key in entries[0] if key not in ("prompt", "completion")}

    for term in terms:
        result = term(**inputs, **columns)
        if inspect.isawaitable(result):
            asyncio.run(_finish(result))
    return [term.latest for term in terms]  # type: ignore[attr-defined]


def reward_inputs(rollouts: list[Rollout], rows: list[Row]) -> list[dict[str, Any]]:
    """What rewards may ask for by name, per rollout: the row's columns and what happened on the way."""
    return [
        {**row, "rows": row, "actions": rollout.actions, "deletes": rollout.deletes, "ends": rollout.end}
        for rollout, row in zip(rollouts, rows, strict=True)
    ]


def visible_completions(rollouts: list[Rollout], prompts: list[Any], policy: Policy) -> list[Any]:
    """The visible text, as chat messages where the prompts are chat messages."""
    texts = [policy.text(rollout.visible) for rollout in rollouts]
    if prompts and isinstance(prompts[0], list):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return texts
