"""How traces and results look: struck-through text, tables, progress."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rl_backspace.semantics import Machine, Rules, unlimited

console = Console(highlight=False, markup=False)  # prompts may hold [brackets]


def strike(
    actions: Sequence[int], tokenizer: PreTrainedTokenizerBase, rules: Rules, before: str = "", marks: bool = False
) -> Text:
    """A trace as typed: what was deleted is struck through, what is visible in the end is bold.

    Args:
        before: text in front of it, such as the prompt.
        marks: put ~~ around struck-through text, for places that show no styles.
    """
    machine = Machine(rules, unlimited(actions))
    typed: list[int] = []
    struck: list[bool] = []
    after: list[list[int]] = []  # the visible tokens before each typed one
    standing: list[int] = []  # indices into `typed` of the visible tokens
    for action in actions:
        before_it = list(machine.visible)
        machine.step(action)
        if action in rules.deletes:
            for index in standing[len(machine.visible) :]:
                struck[index] = True
            del standing[len(machine.visible) :]
        else:
            standing.append(len(typed))
            typed.append(action)
            struck.append(False)
            after.append(before_it)
    out = Text(before)
    for deleted, run in itertools.groupby(range(len(typed)), struck.__getitem__):
        indices = list(run)
        text = _text_added(after[indices[0]], [typed[i] for i in indices], tokenizer, rules)
        out.append(f"~~{text}~~" if deleted and marks else text, "strike red" if deleted else "bold")
    return out


def _text_added(context: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase, rules: Rules) -> str:
    """What tokens add to the text of others: alone, many tokenizers would drop the space before them."""
    end = "⏎" if tokens[-1] in rules.eos else ""
    base = tokenizer.decode(context)
    whole = tokenizer.decode([*context, *(tokens[:-1] if end else tokens)])
    while not whole.startswith(base):  # it ends within a character
        base = base[:-1]
    return whole[len(base) :] + end


def last_message(prompt: Any) -> str:
    """A prompt's text; of chat messages, the last one's."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def results_table(stages: dict[str, Any]) -> Table:
    """Accuracy with its 95 % interval and deletes per answer, a row per stage and token."""
    table = Table(title="accuracy on held-out prompts, % (95 % interval)")
    for column in ("", "token", "sampled", "greedy", "deletes: sampled, greedy"):
        table.add_column(column)
    for stage, results in stages.items():
        for token, decodings in results.items():
            cells = [_accuracy(decodings[how]) for how in ("sampled", "greedy")]
            deletes = ", ".join(f"{decodings[how]['deletes_per_answer']:.2f}" for how in ("sampled", "greedy"))
            table.add_row(stage, token, *cells, deletes)
        table.add_section()
    return table


def _accuracy(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{100 * result['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})"
