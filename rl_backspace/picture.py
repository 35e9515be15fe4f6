"""The picture of a comparison: accuracy against deletes, and rewards over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_backspace.compare import MEASURES, PICTURE, Estimate, Group

if TYPE_CHECKING:
    from rl_backspace.study import Verdict

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00"]
COLOURS += ["#56b4e9", "#8c564b", "#7b4fb5", "#7a9a01", "#d62728", "#7f7f7f"]
MARKERS = "os^Dv<>pPX*h"
OTHERS = "#c8c8c8"
ACROSS = 4  # experiments of a study beside each other: more could not be read
STUDY_POINTS = (
    ("policy", COLOURS[1], "o", "delete token"),
    ("blocked", COLOURS[1], "x", "the same, blocked"),
    ("twin", COLOURS[0], "s", "twin"),
)
STUDY_LINES = (
    ("policy", "allowed", COLOURS[1], "delete token, answers within so many actions"),
    ("twin", "best_of", COLOURS[2], "twin, likeliest of n"),
    ("twin", "majority", COLOURS[3], "twin, commonest of n"),
)


def draw(groups: Sequence[Group], columns: Sequence[str], sort: str, path: Path) -> None:
    """Accuracy against deletes, and the rewards over time; the first dozen groups have a colour and a marker each."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rewards = [column for column in columns if column not in MEASURES]
    shown = len(groups[: len(COLOURS)]) + (len(groups) > len(COLOURS))
    widest = max(len(one.label) for one in groups[: len(COLOURS)])
    across = max(1, min(4, shown, 150 // (widest + 10)))
    down = max(1, math.ceil(len(rewards) / (1 if len(rewards) < 5 else 2)))
    height, legend = max(4.6, 1.45 * down), 0.22 * math.ceil(shown / across) + 0.15
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with rc_context({**style, "grid.alpha": 0.25, "grid.linewidth": 0.6, "text.parse_math": False}):
        figure = Figure(figsize=(12 if rewards else 6.5, height + legend), layout="constrained")
        parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15)) if rewards else [figure]
        left, *right = parts
        _draw_accuracy(left.subplots(), groups, "greedy" if sort.endswith(".greedy") else "sampled")
        if right:
            axes = right[0].subplots(down, math.ceil(len(rewards) / down), sharex=True, squeeze=False)
            _draw_curves(axes, groups, rewards)
        handles, labels = left.axes[0].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside lower center", ncols=across, frameon=False, fontsize=8.5
        )
        figure.savefig(path, format="png", dpi=150, metadata={"Software": PICTURE})


def draw_study(verdicts: Sequence[Verdict], curves: dict[tuple[str, int, str], Any], path: Path) -> None:
    """Accuracy against actions per answer, for each experiment sampled above greedy: the policy and the twin as points
    with intervals, the policy's answers cut off earlier, and the twin's tries, as lines (the mean over seeds)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(verdict.experiment for verdict in verdicts))
    across = min(ACROSS, len(names))
    rows = 2 * -(-len(names) // across)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with rc_context({**style, "grid.alpha": 0.25, "grid.linewidth": 0.6, "text.parse_math": False}):
        figure = Figure(figsize=(3.4 * across + 0.6, 2.3 * rows + 0.8), layout="constrained")
        panels = figure.subplots(rows, across, squeeze=False)
        for verdict in verdicts:
            row, column = divmod(names.index(verdict.experiment), across)
            axes = panels[2 * row + int(verdict.decoding == "greedy")][column]
            mine = {key: c[verdict.decoding] for key, c in curves.items() if key[0] == verdict.experiment}
            for which, curve, colour, label in STUDY_LINES:
                lines = [found["curve"][curve] for (_, _, whose), found in mine.items() if whose == which]
                steps = {"drawstyle": "steps-post"} if curve == "allowed" else {}
                axes.plot(*_mean_line(lines), color=colour, label=label, linewidth=1.2, **steps)
            for arm, colour, marker, label in STUDY_POINTS:
                x, y = verdict.actions[arm], verdict.accuracy[arm]
                bars = {"xerr": _bar(x, 1), "yerr": _bar(y, 100)}
                axes.errorbar(x.mean, 100 * y.mean, **bars, color=colour, marker=marker, linestyle="", label=label)
            axes.set_title(f"{verdict.experiment}, {verdict.decoding}", fontsize=9)
            if verdict.decoding == "greedy":
                axes.sharex(panels[2 * row][column])
                axes.set_xlabel("actions per answer")
            if not column:
                axes.set_ylabel("accuracy, %")
        for axes in panels.flat:
            axes.set_visible(axes.has_data())
        handles, labels = panels[0][0].get_legend_handles_labels()
        ncols = min(3, across + 1)
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=8.5)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": PICTURE})


def _mean_line(lines: Sequence[Sequence[Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of step curves of [actions, accuracy] over all of their actions, accuracy in %."""
    at = np.unique([actions for line in lines for actions, _ in line])
    values = []
    for line in lines:
        actions, accuracy = np.array(line).T
        index = np.searchsorted(actions, at, side="right") - 1
        values.append(np.where(index >= 0, accuracy[index.clip(min=0)], np.nan))
    return at, 100 * np.mean(values, axis=0)


def _styles(groups: Sequence[Group]) -> list[tuple[Group, str, str, str | None]]:
    """Each group's colour, marker and entry in the legend; the last first, so that the best is drawn on top."""
    named = [(one, COLOURS[i], MARKERS[i], one.label) for i, one in enumerate(groups[: len(COLOURS)])]
    others = groups[len(COLOURS) :]
    entry = f"{len(others)} others"
    unnamed = [(one, OTHERS, ".", None if i else entry) for i, one in enumerate(others)]
    return [*unnamed, *named[::-1]]


def _draw_accuracy(axes: Any, groups: Sequence[Group], how: str) -> None:
    """Each seed a small dot, each group's mean a marker with its interval both ways."""
    across, up = f"deletes.{how}", f"accuracy.{how}"
    spans: list[list[tuple[float, float]]] = []
    for order, (one, colour, marker, label) in enumerate(_styles(groups)):
        x, y = one.estimate(across), one.estimate(up)
        if x is None or y is None:
            continue
        seeds = [(run.values[across], 100 * run.values[up]) for run in one.runs if {across, up} <= run.values.keys()]
        spans += [seeds, *([] if x.n == 2 else [_ends(x, y)])]
        if len(seeds) > 1:
            axes.scatter(*zip(*seeds, strict=True), s=12, color=colour, alpha=0.6, linewidths=0, zorder=30 + order)
        axes.plot(x.mean, 100 * y.mean, marker, color=colour, markersize=7, label=label, zorder=60 + order)
        bars = {"xerr": _bar(x, 1), "yerr": _bar(y, 100), "ecolor": colour, "elinewidth": 1, "alpha": 0.8}
        axes.errorbar(x.mean, 100 * y.mean, fmt="none", zorder=3 + order, **bars)
    # the interval of two seeds may be wider than all else, and goes out of the picture
    limits = ((axes.set_xlim, 0.05, math.inf), (axes.set_ylim, 1.0, 102.0))
    points = [point for span in spans for point in span]
    for values, (limit, least, most) in zip(zip(*points, strict=True), limits, strict=False):
        low, high = min(values), max(values)
        margin = max(0.06 * (high - low), least)
        limit(max(low - margin, -margin / 2), min(high + margin, most))
    axes.set_xlabel(f"deletes per answer, {how}")
    axes.set_ylabel(f"accuracy, {how}, token allowed, %")
    axes.set_title("each seed, and each group's mean with its 95 % interval", fontsize=9, loc="left")


def _ends(x: Estimate, y: Estimate) -> list[tuple[float, float]]:
    """The corners of both intervals' span, (deletes, accuracy in %)."""
    across, up = ([e.mean if end is None else end for end in (e.low, e.high)] for e in (x, y))
    return [(across[0], 100 * up[0]), (across[1], 100 * up[1])]


def _bar(estimate: Estimate, scale: float) -> list[list[float]] | None:
    """Lengths of an error bar below and above, shape (2, 1)."""
    if estimate.low is None or estimate.high is None:
        return None
    below, above = scale * (estimate.mean - estimate.low), scale * (estimate.high - estimate.mean)
    return [[max(0.0, below)], [max(0.0, above)]]


def _draw_curves(axes: Any, groups: Sequence[Group], rewards: Sequence[str]) -> None:
    """A panel per reward: each group's mean over seeds, and the range of its seeds as a band."""
    logged = max((len(curve) for one in groups for run in one.runs for curve in run.curves.values()), default=1)
    window = max(1, logged // 25)
    below = f"step of RL (mean of {window} logged steps; band: range of seeds)" if window > 1 else "step of RL"
    across = axes.shape[1]
    for index, panel in enumerate(axes.flat):
        if index >= len(rewards):
            panel.set_visible(False)
            continue
        if index + across >= len(rewards):  # nothing is below it
            panel.set_xlabel(below, fontsize=8.5)
            panel.tick_params(labelbottom=True)
        column = rewards[index]
        for order, (one, colour, _, _) in enumerate(_styles(groups)):
            curves = [run.curves[column] for run in one.runs if column in run.curves]
            common = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
            if not common:
                continue
            smooth = np.stack([_smooth([curve[step] for step in common], window) for curve in curves])
            if len(curves) > 1:
                band = {"color": colour, "alpha": 0.12, "linewidth": 0}
                panel.fill_between(common, smooth.min(axis=0), smooth.max(axis=0), zorder=2, **band)
            panel.plot(common, smooth.mean(axis=0), color=colour, linewidth=1.3, zorder=3 + order)
        panel.set_title(column.removeprefix("reward.") if column != "reward" else "total", fontsize=9, loc="left")


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of each value and those before it, `window` in all; NaN where one of them is."""
    return np.convolve(values, np.ones(window))[: len(values)] / np.minimum(np.arange(len(values)) + 1, window)
