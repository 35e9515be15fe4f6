"""Runs side by side: those whose configs differ in nothing that matters but the seed are one group, with intervals
over seeds."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from rl_backspace.config import Config, read_yaml
from rl_backspace.errors import UserError, nearest, one_line
from rl_backspace.folder import atomically, is_run

if TYPE_CHECKING:
    from rich.table import Table

APART = ("seed", "name", "wandb", "audit")  # what the runs of a group may differ in
LOGGING = ("logging_", "log_", "save_", "run_name", "disable_tqdm")  # and in what begins so under `trainer`
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

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of one value per run; one alone has no interval."""
        mean = fmean(values)
        if len(values) == 1:
            return cls(mean, None, None, 1)
        from scipy.stats import sem, t

        half = float(t.ppf(0.975, len(values) - 1) * sem(values))
        return cls(mean, mean - half, mean + half, len(values))


@dataclass
class Run:
    """A finished run.

    Attributes:
        config: what tells it from runs of other groups.
        values: by column; the rewards are means over the last tenth of RL's logged steps, NaN where one of them is.
        intervals: 95 % intervals over prompts, of the accuracies.
        curves: step -> value, by reward column.
    """

    path: Path
    name: str
    seed: int
    config: dict[str, Any]
    stage: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    curves: dict[str, dict[int, float]]

    @property
    def key(self) -> str:
        return _text(self.config)

    @property
    def task(self) -> str:
        """What is asked in the end: ranks and marks are among runs of one task."""
        return _text({key: value for key, value in self.config["task"].items() if key != "train"})


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

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    @property
    def task(self) -> str:
        return self.runs[0].task

    def estimate(self, column: str) -> Estimate | None:
        """None where no run has the column."""
        having = [run for run in self.runs if column in run.values]
        if not having:
            return None
        values = [run.values[column] for run in having]
        if len(values) == 1:
            low, high = having[0].intervals.get(column, (None, None))
            return Estimate(values[0], low, high, 1)
        return Estimate.of(values)


def compare(paths: Sequence[Path], sort: str | None = None, out: Path | None = None) -> None:
    """Print a table of runs, and write it with a picture.

    Args:
        paths: run folders, or folders of them.
        sort: a column; the highest mean comes first, or with a minus before it the lowest.
        out: where compare.csv, runs.csv and compare.png go; default: the one folder of runs, or ./compare.

    Raises:
        UserError: no finished run, no such column, or files there that no comparison wrote.
    """
    from rl_backspace.picture import draw

    runs, skipped = load(paths)
    for line in skipped:
        print(line, file=sys.stderr)
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: no finished run; give folders that `train` or `sweep` wrote")
    columns = _columns(runs)
    sort = sort or next(key for key in (SORT, *columns) if key in columns)
    known = ["seeds", *columns]
    if (column := sort.removeprefix("-")) not in known:
        raise UserError(f"--sort: no column {column!r}{nearest(column, known)}; there are {', '.join(known)}")
    groups = ranked(group(runs), sort)
    if out is None:
        out = paths[0] if len(paths) == 1 and not is_run(paths[0]) else Path("compare")
    refuse_others(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / "compare.csv", _group_rows(groups, columns))
        _write_csv(out / "runs.csv", _run_rows(groups, columns))
        with atomically(out / "compare.png") as path:
            draw(groups, columns, column, path)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; give --out another folder") from error
    for shown in tables(groups, columns, column):
        _print(shown)
    print(f"written to {out}: {', '.join(OUTPUTS)}")


def _print(table: Table) -> None:
    """A table as wide as its numbers need, however narrow the terminal is."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(highlight=False, markup=False, width=1000)
    if wide.is_terminal:
        wide.width = max(Console().width, Measurement.get(wide, wide.options, table).minimum)
    wide.print(table)


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
    read: list[Run] = []
    skipped = []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            read.append(_read(folder))
        except UserError as error:
            skipped.append(f"skipped {error}")
    _write_seeds_alike(read)
    runs: dict[tuple[str, int], Run] = {}
    for run in read:
        twin = runs.setdefault((run.key, run.seed), run)
        if twin is not run:
            skipped.append(f"skipped {run.path}: the same config and seed as {twin.path}{_other_results(run, twin)}")
    return list(runs.values()), skipped


def _write_seeds_alike(runs: Sequence[Run]) -> None:
    """Models that have the run's seed in their names have {seed} there, if runs of two seeds do."""
    names = {id(run): re.sub(rf"(?<![\w.]){run.seed}(?![\w.])", "{seed}", str(run.config.get("model"))) for run in runs}
    seeds = Counter(name for name, _ in {(names[id(run)], run.seed) for run in runs} if "{seed}" in name)
    for run in runs:
        if seeds[names[id(run)]] > 1:
            run.config["model"] = names[id(run)]


def _other_results(run: Run, twin: Run) -> str:
    for column, value in run.values.items():
        if _text(value) != _text(other := twin.values.get(column)):
            return f", but with other results: {column} is {value} and there {other}"
    return ", so no run of its own"


def _children(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _read(folder: Path) -> Run:
    """Raises UserError saying why it cannot be compared."""
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder}: did not finish (it has no summary.json)")
    content = read_yaml(folder / "config.yaml")
    with contextlib.suppress(ValueError):  # what another version wrote is compared as it is
        content = Config.model_validate(content).model_dump(mode="json")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        stage = next(stage for stage in reversed(STAGES) if stage in summary["accuracy"])
        values, intervals = {}, {}
        for column, (measure, token, how) in MEASURES.items():
            with contextlib.suppress(KeyError):
                values[column] = _finite(summary[measure][stage][token][how])
            with contextlib.suppress(KeyError):
                if column in ACCURACIES:
                    low, high = summary["interval"][stage][token][how]
                    intervals[column] = (_finite(low), _finite(high))
        curves = _curves(folder / "metrics.jsonl")
        for column, curve in curves.items():
            values[column] = fmean(list(curve.values())[-math.ceil(len(curve) / 10) :])
        name, seed = str(content.get("name", folder.name)), int(content.get("seed", 0))
        run = Run(folder, name, seed, _told_apart(content), stage, values, intervals, curves)
        _ = run.key, run.task
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{folder}: not what `train` writes ({one_line(error)})") from error
    return run


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a measure is {value}")
    return float(value)


def _told_apart(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config can matter besides the seed."""
    config = {key: value for key, value in content.items() if key not in APART}
    for block in (config, warmup := dict(config.get("warmup") or {})):
        if "trainer" in block:
            block["trainer"] = {k: v for k, v in block["trainer"].items() if not k.startswith(LOGGING)}
    return {**config, **({"warmup": warmup} if warmup else {})}


def _text(value: Any) -> str:
    """One text for equal values, which tells 1, 1.0 and true apart."""
    return json.dumps(value, sort_keys=True, default=str)


def _curves(path: Path) -> dict[str, dict[int, float]]:
    """The total reward and each term's mean by logged step of RL, NaN where a step lacks one; nothing without RL."""
    steps: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a crash
            record = json.loads(line)
            if "reward" in record:
                terms = {
                    f"reward.{key[8:-5]}": value for key, value in record.items() if re.match("rewards/.+/mean$", key)
                }
                steps[int(record["step"])] = {"reward": record["reward"], **terms}
    names = dict.fromkeys(name for rewards in steps.values() for name in rewards)
    return {name: {step: float(rewards.get(name, math.nan)) for step, rewards in steps.items()} for name in names}


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
    by_key: dict[str, Group] = {}
    for run in runs:
        by_key.setdefault(run.key, Group([])).runs.append(run)
    groups = list(by_key.values())
    differing = dict(differences([one.runs[0].config for one in groups]))
    names = short_names(differing)
    for index, one in enumerate(groups):
        one.runs.sort(key=lambda run: run.seed)
        one.settings = {key: texts[index] for key, texts in differing.items()}
        told = [f"{names[key]}={text}" for key, text in one.settings.items() if text]
        one.label = ", ".join(told) or one.runs[0].name
    if max(len(one.label) for one in groups) > LONGEST_LABEL:
        _label_by_folder(groups)
    return groups


def _label_by_folder(groups: Sequence[Group]) -> None:
    """What the folders of a group have in common besides seed and digest, where the settings are too many to read."""
    for one in groups:
        names = [re.sub(r"(^|,)seed=[^,-]*|-[0-9a-f]{8}$", "", run.path.name) for run in one.runs]
        one.by_folder = True
        one.label = os.path.commonprefix(names).strip("-_.,=") or one.runs[0].path.name  # noqa: RUF071
    labels = Counter(one.label for one in groups)
    for one in groups:
        if labels[one.label] > 1:
            one.label = str(one.runs[0].path)


def differences(blocks: Sequence[Any], key: str = "") -> Iterator[tuple[str, list[str]]]:
    """The keys in which blocks differ, and for each the blocks' values as text: – where one has no such key, nothing
    where the block around it is not there."""
    if len(set(map(_text, blocks))) < 2:
        return
    inner = [block for block in blocks if isinstance(block, dict)]
    if len(inner) < len(blocks):
        texts = ["yes" if isinstance(block, dict) else short(block) for block in blocks]
        if not inner and len(set(texts)) < len(set(map(_text, blocks))):  # too short to tell them apart
            texts = [short(block) if block is ABSENT else repr(block) for block in blocks]
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
    endings = {key: [key.split(".", n)[-1] for n in range(key.count("."), -1, -1)] for key in keys}
    shared = Counter(itertools.chain.from_iterable(endings.values()))
    return {key: next((name for name in its if shared[name] == 1), key) for key, its in endings.items()}


def ranked(groups: Sequence[Group], sort: str) -> list[Group]:
    """Task by task, highest mean first, or lowest with a minus before the column; those without a number last."""
    column, sign = sort.removeprefix("-"), 1 if sort.startswith("-") else -1
    tasks = list(dict.fromkeys(one.task for one in groups))

    def rank(one: Group) -> tuple[int, float]:
        estimate = one.estimate(column)
        value = len(one.runs) if column == "seeds" else math.nan if estimate is None else estimate.mean
        return tasks.index(one.task), math.inf if math.isnan(value) else sign * value

    return sorted(groups, key=rank)


def is_apart(one: Estimate | None, best: Estimate | None) -> bool:
    """Whether both are of several seeds and their intervals do not overlap."""
    if one is None or best is None or min(one.n, best.n) < 2:
        return False
    return one.high < best.low or one.low > best.high  # type: ignore[operator]


# showing


def tables(groups: Sequence[Group], columns: Sequence[str], sort: str) -> list[Table]:
    """For each task accuracy and deletes, and the rewards where there was RL; a row per group."""
    made = []
    blocks = [list(block) for _, block in itertools.groupby(groups, key=lambda one: one.task)]
    for block in blocks:
        about = f"{short(block[0].runs[0].config['task'])}: " if len(blocks) > 1 else ""
        stages = dict.fromkeys(one.stage for one in block)
        when = STAGES[next(iter(stages))] if len(stages) == 1 else "after the last stage of each"
        measured = [column for column in columns if column in MEASURES]
        made.append(_table(f"{about}accuracy on held-out prompts {when}, %", block, measured, sort, len(stages) > 1))
        rewards = [c for c in columns if c not in MEASURES and any(one.estimate(c) for one in block)]
        if rewards:
            made.append(_table(f"{about}rewards, mean of the last tenth of RL's logged steps", block, rewards, sort))
    notes = ["± 95 % t-interval over seeds"] if any(len(one.runs) > 1 for one in groups) else []
    if any(len(one.runs) == 1 for one in groups):
        notes.append("(low–high) 95 % interval over prompts of one seed")
    if any(_is_marked(one, block[0], sort) for block in blocks for one in block):
        notes.append(f"* {sort} does not overlap the interval of the first row")
    if groups[0].by_folder:
        notes.append(f"rows have their folders' names; the {len(groups[0].settings)} settings are in compare.csv")
    made[-1].caption = "; ".join(notes)
    return made


def _is_marked(one: Group, first: Group, sort: str) -> bool:
    return one.stage == first.stage and is_apart(one.estimate(sort), first.estimate(sort))


def _table(title: str, groups: Sequence[Group], columns: Sequence[str], sort: str, stages: bool = False) -> Table:
    from rich.table import Table

    rows = [["", *(["stage"] if stages else []), "seeds", *(column.replace(".", "\n", 1) for column in columns)]]
    for one in groups:
        cells = [_cell(column, one.estimate(column)) for column in columns]
        if set(cells) == {"–"}:
            continue
        if sort in columns and _is_marked(one, groups[0], sort):
            cells[columns.index(sort)] += " *"
        rows.append([one.label, *([one.stage] if stages else []), str(len(one.runs)), *cells])
    first, *numbers = zip(*rows, strict=True)
    table = Table(title=title)
    table.add_column("", overflow="fold", min_width=max(map(len, " ".join(first).split())))
    for texts in numbers:
        table.add_column(texts[0], justify="right", min_width=max(map(len, "\n".join(texts).split("\n"))))
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _cell(column: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    scale, digits = (100, 1) if column in ACCURACIES else (1, 2 if column in MEASURES else 3)
    mean = f"{round(scale * estimate.mean, digits) + 0.0:.{digits}f}"  # no minus before a zero
    if estimate.low is None or estimate.high is None or math.isnan(estimate.mean):
        return mean
    if estimate.n > 1:
        return f"{mean} ± {scale * (estimate.high - estimate.mean):.{digits}f}"
    return f"{mean} ({scale * estimate.low:.{digits}f}–{scale * estimate.high:.{digits}f})"


def _group_rows(groups: Sequence[Group], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for one in groups:
        seeds = " ".join(str(run.seed) for run in one.runs)
        row: dict[str, Any] = {"label": one.label, "stage": one.stage, "seeds": seeds, **one.settings}
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
    with atomically(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


OUTPUTS = {"compare.csv": b"label,stage,seeds,", "runs.csv": b"run,label,stage,seed,", "compare.png": PICTURE.encode()}
"""What is written, and what its first bytes hold."""


def refuse_others(out: Path) -> None:
    """Only what an earlier comparison wrote is replaced, or an empty file.

    Raises:
        UserError: a file there is another.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    for name, mark in OUTPUTS.items():
        path = out / name
        if path.is_dir() or (path.exists() and mark not in (path.read_bytes()[:1000] or mark)):
            raise UserError(f"{path}: already there, and no comparison wrote it; give --out another folder")
