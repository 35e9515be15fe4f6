"""Runs side by side: those whose configs differ in nothing but the seed are one group, with intervals over seeds."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rl_backspace.config import Config, read_yaml
from rl_backspace.errors import UserError, nearest
from rl_backspace.folder import is_run

if TYPE_CHECKING:
    from rich.table import Table

APART = ("seed", "name", "wandb")  # what the runs of a group may differ in
STAGES = {"base": "before any training", "before": "after the correction warm-up", "after": "after RL"}
MEASURES = {
    "accuracy.sampled": ("accuracy", "allowed", "sampled"),
    "accuracy.greedy": ("accuracy", "allowed", "greedy"),
    "blocked.sampled": ("accuracy", "blocked", "sampled"),
    "blocked.greedy": ("accuracy", "blocked", "greedy"),
    "deletes.sampled": ("deletes_per_answer", "allowed", "sampled"),
    "deletes.greedy": ("deletes_per_answer", "allowed", "greedy"),
}
"""Columns, and where in summary.json each is: measure, token and decoding, of the last stage that there is."""
ACCURACIES = tuple(key for key, (measure, *_) in MEASURES.items() if measure == "accuracy")
SORT = "accuracy.sampled"
LONGEST_LABEL = 72
ABSENT = object()
PICTURE = "rl-backspace compare"  # in its metadata


@dataclass(frozen=True)
class Estimate:
    """A mean over n runs with its 95 % interval: Student's t over the runs, or, of one run, its own over prompts."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass
class Run:
    """A finished run.

    Attributes:
        values: by column; the rewards are means of the last tenth of RL's logged steps.
        intervals: 95 % intervals over prompts, of the accuracies.
        curves: step -> value, by reward column.
    """

    path: Path
    config: dict[str, Any]
    stage: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    curves: dict[str, dict[int, float]]

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @cached_property
    def key(self) -> dict[str, Any]:
        return {key: value for key, value in self.config.items() if key not in APART}


@dataclass
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        label: short settings, or what its folders are called.
        settings: what tells it from other groups, by full key, as text.
    """

    runs: list[Run]
    label: str = ""
    by_folder: bool = False
    settings: dict[str, str] = field(default_factory=dict)

    def estimate(self, column: str) -> Estimate | None:
        """None where no run has the column."""
        having = [run for run in self.runs if column in run.values]
        values = [run.values[column] for run in having]
        if not values:
            return None
        mean = sum(values) / len(values)
        if len(values) == 1:
            low, high = having[0].intervals.get(column, (None, None))
            return Estimate(mean, low, high, 1)
        half = _half_width(values)
        return Estimate(mean, mean - half, mean + half, len(values))


def _half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t-interval of the mean of two values or more."""
    from scipy.stats import t

    mean, n = sum(values) / len(values), len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n)


def compare(paths: Sequence[Path], sort: str | None = None, out: Path | None = None) -> None:
    """Print a table of runs, and write it with a picture.

    Args:
        paths: run folders, or folders of them.
        sort: a column; the highest mean comes first.
        out: where compare.csv, runs.csv and compare.png go; default: the one folder of runs, or ./compare.

    Raises:
        UserError: no finished run, no such column, or files there that no comparison wrote.
    """
    from rich.console import Console

    from rl_backspace.display import console
    from rl_backspace.picture import draw

    runs, skipped = load(paths)
    for line in skipped:
        print(line, file=sys.stderr)
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: no finished run; give folders that `train` or `sweep` wrote")
    columns = _columns(runs)
    sort = sort or next(key for key in (SORT, *columns) if key in columns)
    if sort not in columns:
        raise UserError(f"--sort: no column {sort!r}{nearest(sort, columns)}; there are {', '.join(columns)}")
    groups = ranked(group(runs), sort)
    if out is None:
        out = paths[0] if len(paths) == 1 and not is_run(paths[0]) else Path("compare")
    _refuse_others(out)
    for shown in tables(groups, columns, sort):
        if not console.is_terminal:  # a file is as wide as it has to be
            console = Console(highlight=False, markup=False, width=1000)
        console.print(shown)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / "compare.csv", _group_rows(groups, columns))
        _write_csv(out / "runs.csv", _run_rows(groups, columns))
        draw(groups, columns, sort, out / "compare.png")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; give --out another folder") from error
    console.print(f"written to {out}: {', '.join(OUTPUTS)}", soft_wrap=True)


# reading


def load(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in these folders, each once, and a line for every other.

    Raises:
        UserError: a folder that is no run and holds none.
    """
    folders: list[Path] = []
    for path in paths:
        below = [path] if is_run(path) else sorted(child for child in _children(path) if is_run(child))
        if not below:
            raise UserError(f"{path}: no run and no folder of runs; give folders that `train` or `sweep` wrote")
        folders += below
    runs: list[Run] = []
    skipped = []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            run = _read(folder)
        except UserError as error:
            skipped.append(f"skipped {error}")
            continue
        twin = next((other for other in runs if other.seed == run.seed and other.key == run.key), None)
        if twin is None:
            runs.append(run)
        else:
            skipped.append(f"skipped {folder}: the same config and seed as {twin.path}, so no run of its own")
    return runs, skipped


def _children(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _read(folder: Path) -> Run:
    """Raises UserError saying why it cannot be compared."""
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder}: did not finish (it has no summary.json)")
    config = read_yaml(folder / "config.yaml")
    with contextlib.suppress(ValueError):  # what another version wrote is compared as it is
        config = Config.model_validate(config).model_dump(mode="json")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        stage = next(stage for stage in reversed(STAGES) if stage in summary["accuracy"])
        values, intervals = {}, {}
        for column, (measure, token, how) in MEASURES.items():
            with contextlib.suppress(KeyError):
                values[column] = float(summary[measure][stage][token][how])
            with contextlib.suppress(KeyError):
                if column in ACCURACIES:
                    low, high = summary["interval"][stage][token][how]
                    intervals[column] = (float(low), float(high))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{folder}: summary.json is not what `train` writes") from error
    curves = _curves(folder / "metrics.jsonl")
    for column, curve in curves.items():
        last = list(curve.values())[-math.ceil(len(curve) / 10) :]
        values[column] = sum(last) / len(last)
    return Run(folder, config, stage, values, intervals, curves)


def _curves(path: Path) -> dict[str, dict[int, float]]:
    """The total reward and each term's mean by logged step of RL; nothing where there was none."""
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a crash
            record = json.loads(line)
            if "reward" not in record:
                continue
            for key, value in record.items():
                term = re.fullmatch(r"rewards/(.+)/mean", key)
                column = f"reward.{term[1]}" if term else key
                if (term or key == "reward") and isinstance(value, (int, float)) and math.isfinite(value):
                    curves.setdefault(column, {})[record["step"]] = float(value)
    return curves


def _columns(runs: Iterable[Run]) -> list[str]:
    """The columns that any run has, in the table's order: measures, reward, its terms."""
    found = dict.fromkeys(column for run in runs for column in run.values)
    return [
        *(key for key in (*MEASURES, "reward") if key in found),
        *(key for key in found if key.startswith("reward.")),
    ]


# grouping


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, each labelled with what tells it from the others."""
    groups: list[Group] = []
    for run in runs:
        same = next((group for group in groups if group.runs[0].key == run.key), None)
        if same is None:
            groups.append(Group([run]))
        else:
            same.runs.append(run)
    differing = dict(differences([group.runs[0].key for group in groups]))
    names = short_names(differing)
    for index, one in enumerate(groups):
        one.runs.sort(key=lambda run: run.seed)
        one.settings = {key: texts[index] for key, texts in differing.items()}
        told = [f"{names[key]}={text}" for key, text in one.settings.items() if text]
        one.label = ", ".join(told) or str(one.runs[0].config.get("name", one.runs[0].path.name))
    if max(len(one.label) for one in groups) > LONGEST_LABEL:
        _label_by_folder(groups)
    return groups


def _label_by_folder(groups: Sequence[Group]) -> None:
    """What the folders of a group have in common, where the settings are more than can be read."""
    for one in groups:
        one.by_folder = True
        letters = zip(*(run.path.name for run in one.runs), strict=False)
        common = "".join(same[0] for same in itertools.takewhile(lambda some: len(set(some)) == 1, letters))
        one.label = common.rstrip("-_.,=") or one.runs[0].path.name
    labels = [one.label for one in groups]
    for one in groups:
        if labels.count(one.label) > 1:
            one.label = str(one.runs[0].path)


def differences(blocks: Sequence[Any], key: str = "") -> Iterator[tuple[str, list[str]]]:
    """The keys in which blocks differ, and for each the blocks' values as text: – where one has no such key, nothing
    where the block around it is not there."""
    if all(block == blocks[0] for block in blocks):
        return
    inner = [block for block in blocks if isinstance(block, dict)]
    if len(inner) < len(blocks):
        texts = ["yes" if isinstance(block, dict) else short(block) for block in blocks]
        if not inner and len(set(texts)) < len(set(map(repr, blocks))):  # too short to tell them apart
            texts = [repr(block) if isinstance(block, float) else short(block) for block in blocks]
        yield key, texts
    for name in dict.fromkeys(name for block in inner for name in block):
        below = [block.get(name, ABSENT) for block in inner]
        for path, texts in differences(below, f"{key}.{name}" if key else str(name)):
            rest = iter(texts)
            yield path, [next(rest) if isinstance(block, dict) else "" for block in blocks]


def short(value: Any) -> str:
    """A value as short as it can be read."""
    if value is ABSENT:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value if value.isprintable() else json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, or as many of its last parts as no other key shares."""
    parts = {key: key.split(".") for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        names[key] = ".".join(own[-length:])
    return names


def ranked(groups: Sequence[Group], sort: str) -> list[Group]:
    """Highest mean first; those without the column last."""
    estimates = {id(one): one.estimate(sort) for one in groups}

    def rank(one: Group) -> float:
        estimate = estimates[id(one)]
        return math.inf if estimate is None else -estimate.mean

    return sorted(groups, key=rank)


def is_apart(one: Estimate | None, best: Estimate | None) -> bool:
    """Whether both have an interval and the two do not overlap."""
    ends = [end for estimate in (one, best) if estimate for end in (estimate.low, estimate.high)]
    if len(ends) < 4 or None in ends:
        return False
    low, high, best_low, best_high = ends
    return high < best_low or low > best_high  # type: ignore[operator]


# showing


def tables(groups: Sequence[Group], columns: Sequence[str], sort: str) -> list[Table]:
    """Accuracy and deletes, and the rewards where there was RL; a row per group."""
    stages = dict.fromkeys(run.stage for one in groups for run in one.runs)
    when = STAGES[next(iter(stages))] if len(stages) == 1 else "after the last stage of each"
    measured, rewards = [c for c in columns if c in MEASURES], [c for c in columns if c not in MEASURES]
    made = [_table(f"accuracy on held-out prompts {when}, %", groups, measured, sort, len(stages) > 1)]
    if rewards:
        made.append(_table("rewards, mean of the last tenth of RL's logged steps", groups, rewards, sort))
    notes = ["± 95 % t-interval over seeds"] if any(len(one.runs) > 1 for one in groups) else []
    if any(len(one.runs) == 1 for one in groups):
        notes.append("(low–high) 95 % interval over prompts of one seed")
    if any(is_apart(one.estimate(sort), groups[0].estimate(sort)) for one in groups):
        notes.append(f"* {sort} does not overlap the interval of the first row")
    if groups[0].by_folder:
        notes.append(f"rows have their folders' names; the {len(groups[0].settings)} settings are in compare.csv")
    made[-1].caption = "; ".join(notes)
    return made


def _table(title: str, groups: Sequence[Group], columns: Sequence[str], sort: str, stages: bool = False) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("", overflow="fold", min_width=max(len(part) for one in groups for part in one.label.split()))
    for column in (*(["stage"] if stages else []), "seeds", *columns):
        table.add_column(column.replace(".", "\n", 1) if column in columns else column, justify="right")
    best = groups[0].estimate(sort)
    for one in groups:
        cells = [_cell(column, one.estimate(column)) for column in columns]
        if set(cells) == {"–"}:
            continue
        apart = is_apart(one.estimate(sort), best)
        marked = [f"{cell} *" if apart and c == sort else cell for c, cell in zip(columns, cells, strict=True)]
        table.add_row(one.label, *([one.runs[0].stage] if stages else []), str(len(one.runs)), *marked)
    return table


def _cell(column: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    scale, digits = (100, 1) if column in ACCURACIES else (1, 2 if column in MEASURES else 3)
    mean = f"{round(scale * estimate.mean, digits) + 0.0:.{digits}f}"  # no minus before a zero
    if estimate.low is None or estimate.high is None:
        return mean
    if estimate.n > 1:
        return f"{mean} ± {scale * (estimate.high - estimate.mean):.{digits}f}"
    return f"{mean} ({scale * estimate.low:.{digits}f}–{scale * estimate.high:.{digits}f})"


def _group_rows(groups: Sequence[Group], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for one in groups:
        seeds = " ".join(str(run.seed) for run in one.runs)
        row: dict[str, Any] = {"label": one.label, "stage": one.runs[0].stage, "seeds": seeds, **one.settings}
        for column in columns:
            estimate = one.estimate(column)
            for name in ("mean", "low", "high", "n"):
                row[f"{column}.{name}"] = getattr(estimate, name) if estimate else 0 if name == "n" else None
        yield row


def _run_rows(groups: Sequence[Group], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for one in groups:
        for run in one.runs:
            row = {"run": str(run.path), "label": one.label, "stage": run.stage, "seed": run.seed, **one.settings}
            yield {**row, **{column: run.values.get(column) for column in columns}}


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


OUTPUTS = {"compare.csv": b"label,stage,seeds,", "runs.csv": b"run,label,stage,seed,", "compare.png": PICTURE.encode()}
"""What is written, and what its first bytes hold."""


def _refuse_others(out: Path) -> None:
    """Only what an earlier comparison wrote is replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    for name, mark in OUTPUTS.items():
        path = out / name
        if path.is_dir() or (path.exists() and mark not in path.read_bytes()[:1000]):
            raise UserError(f"{path}: already there, and no comparison wrote it; give --out another folder")
