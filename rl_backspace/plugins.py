"""Functions that YAML names: bundled ones, `package.module:function` and `file.py:function`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rl_backspace.config import type_problem
from rl_backspace.errors import UserError, nearest, one_line
from rl_backspace.tasks import BUNDLED, Row, Task


def resolve(fn: str, where: str, bundled: str | None = None) -> Callable[..., Any]:
    """The function that `fn` names.

    Args:
        fn: `file.py:function`, `pkg.mod:function`, or `module:function` of the package `bundled`.
        where: the YAML key, for errors.

    Raises:
        UserError: it does not exist, cannot be imported or cannot be called.
    """
    source, _, attribute = fn.rpartition(":")
    if not source or not attribute:
        raise UserError(f"{where}: got {fn!r}; expected 'file.py:function' or 'package.module:function'")
    try:
        module = _module(source, bundled)
    except FileNotFoundError as error:
        raise UserError(
            f"{where}: {fn!r}: no file {source}; paths are relative to where you run the command"
        ) from error
    except (Exception, SystemExit) as error:  # a plug-in may raise anything while it is imported
        raise UserError(f"{where}: {fn!r} cannot be imported: {one_line(error)}") from error
    function = getattr(module, attribute, None)
    if function is None:
        hint = nearest(attribute, [name for name in vars(module) if not name.startswith("_")])
        raise UserError(f"{where}: {fn!r}: {source} has no {attribute!r}{hint}")
    if not callable(function):
        raise UserError(f"{where}: {fn!r} is a {type(function).__name__}; expected a function")
    return function


def _module(source: str, bundled: str | None) -> Any:
    if source.endswith(".py"):
        return _file_module(Path(source))
    if bundled is not None and importlib.util.find_spec(f"{bundled}.{source.split('.')[0]}"):
        return importlib.import_module(f"{bundled}.{source}")
    return importlib.import_module(source)


def _file_module(path: Path) -> Any:
    """A file's module, run once however many functions are taken from it."""
    if not path.is_file():
        raise FileNotFoundError(path)
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    name = f"rl_backspace_plugin_{path.stem}_{digest}"  # files of one name in two folders are two modules
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def bind(function: Callable[..., Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Check that the function takes these keyword arguments, and values of these types where it annotates them.

    Raises:
        UserError: a line for each that it does not take, with the nearest name that it takes.
    """
    parameters = signature(function, where)
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    types = _annotations(function)
    problems = []
    for key, value in kwargs.items():
        if key not in named:  # not even where **kwargs would swallow it: it may be a slip of the pen
            name = getattr(function, "__name__", type(function).__name__)
            problems.append(f"{where}.{key}: unknown; {name} takes {', '.join(named)}{nearest(key, named)}")
        elif key in types and (problem := type_problem(types[key], value)):
            problems.append(f"{where}.{key}: {problem}")
    if problems:
        raise UserError("\n".join(problems))


def signature(function: Callable[..., Any], where: str) -> Mapping[str, inspect.Parameter]:
    """The function's parameters by name.

    Raises:
        UserError: it is compiled and does not tell.
    """
    try:
        return inspect.signature(function).parameters
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error)}; wrap it in a Python function") from error


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotated types that YAML values can be checked against."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation may name anything; then the function checks its arguments itself
        return {}
    return {name: hint for name, hint in hints.items() if _is_plain(hint)}


def _is_plain(annotation: Any) -> bool:
    """Whether values of a type are written in YAML as they are: numbers, text, lists and mappings of them."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return True
    outer = typing.get_origin(annotation) if parts else annotation
    plain = (bool, int, float, str, list, dict, types.NoneType, types.UnionType, typing.Union, typing.Any)
    return outer in plain and all(map(_is_plain, parts))


def load_task(spec: Mapping[str, Any], seed: int) -> Task:
    """The task that a YAML block `{fn: ..., **arguments}` describes.

    Raises:
        UserError: unknown function or argument, or what the task itself refuses.
    """
    fn = spec["fn"]
    if fn in BUNDLED:
        function: Callable[..., Any] = BUNDLED[fn]
    elif ":" in fn:
        function = resolve(fn, "task.fn")
    else:
        raise UserError(
            f"task.fn: got {fn!r}; expected one of {', '.join(BUNDLED)} or 'file.py:function'{nearest(fn, BUNDLED)}"
        )
    arguments = {key: value for key, value in spec.items() if key != "fn"}
    bind(function, arguments, "task")
    if "seed" in signature(function, "task.fn"):
        arguments.setdefault("seed", seed)
    try:
        task = function(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a plug-in may raise anything
        raise UserError(f"task: {fn} raised {one_line(error)}") from error
    if not isinstance(task, Task):
        raise UserError(f"task.fn: {fn!r} returned {type(task).__name__}; expected rl_backspace.tasks.Task")
    for name, kind in (("typo_rate", float), ("ceiling", float | None)):
        if problem := type_problem(kind, getattr(task, name)):
            raise UserError(f"task: {fn} gave a {name}: {problem}")
    train, test = _rows(task.train, fn), _rows(task.test, fn)
    if not train or not test:
        counts = f"{len(train)} train and {len(test)} test rows"
        raise UserError(f"task: {fn} gave {counts}; expected at least one of each")
    columns = dict.fromkeys(column for row in train + test for column in row)
    train, test = ([{column: row.get(column) for column in columns} for row in rows] for rows in (train, test))
    functions: dict[str, Any] = {}
    if fn not in BUNDLED:
        own = [name for name in ("correct", "alive", "complete") if getattr(task, name) is not getattr(Task, name)]
        functions = {name: Guarded(getattr(task, name), name, fn) for name in own}
    return dataclasses.replace(task, train=train, test=test, **functions)


def _rows(rows: Any, fn: str) -> list[Row]:
    """The rows of one split, once each is of use.

    Raises:
        UserError: they are not rows, or one lacks its prompt or its answer.
    """
    try:
        rows = list(rows)
    except TypeError as error:
        raise UserError(f"task: {fn} gave a {type(rows).__name__} for rows; expected a list of them") from error
    for row in rows:
        if not isinstance(row, dict) or not is_prompt(row.get("prompt")) or not isinstance(row.get("answer"), str):
            raise UserError(
                f"task: {fn} gave the row {' '.join(str(row).split())[:80]}; "
                "expected a 'prompt', text or chat messages, and an 'answer', text"
            )
        for column in row:
            if not isinstance(column, str):
                raise UserError(f"task: {fn} gave a row with the column {column!r}; expected text as a column's name")
    return rows


def is_prompt(prompt: Any) -> bool:
    """Whether it is text or chat messages."""
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    return isinstance(prompt, str)


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A plug-in task's function, named when it breaks."""

    function: Callable[..., Any]
    name: str
    fn: str

    def __call__(self, row: Row, text: str, *others: Any) -> Any:
        try:
            return self.function(row, text, *others)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a plug-in may raise anything
            raise UserError(f"task: {self.name!r} of {self.fn} raised {one_line(error)}") from error
