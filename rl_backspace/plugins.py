"""Functions that YAML names: bundled ones, `package.module:function` and `file.py:function`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rl_backspace.errors import UserError
from rl_backspace.tasks import BUNDLED, Task


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


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
    except Exception as error:  # a plug-in may raise anything while it is imported
        raise UserError(f"{where}: {fn!r} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if function is None:
        hint = nearest(attribute, [name for name in vars(module) if not name.startswith("_")])
        raise UserError(f"{where}: {fn!r}: {source} has no {attribute!r}{hint}")
    if not callable(function):
        raise UserError(f"{where}: {fn!r} is a {type(function).__name__}; expected a function")
    return function


def _module(source: str, bundled: str | None) -> Any:
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(source)
        spec = importlib.util.spec_from_file_location(f"rl_backspace_plugin_{path.stem}", path.resolve())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    if bundled is not None and importlib.util.find_spec(f"{bundled}.{source.split('.')[0]}"):
        return importlib.import_module(f"{bundled}.{source}")
    return importlib.import_module(source)


def bind(function: Callable[..., Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Check that the function takes these keyword arguments.

    Raises:
        UserError: it does not, with the nearest name that it takes.
    """
    parameters = inspect.signature(function).parameters
    named = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    for key in kwargs:
        if key not in named:  # not even where **kwargs would swallow it: it may be a slip of the pen
            name = getattr(function, "__name__", type(function).__name__)
            raise UserError(f"{where}.{key}: unknown; {name} takes {', '.join(named)}{nearest(key, named)}")


def load_task(spec: Mapping[str, Any], seed: int) -> Task:
    """The task that a YAML block `{fn: ..., **arguments}` describes.

    Raises:
        UserError: unknown function or argument, or what the task itself refuses.
    """
    arguments = {"seed": seed, **{key: value for key, value in spec.items() if key != "fn"}}
    fn = spec["fn"]
    if fn in BUNDLED:
        function: Callable[..., Any] = BUNDLED[fn]
    elif ":" in fn:
        function = resolve(fn, "task.fn")
    else:
        raise UserError(
            f"task.fn: got {fn!r}; expected one of {', '.join(BUNDLED)} or 'file.py:function'{nearest(fn, BUNDLED)}"
        )
    bind(function, arguments, "task")
    try:
        task = function(**arguments)
    except TypeError as error:
        raise UserError(f"task: {fn}: {error}") from error
    if not isinstance(task, Task):
        raise UserError(f"task.fn: {fn!r} returned a {type(task).__name__}; expected a rl_backspace.tasks.Task")
    if not task.train or not task.test:
        raise UserError(f"task: {len(task.train)} train and {len(task.test)} test rows; expected at least one of each")
    return task
