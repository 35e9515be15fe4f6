"""`python -m benchmarks.profile`: where the time of the rollouts goes, part by part.

CPU time of the main thread, so that waiting for other processes does not count; each part without the parts
inside it. Below them, what the matrix products alone would take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.__main__ import RESULTS
from benchmarks.cases import CASES, Setting
from benchmarks.measure import Side
from benchmarks.models import SIZES
from benchmarks.report import at_least, run, save
from rl_backspace.backbone import Backbone, PointerLayer
from rl_backspace.engine import Engine, _Batch
from rl_backspace.errors import UserError
from rl_backspace.fused import PART, Fused

REST = "bookkeeping: machines, rows, results"
ALONE = "matrix products alone"


class Clock:
    """Splits time among the functions that it watches.

    Attributes:
        spent: seconds by part.
    """

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._open: list[tuple[str, bool]] = [(REST, False)]  # part, and whether it takes what is inside it too
        self._last = time.thread_time()

    def _turn(self) -> None:
        now = time.thread_time()
        self.spent[self._open[-1][0]] += now - self._last
        self._last = now

    def watch(self, function: Callable[..., Any], part: str, whole: bool) -> Callable[..., Any]:
        """The function, timed as `part`; `whole`: with everything inside it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(self._open[-1] if self._open[-1][1] else (part, whole))
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return timed

    def measure(self, side: Side) -> dict[str, float]:
        """Seconds by part of one run of `side`."""
        self.spent.clear()
        self._last = time.thread_time()
        side()
        self._turn()
        return dict(self.spent)


def instrument() -> Clock:
    """Put the clock into the engine and what it calls, for the rest of this process."""
    clock = Clock()
    watched: list[tuple[Any, str, str, bool]] = [
        (Backbone, "prefill", "prompts: one forward pass for all", True),
        (Fused, "prefill", "prompts: one forward pass for all", True),
        (Fused, "decode", "tokens: the written-out step", True),
        (Backbone, "fastest", "tokens: weights joined", True),
        (Backbone, "decode", "tokens: the model's Python, norms, rotary embeddings", False),
        (Backbone, "logits", "choosing: output head", True),
        (Engine, "_sample", "choosing: legality, softmax, draw", False),
        (_Batch, "anchors", "choosing: hidden states of the anchors", True),
        (PointerLayer, "update", "tokens: writing into the cache", True),
        (torch.nn.Linear, "forward", "tokens: linear layers", True),
    ]
    for owner, name, part, whole in watched:
        setattr(owner, name, clock.watch(getattr(owner, name), part, whole))
    for name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS[name] = clock.watch(ALL_ATTENTION_FUNCTIONS[name], "tokens: attention", True)
    return clock


def products(setting: Setting, typed: float) -> float:
    """Seconds of CPU that the matrix products of such rollouts take when nothing else is done: those of the prompts,
    and of a step for each of the `typed` tokens of a row, by caches as long as they are then."""
    shape = SIZES[setting.size]
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    weights = [torch.randn(*size) for size in ((3 * width, width), (width, width), (8 * width, width))]
    down, head = torch.randn(width, 4 * width), torch.randn(shape["vocab_size"], width)
    caches = [
        torch.randn(2, setting.batch * heads, setting.context, width // heads)
        for _ in range(shape["num_hidden_layers"])
    ]

    def linear(hidden: Tensor) -> None:
        for weight in weights:
            F.linear(hidden, weight)
        F.linear(wide[: len(hidden)], down)

    wide, query = torch.randn(PART["cpu"], 4 * width), torch.randn(setting.batch * heads, 1, width // heads)
    one, part = torch.randn(setting.batch, width), torch.randn(PART["cpu"], width)
    started = time.thread_time()
    for _ in range(setting.batch * setting.prompt // PART["cpu"]):
        for _ in caches[1:]:
            linear(part)
        F.linear(part, weights[0])  # the last layer's; what comes after them is needed of each row's last token alone
    for step in range(round(typed)):
        for keys, values in caches:
            linear(one)
            length = setting.prompt + step + 1
            scores = torch.bmm(query, keys[:, :length].transpose(1, 2))
            torch.bmm(scores, values[:, :length])
        F.linear(one, head)
    return time.thread_time() - started


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(took[part] for took in runs) for part in runs[0]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--repeats", type=at_least(1), default=10)
    parser.add_argument("--size", choices=sorted(SIZES), default="1m")
    given = parser.parse_args()
    if torch.cuda.is_available():
        raise UserError("the profile is of CPU time; put CUDA_VISIBLE_DEVICES= before the command")
    torch.set_num_threads(1)
    setting = Setting(given.size)
    sides = {key: CASES[key].setup(setting)[0] for key in ("generate", "recompute")}
    shares, clock = dict(zip(sides, (0.0, setting.deletes), strict=True)), instrument()
    runs: dict[str, list[dict[str, float]]] = {key: [] for key in sides}
    for repeat in range(1 + given.repeats):  # turn by turn, so that what else the machine does falls on all
        for key, side in sides.items():
            took = clock.measure(side)
            with torch.inference_mode():
                took[ALONE] = products(setting, setting.actions * (1 - shares[key]))
            if repeat:  # the first one warms up
                runs[key].append(took)
    spent = {key: _medians(found) for key, found in runs.items()}
    alone = {key: took.pop(ALONE) for key, took in spent.items()}
    share = {
        key: statistics.median(took[ALONE] / (sum(took.values()) - took[ALONE]) for took in runs[key]) for key in runs
    }
    table = Table(title=f"{setting.size}: ms of {setting.batch} rollouts of {setting.actions} actions, 1 thread")
    table.add_column("part")
    for key in sides:
        table.add_column(CASES[key].name, justify="right")
    totals = {key: sum(took.values()) for key, took in spent.items()}
    for part in sorted(spent["generate"], key=spent["generate"].__getitem__, reverse=True):
        cells = [f"{1000 * took[part]:.0f}  ({took[part] / totals[key]:4.0%})" for key, took in spent.items()]
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("all", *(f"{1000 * total:.0f}  (100%)" for total in totals.values()))
    cells = [f"{1000 * took:.0f}  ({share[key]:4.0%})" for key, took in alone.items()]
    table.add_row(ALONE, *cells)
    Console().print(table)
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-profile-{given.size}.json"
    save({"seconds": runs}, path)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    run(main)
