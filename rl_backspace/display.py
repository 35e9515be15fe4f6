"""How traces and results look: struck-through text, tables, progress."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rl_backspace.corrections import Correction
from rl_backspace.semantics import Budget, Machine, Rules, replay

if TYPE_CHECKING:  # the audit needs an experiment, and the tables of others do not
    from rl_backspace.audit import Audit
    from rl_backspace.engine import Rollout
    from rl_backspace.policy import Policy

ARMS = {
    "allowed": "policy",
    "blocked": "blocked",
    "random": "random times",
    "best_of": "best of",
    "majority": "majority of",
}
DELETIONS = {
    "first_attempt": "accuracy without the first delete and what follows",
    "rescued": "answers: wrong at first, right in the end",
    "spoiled": "answers: right at first, wrong in the end",
    "runs_per_answer": "runs of deletes per answer (a number)",
    "wrong_to_right": "runs that turned what would have been wrong right",
    "right_to_wrong": "runs that turned what would have been right wrong",
    "repeats": "runs followed by the same token again",
    "thrown_away": "actions thrown away",
    "out_of_actions": "answers that ran out of actions",
    "precision": "presses where something was wrong",
    "recall": "wrong states with a press",
}
UNLIMITED = 2**62  # more actions than there will be
CONTEXT = 32  # tokens before a run that its text is decoded with
EXAMPLE = 24  # characters of a trace in a table
console = Console(highlight=False, markup=False)  # prompts may hold [brackets]


def strike(
    actions: Sequence[int], tokenizer: PreTrainedTokenizerBase, rules: Rules, before: str = "", marks: bool = False
) -> Text:
    """A trace as typed: what was deleted is struck through, what is visible in the end is bold.

    Args:
        before: text in front of it, such as the prompt.
        marks: put ~~ around struck-through text, for places that show no styles.
    """
    shown = _Strike(tokenizer, rules, before, marks)
    for action in actions:
        shown.press(action)
    return shown.text()


class _Strike:
    """A trace as `strike` shows it, action by action; a run of typed or of struck tokens is decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: Rules, before: str, marks: bool):
        self.tokenizer, self.rules, self.before, self.marks = tokenizer, rules, before, marks
        self.machine = Machine(rules, Budget(UNLIMITED))
        self.typed: list[int] = []
        self.struck: list[bool] = []
        self.behind: list[int] = []  # for each typed token the one that is visible before it, -1 for none
        self.standing: list[int] = []  # indices into `typed` of the visible tokens
        self.decoded: dict[tuple[int, int], str] = {}  # of runs: first and last index -> text

    def press(self, action: int) -> None:
        self.machine.step(action)
        if action in self.rules.deletes:
            for index in self.standing[len(self.machine.visible) :]:
                self.struck[index] = True
            del self.standing[len(self.machine.visible) :]
            return
        self.behind.append(self.standing[-1] if self.standing else -1)
        self.standing.append(len(self.typed))
        self.typed.append(action)
        self.struck.append(False)

    def text(self) -> Text:
        out = Text(self.before)
        for deleted, run in itertools.groupby(range(len(self.typed)), self.struck.__getitem__):
            indices = list(run)
            key = (indices[0], indices[-1])
            text = self.decoded.get(key)
            if text is None:
                tokens = [self.typed[i] for i in indices]
                text = _text_added(self._context(indices[0]), tokens, self.tokenizer, self.rules)
                if indices[-1] + 1 < len(self.typed):  # the last run still grows
                    self.decoded[key] = text
            out.append(f"~~{text}~~" if deleted and self.marks else text, "strike red" if deleted else "bold")
        return out

    def _context(self, index: int) -> list[int]:
        """The last visible tokens before a typed one."""
        context: list[int] = []
        while (index := self.behind[index]) >= 0 and len(context) < CONTEXT:
            context.append(self.typed[index])
        return context[::-1]


class TypingStreamer:
    """Shows an answer in a terminal as it is typed and struck out: `stream=TypingStreamer(tokenizer)` of `generate`.

    Args:
        before: text in front of it, such as the prompt.
        delay: seconds to wait after each action.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: str = "", delay: float = 0.0):
        self.tokenizer, self.before, self.delay = tokenizer, before, delay
        self.live: Live | None = None

    def begin(self, rules: Rules) -> None:
        self.shown = _Strike(self.tokenizer, rules, self.before, marks=False)
        self.live = Live(console=console, auto_refresh=False)
        self.live.start()

    def put(self, value: Any) -> None:
        """Nothing: transformers gives a `streamer` the prompt, which `before` shows."""

    def put_action(self, action: int) -> None:
        assert self.live is not None
        self.shown.press(action)
        self.live.update(self.shown.text(), refresh=True)
        time.sleep(self.delay)

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def _text_added(context: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase, rules: Rules) -> str:
    """What tokens add to the text of others: alone, many tokenizers would drop the space before them."""
    end = "⏎" if tokens and tokens[-1] in rules.eos else ""
    base = tokenizer.decode(context)
    whole = tokenizer.decode([*context, *(tokens[:-1] if end else tokens)])
    while not whole.startswith(base):  # it ends within a character
        base = base[:-1]
    return whole[len(base) :] + end


def last_message(prompt: Any) -> str:
    """A prompt's text; of chat messages, the last one's."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def results_table(stages: dict[str, Any], ceiling: float | None = None) -> Table:
    """Accuracy with its 95 % interval and deletes per answer, a row per stage and token.

    Args:
        ceiling: highest accuracy that there is without deleting, where the task knows it.
    """
    caption = None if ceiling is None else f"ceiling without deletes {100 * ceiling:.1f} %"
    table = Table(title="accuracy on held-out prompts, % (95 % interval)", caption=caption)
    for column in ("", "token", "sampled", "greedy", "deletes: sampled, greedy"):
        table.add_column(column)
    for stage, results in stages.items():
        for token, decodings in results.items():
            cells = [_accuracy(decodings[how]) for how in ("sampled", "greedy")]
            deletes = ", ".join(f"{decodings[how]['deletes_per_answer']:.2f}" for how in ("sampled", "greedy"))
            table.add_row(stage, token, *cells, deletes)
        table.add_section()
    return table


def controls_table(how: str, arms: dict[str, Any], ceiling: float | None = None) -> Table:
    """What `controls.examine` found by one decoding: each arm, and how far the policy is above it, row by row.

    Args:
        ceiling: highest accuracy that there is without deleting, where the task knows it.
    """
    caption = None if ceiling is None else f"ceiling without deletes {100 * ceiling:.1f} %"
    count = arms["allowed"]["answers"]
    table = Table(title=f"{how}: accuracy on {count} held-out prompts, % (95 % interval)", caption=caption)
    for column in ("", "accuracy", "policy above it", "actions", "deletes"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for arm, cell in arms.items():
        over = ""
        if above := cell.get("allowed_above"):
            low, high = above["interval"]
            over = f"{100 * above['difference']:+.1f} ({100 * low:.1f}, {100 * high:.1f})"
        name = f"{ARMS[arm]} {cell.get('n', '')}".rstrip()
        spent = (f"{cell[key]:.2f}" for key in ("actions_per_answer", "deletes_per_answer"))
        table.add_row(name, _accuracy(cell), over, *spent)
    return table


def deletions_table(found: dict[str, Any]) -> Table:
    """What the deletions were good for (`Examination.deletions`), in %."""
    table = Table(title="what deleting did, %")
    for column in ("", *found):
        table.add_column(column, justify="left" if not column else "right")
    for name, text in DELETIONS.items():
        values = [results["deletions"][name] for results in found.values()]
        factor, digits = (1, 2) if name == "runs_per_answer" else (100, 1)
        table.add_row(text, *("–" if value is None else f"{factor * value:.{digits}f}" for value in values))
    return table


def detector_table(found: dict[str, Any]) -> Table:
    """The delete token as a detector of errors (`detector.summarise`), a row per source of errors."""
    table = Table(title="probability of a delete on held-out prompts after the warm-up, %")
    ages = list(dict.fromkeys(age for measures in found.values() for age in measures["by_age"]))
    table.add_column("errors")
    for column in ("if right", "if wrong", *(f"{age} ago" for age in sorted(ages)), "precision", "recall", "AUC"):
        table.add_column(column, justify="right")
    for source, measures in found.items():
        shares = [measures["p_delete_right"], measures["p_delete_wrong"]]
        shares += [measures["by_age"].get(age) for age in sorted(ages)]
        shares += [measures[key] for key in ("precision", "recall", "auc")]
        table.add_row(source, *("–" if share is None else f"{100 * share:.1f}" for share in shares))
    return table


def audit_table(audit: Audit, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> Table:
    """What known traces earn, the mean over prompts: in all as training begins and ends, and by term at its end."""
    table = Table(title="what a rollout earns, weighted", caption=f"prompts {max(map(len, audit.earned.values()))}")
    for column in ("rollout", "for example"):
        table.add_column(column)
    for column in ("at first", "in the end", *audit.terms):
        table.add_column(column, justify="right")
    for trace in audit.earned:
        first, last = audit.mean(trace, 0), audit.mean(trace, len(audit.shares) - 1)
        typed = "".join(token_text(token, tokenizer, rules) for token in audit.examples[trace].actions)
        shown = typed if len(typed) <= EXAMPLE else f"{typed[: EXAMPLE - 1]}…"
        table.add_row(trace, shown, *(f"{value:.3f}" for value in (sum(first), sum(last), *last)))
    return table


def correction_lines(
    prompt: Any, correction: Correction, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> tuple[str, str]:
    """A correction as typed, ⌫ for each delete, and below it what is learned: ^ as typed, . not at all, or what the
    expert would have typed instead."""
    typed, learned = [], []
    for action, target, learn in zip(correction.actions, correction.targets, correction.learn, strict=True):
        cell, mark = token_text(action, tokenizer, rules), "."
        if learn:
            instead = token_text(target, tokenizer, rules)
            mark = "^" if target == action else f"[{instead}]" if instead in ("^", ".") else instead
        width = max(len(cell), len(mark))
        typed.append(cell.ljust(width))
        learned.append(mark.ljust(width, "^" if mark == "^" else "." if mark == "." else " "))
    before = f"{last_message(prompt)} "
    indent = len(before.rpartition("\n")[2])
    return before + "".join(typed), " " * indent + "".join(learned)


def correction_record(
    row: Mapping[str, Any], correction: Correction, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> dict[str, Any]:
    """A correction as a line of JSON: for people first, and the token ids that training uses."""
    visible = replay(correction.actions, rules).answer
    mistakes = [
        {
            "after": tokenizer.decode(visible[: mistake.depth]),
            "wrong": _text_added(visible[: mistake.depth], mistake.tokens, tokenizer, rules),
            "deletes": len(mistake.presses),
            "right": _text_added(visible[: mistake.depth], visible[mistake.depth :], tokenizer, rules),
        }
        for mistake in correction.mistakes
    ]
    actions, targets = (
        [token_text(t, tokenizer, rules) for t in ids] for ids in (correction.actions, correction.targets)
    )
    return {
        "prompt": row["prompt"],
        "answer": row["answer"],
        "source": correction.source,
        "typed": "".join(actions),
        "visible": tokenizer.decode(visible),
        "mistakes": mistakes,
        "learned": [target if learn else None for target, learn in zip(targets, correction.learn, strict=True)],
        "actions": correction.actions,
        "targets": correction.targets,
        "learn": correction.learn,
    }


def trace_record(prompt: Any, rollout: Rollout, policy: Policy) -> dict[str, Any]:
    """A rollout as a line of JSON: for people first, and its token ids."""
    return {
        "prompt": prompt,
        "actions": rollout.actions,
        "typed": "".join(token_text(action, policy.tokenizer, policy.rules) for action in rollout.actions),
        "visible": policy.text(rollout.visible),
        "end": rollout.end,
        "deletes": rollout.deletes,
    }


def token_text(token: int, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> str:
    """One action as a person reads it, on one line."""
    if token in rules.deletes:
        return "⌫" if len(rules.deletes) == 1 else f"⌫{rules.deletes[token]} "
    return "⏎" if token in rules.eos else tokenizer.decode([token]).replace("\n", "↵") or f"[{token}]"


def _accuracy(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{100 * result['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})"
