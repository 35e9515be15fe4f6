"""What a trace means: a stack machine over token ids. Pure Python, no torch.

Words. An *action* is one token id the policy chose, deletes included. A *trace* is the actions of one
rollout. The *visible* sequence is what is left after the deletes. The *context* is what the model was
conditioned on: the prompt, then some of the trace. The *anchor* is the context's last token: its logits
choose the next action. *Depth* is a position in the visible sequence, 0 for the answer's first token.

    memory   context after the prompt             what a delete does to it
    erase    the visible tokens                   cuts it back to where the deleted span began
    hint     the visible tokens and markers       the same, and leaves itself behind as a marker:
                                                  one per depth, gone when an earlier token goes
    keep     the whole trace                      appends itself

    retry    after a delete
    free     anything may be typed again
    ban      a token deleted at a depth may not be typed there again until an earlier token changes

With `ban`, greedy decoding is a depth-first search in which the model prunes, and it always ends.

Prior work is a setting of this: erase/free/token is SequenceMatch's backspace (Cundy & Ermon 2023,
arXiv:2306.05426); keep/answer is [RESET] (Zhang et al. 2024, arXiv:2409.14586); erase/line is
Self-Backtracking (Yang et al. 2025, arXiv:2502.04404); erase/n is RLBF's "backtrack by x" (arXiv:2602.08377).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rl_backspace.errors import UserError

Memory = Literal["erase", "keep", "hint"]
Retry = Literal["free", "ban"]
Unit = int | Literal["token", "line", "answer"]
"""How much one delete takes: `token` (the same as 1), n tokens, back to the last boundary, or everything."""
End = Literal["eos", "length", "budget", "stuck", "stop"]
"""Why a rollout ended: it said so; the answer is full; out of actions; no action was legal; it was told to."""


ACTIONS_PER_TOKEN = 3  # default budget of actions, in answers
SEMANTICS_FILE = "delete.json"  # in a policy's folder: its rules, for `Rules.of`


class IllegalAction(ValueError):
    """An action was replayed that the rules or the budget forbid at that step."""


@dataclass(frozen=True)
class Rules:
    """The delete semantics a policy is trained with; they travel with its adapter.

    Args:
        deletes: delete token id -> unit. Empty for a policy that cannot delete.
        eos: token ids that end the answer. They stay visible, as in Hugging Face's `generate`.
        memory, retry: see the module's table.
        boundaries: token ids that end a line or step, for the unit `line`.
    """

    deletes: Mapping[int, Unit]
    eos: frozenset[int]
    memory: Memory = "erase"
    retry: Retry = "free"
    boundaries: frozenset[int] = frozenset()

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Rules:
        """The rules that a policy was saved with: `tokens` (text -> unit), their `ids` (text -> id), and the rest.

        Raises:
            UserError: something is missing, or is not what rules are made of.
        """
        if problem := _problem(saved):
            raise UserError(f"rules of a delete token: {problem}; give them as {SEMANTICS_FILE} of a policy has them")
        return cls(
            {saved["ids"][text]: unit for text, unit in saved["tokens"].items()},
            frozenset(saved["eos"]),
            saved["memory"],
            saved["retry"],
            frozenset(saved["boundaries"]),
        )


def _problem(saved: Any) -> str:
    """What is wrong with saved rules; empty for nothing."""
    if not isinstance(saved, Mapping):
        return f"got {saved!r}; expected a mapping"
    for key in ("tokens", "ids", "memory", "retry", "boundaries", "eos"):
        if key not in saved:
            return f"{key} is missing"
        wanted: Any = Mapping if key in ("tokens", "ids") else (list, tuple) if key in ("boundaries", "eos") else str
        if not isinstance(saved[key], wanted):
            return f"{key}: got {saved[key]!r}; expected a {'mapping' if wanted is Mapping else 'list or a word'}"
    for key, known in (("memory", get_args(Memory)), ("retry", ("free", "ban"))):
        if saved[key] not in known:
            return f"{key}: got {saved[key]!r}; expected {' or '.join(known)}"
    for text, unit in saved["tokens"].items():
        if unit not in ("token", "line", "answer") and not (_is_count(unit) and unit > 0):
            return f"tokens: got {unit!r} for {text!r}; expected token, line, answer or a number above 0"
    ids = [*(saved["ids"].get(text) for text in saved["tokens"]), *saved["boundaries"], *saved["eos"]]
    wrong = [index for index in ids if not _is_count(index)]
    return f"got {wrong[0]!r} for a token's id; expected a number from 0 up" if wrong else ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Budget:
    """How far one rollout may go, in tokens and actions.

    Args:
        answer: most visible tokens, the end-of-sequence token included (`max_new_tokens`).
        actions: most actions, deletes included. None: as many as `answer`.
        deletes: most deletes. None: no limit of their own; 0: the delete tokens are blocked.
        window: most visible tokens that can still be deleted: a token further back than this from the answer's end
            is final for good. None: all of them can.

    Raises:
        UserError: one of them is too small for any rollout.
    """

    answer: int
    actions: int | None = None
    deletes: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("answer", self.answer, 1),
            ("actions", self.actions, 1),
            ("deletes", self.deletes, 0),
            ("window", self.window, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"budget: got {name}={value}; expected {least} or more")

    @functools.cached_property
    def most_actions(self) -> int:
        return self.answer if self.actions is None else self.actions


@dataclass
class Machine:
    """One rollout, action by action.

    Attributes:
        trace: the actions so far.
        visible: the visible token ids.
        path: the context after the prompt, as indices into `trace`; its last entry is the anchor
            (an empty path: the prompt's last token is).
        tried: for each depth 0..len(visible), the tokens deleted there since an earlier token changed.
        final: how many visible tokens can no longer be deleted, by the budget's window.
        end: why the rollout ended, None while it goes on.
    """

    rules: Rules
    budget: Budget
    trace: list[int] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    tried: list[list[int]] = field(default_factory=lambda: [[]])
    deleted: int = 0
    final: int = 0
    end: End | None = None
    _start: list[int] = field(default_factory=lambda: [0])  # len(path) when each depth was first reached

    def illegal(self) -> list[int]:
        """Token ids that may not be chosen now. Everything else may.

        A delete is illegal on an empty answer, when it would take a final token, when its own budget is spent,
        and as the budget's last action, after which nothing could be typed.
        """
        out = list(self.tried[-1]) if self.rules.retry == "ban" else []
        if self._must_type():
            out.extend(self.rules.deletes)
        elif self.final:
            out.extend(delete for delete in self.rules.deletes if self._is_illegal(delete))
        return out

    def _must_type(self) -> bool:
        return (
            not self.visible or self.deleted == self.budget.deletes or len(self.trace) + 1 >= self.budget.most_actions
        )

    def _is_illegal(self, action: int) -> bool:
        """The same as `action in self.illegal()`, without the list."""
        if action in self.rules.deletes:
            return self._must_type() or self.target(self.rules.deletes[action]) < self.final
        return self.rules.retry == "ban" and action in self.tried[-1]

    def step(self, action: int) -> int | None:
        """Apply one action; the token that enters the context with it, or None when nothing does.

        None means that the context shrank to a prefix of itself, so its anchor's logits are known already
        and the next action needs no forward pass.

        Raises:
            IllegalAction: the rollout has ended, or the action is illegal here.
        """
        if self.end is not None:
            raise IllegalAction(f"action {action} after the rollout ended ({self.end})")
        if self._is_illegal(action):
            raise IllegalAction(f"action {action} at step {len(self.trace)} is illegal here")
        self.trace.append(action)
        enters = self._delete(action) if action in self.rules.deletes else self._type(action)
        if self.end is None and len(self.trace) >= self.budget.most_actions:
            self.end = "budget"
        return enters

    def _type(self, token: int) -> int:
        self.visible.append(token)
        self.path.append(len(self.trace) - 1)
        self._start.append(len(self.path))
        self.tried.append([])
        if self.budget.window is not None:
            self.final = max(self.final, len(self.visible) - self.budget.window)
        if token in self.rules.eos:
            self.end = "eos"
        elif len(self.visible) >= self.budget.answer:
            self.end = "length"
        return token

    def _delete(self, action: int) -> int | None:
        depth = self.target(self.rules.deletes[action])
        first_visit = not self.tried[depth]
        if self.visible[depth] not in self.tried[depth]:
            self.tried[depth].append(self.visible[depth])
        self.deleted += 1
        del self.visible[depth:]
        del self.tried[depth + 1 :]
        del self._start[depth + 1 :]
        if self.rules.memory == "keep":
            self.path.append(len(self.trace) - 1)
            return action
        if self.rules.memory == "hint" and not first_visit:
            del self.path[self._start[depth] + 1 :]  # back to the marker that stands here already
            return None
        del self.path[self._start[depth] :]
        if self.rules.memory == "hint":
            self.path.append(len(self.trace) - 1)
            return action
        return None

    def target(self, unit: Unit) -> int:
        """The depth that a delete of this unit goes back to: at least one token goes."""
        length = len(self.visible)
        if unit == "answer":
            return 0
        if unit == "line":
            ends = (depth for depth in range(length - 1, 0, -1) if self.visible[depth - 1] in self.rules.boundaries)
            return next(ends, 0)
        return max(0, length - (1 if unit == "token" else unit))

    def stop(self, end: End) -> None:
        """End the rollout for a reason that lies outside of its trace: "stuck" or "stop"."""
        self.end = end

    @property
    def context(self) -> list[int]:
        """The token ids after the prompt that the next action is conditioned on."""
        return [self.trace[slot] for slot in self.path]

    @property
    def answer(self) -> list[int]:
        """The visible tokens without the one that ended them."""
        return self.visible[:-1] if self.end == "eos" else self.visible


def replay(trace: Sequence[int], rules: Rules, budget: Budget | None = None) -> Machine:
    """The machine after a whole trace.

    Raises:
        IllegalAction: the rules or the budget forbid one of its actions.
    """
    machine = Machine(rules, budget or unlimited(trace))
    for action in trace:
        machine.step(action)
    return machine


def unlimited(trace: Sequence[int]) -> Budget:
    """A budget that a given trace cannot exhaust."""
    return Budget(answer=len(trace) + 1, actions=len(trace) + 2)


@dataclass(frozen=True)
class Layout:
    """A trace as the tree of its contexts, for scoring all of its actions at once.

    Each token that entered the context and from which something was chosen is a node; a context is a node
    with its chain of parents. A delete that only shrinks the context goes back to a node that is there.

    Attributes:
        tokens: the token of each node.
        parents: the node before each node in its context, -1 for the prompt's end. Parents come first.
        anchors: for each action, the node whose logits chose it, -1 for the prompt's end.
        illegal: for each action, the token ids that were illegal.
    """

    tokens: list[int]
    parents: list[int]
    anchors: list[int]
    illegal: list[list[int]]


def layout(trace: Sequence[int], rules: Rules, budget: Budget | None = None) -> Layout:
    """The contexts in which the actions of a trace were chosen; see `Layout`.

    Raises:
        IllegalAction: the rules or the budget forbid one of its actions.
    """
    out = Layout([], [], [], [])
    machine = Machine(rules, budget or unlimited(trace))
    node_of: dict[int, int] = {}  # index into the trace -> node
    anchor = -1
    for step, action in enumerate(trace):
        out.anchors.append(anchor)
        out.illegal.append(machine.illegal())
        enters = machine.step(action)
        if step + 1 == len(trace):
            break  # nothing is chosen from the last context
        path = machine.path
        if enters is not None:
            node_of[step] = len(out.tokens)
            out.tokens.append(enters)
            out.parents.append(node_of[path[-2]] if len(path) > 1 else -1)
        anchor = node_of[path[-1]] if path else -1
    return out


def contexts(trace: Sequence[int], rules: Rules, budget: Budget | None = None) -> Iterator[list[int]]:
    """For each action, the token ids after the prompt that it was conditioned on."""
    machine = Machine(rules, budget or unlimited(trace))
    for action in trace:
        yield machine.context
        machine.step(action)
