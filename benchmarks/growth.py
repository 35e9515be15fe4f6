"""`python -m benchmarks.growth`: how the cost of a typed token grows with batch, length, share of deletes and skew.

Each panel varies one of them and leaves the others at a batch of 64, prompts of 32 and 64 actions, without deletes; its
peer is `model.generate`, in turn with ours on the same model. Where deletes are varied the peer types the same without.
Deletes and skew have 4 and 8 times as many prompts as the batch has rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.__main__ import RESULTS
from benchmarks.cases import Setting, cost_of_deletes, rollouts_without_deletes, skewed_rollouts
from benchmarks.measure import Comparison, Side, compare
from benchmarks.models import SIZES
from benchmarks.report import at_least, machine, run, save, writable
from rl_backspace.folder import atomically

PART = ".part.json"  # what Ctrl-C leaves, beside an earlier picture and its numbers


@dataclass(frozen=True)
class Axis:
    """What is varied: its label, the values, and the two sides at a value."""

    label: str
    values: Sequence[float]
    setup: Callable[[Setting, float], tuple[Side, Side]]
    peer: str = "model.generate"
    log: bool = True


def _batch(setting: Setting, value: float) -> tuple[Side, Side]:
    return rollouts_without_deletes(replace(setting, batch=int(value)))


def _length(setting: Setting, value: float) -> tuple[Side, Side]:
    return rollouts_without_deletes(replace(setting, actions=int(value)))


def _deletes(setting: Setting, value: float) -> tuple[Side, Side]:
    return cost_of_deletes(setting, share=value)


def _skew(setting: Setting, value: float) -> tuple[Side, Side]:
    return skewed_rollouts(setting, longer=int(value))


AXES = {
    "batch": Axis("rollouts side by side", (4, 16, 64, 256), _batch),
    "length": Axis("actions of each", (16, 64, 256, 512), _length),
    "deletes": Axis("share of deletes", (0.1, 0.2, 0.3, 0.4), _deletes, "the same without deletes", log=False),
    "skew": Axis("one in ten so many times longer", (1, 2, 4, 8, 16), _skew),
}


def microseconds(compared: Comparison) -> tuple[float, float]:
    """Of a typed token: ours and the peer's, medians."""
    return tuple(1e6 / statistics.median(side.rates()) for side in (compared.ours, compared.peer))  # type: ignore[return-value]


def draw(found: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with rc_context({**style, "grid.alpha": 0.25, "grid.linewidth": 0.6}):  # type: ignore[arg-type]
        figure = Figure(figsize=(12, 3.3), layout="constrained")
        figure.suptitle(title, fontsize=10)
        for axes, (name, lines) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
            axis = AXES[name]
            for side, colour, label in (("ours", "#d55e00", "ours"), ("peer", "#0072b2", axis.peer)):
                axes.plot(lines["values"], lines[side], color=colour, marker="o", markersize=4, label=label)
            if axis.log:
                axes.set_xscale("log", base=2)
            axes.set_xticks(lines["values"], [f"{value:g}" for value in lines["values"]], minor=False)
            axes.set_xlabel(axis.label)
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=8)
        figure.axes[0].set_ylabel("µs per typed token")
        with atomically(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    pairs, picture = at_least(2), writable(".png", ".json", PART)
    parser.add_argument("--repeats", type=pairs, default=5, help="measured pairs per point, at least 2 (default 5)")
    parser.add_argument("--size", choices=sorted(SIZES), default="1m")
    parser.add_argument(
        "--out",
        type=picture,
        help="PNG to write, and as .json its numbers; until then .part.json (default: in results/)",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.out or RESULTS / f"growth-{given.size}.png"
    part = path.with_suffix(PART)
    setting, found = Setting(given.size), dict[str, dict[str, list[float]]]()
    for name, axis in AXES.items():
        lines = found[name] = {"values": [], "ours": [], "peer": []}
        for value in track(axis.values, description=axis.label, transient=True):
            ours, peer = microseconds(compare(*axis.setup(setting, value), given.repeats))
            for key, number in (("values", value), ("ours", ours), ("peer", peer)):
                lines[key].append(number)
            save({"microseconds": found}, part)
    where = machine()["device"] if torch.cuda.is_available() else f"1 thread, {machine()['cpu']}"
    draw(found, f"Rollouts of the {given.size} model, {where}", path)
    part.replace(path.with_suffix(".json"))
    print(f"written to {path} and {path.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    run(main)
