"""Language models that can take it back: see README.md, and `semantics` for what a delete means."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_backspace.display import TypingStreamer
    from rl_backspace.engine import Engine, Rollout, Sampling
    from rl_backspace.env import BackspaceEnv
    from rl_backspace.errors import UserError
    from rl_backspace.generation import generate
    from rl_backspace.policy import Policy, load
    from rl_backspace.semantics import Budget, Machine, Rules, replay

_HOME = {
    "BackspaceEnv": "env",
    "Budget": "semantics",
    "Engine": "engine",
    "Machine": "semantics",
    "Policy": "policy",
    "Rollout": "engine",
    "Rules": "semantics",
    "Sampling": "engine",
    "TypingStreamer": "display",
    "UserError": "errors",
    "generate": "generation",
    "load": "policy",
    "replay": "semantics",
}  # what the package offers, and the module it is imported from when it is first asked for
__all__ = [
    "Budget",
    "Engine",
    "Machine",
    "Policy",
    "Rollout",
    "Rules",
    "Sampling",
    "TypingStreamer",
    "UserError",
    "generate",
    "load",
    "replay",
]
with contextlib.suppress(ImportError):
    if importlib.util.find_spec("gymnasium"):
        __all__ += ["BackspaceEnv"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rl_backspace' has no attribute {name!r}")
    if name == "BackspaceEnv" and name not in __all__:
        raise AttributeError("BackspaceEnv needs gymnasium: pip install 'rl-backspace[gym]'")
    return getattr(importlib.import_module(f"rl_backspace.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
