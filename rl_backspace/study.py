"""Does deleting help? Each experiment and its twin, over seeds, and one table of what came out.

The twin has the same base model, data and seed, no delete token, and no fewer training actions than the policy had,
in the warm-up (on clean answers) and in RL. The policy runs first, since only then is it known how many those are.

A study file, in YAML:

    name: study
    seeds: [0, 1, 2]
    experiments:                     # name: an experiment file, and overrides of it
      signs: {config: experiments/arith.yaml, set: ["trainer.max_steps=400"]}
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from rl_backspace.compare import Estimate
from rl_backspace.config import Config, Seed, Strict, is_name, override, parse, read_yaml, validate
from rl_backspace.errors import UserError
from rl_backspace.folder import RunFolder, atomically
from rl_backspace.sweep import claimed, is_finished, move_aside, run_all, tell

DECODINGS = ("sampled", "greedy")
ARMS = {
    "policy": "delete token",
    "blocked": "the same, token blocked",
    "random": "the same, deletes at random times",
    "twin": "twin without a token",
    "best_of": "twin, likeliest of n",
    "majority": "twin, commonest of n",
}
RIVALS = ("twin", "best_of", "majority")
EXPLANATION = (
    "Accuracy in %, mean over seeds {seeds} with its 95 % t-interval. The twin has no delete token and no fewer "
    "training actions; n tries of it cost no fewer actions than the policy's answers. Bold: above the twin and its "
    "tries, with intervals that do not overlap. Errors: the policy's, as a multiple of its best rival's."
)
COLUMNS = ("experiment", "seed", "decoding", "arm", "accuracy", "actions", "deletes", "n")


class Entry(Strict):
    config: str
    set: tuple[str, ...] = Field(default=(), strict=False, description="overrides, as on the command line")


class Study(Strict):
    name: Annotated[str, AfterValidator(is_name)]
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    experiments: dict[Annotated[str, AfterValidator(is_name)], Entry] = Field(min_length=1)


@dataclass(frozen=True)
class Pair:
    """One experiment with one seed: the policy's config and, once it has run, the twin's."""

    experiment: str
    seed: int
    file: str
    overrides: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.experiment}-{self.seed}"

    def config(self, extra: Sequence[str] = ()) -> Config:
        content = read_yaml(Path(self.file))
        override(content, [*self.overrides, f"seed={self.seed}", "evaluation.controls=true", *extra])
        return parse(content)

    def command(self, out: Path, extra: Sequence[str] = ()) -> list[str]:
        arguments = [*self.overrides, f"seed={self.seed}", "evaluation.controls=true", *extra]
        return [sys.executable, "-m", "rl_backspace", "train", self.file, *arguments, "--out", str(out)]

    def twin(self, place: Path) -> list[str]:
        """The overrides that make the twin of a policy that has run."""
        config, summary = self.config(), RunFolder.open(place).summary()
        assert summary is not None
        length = summary["actions_per_answer"]["base"]["blocked"]["sampled"]  # of an answer without deletes
        warmup, rl = config.warmup, config.trainer
        examples = warmup.group * warmup.trainer.get("per_device_train_batch_size", 32)
        rollouts = rl.get("per_device_train_batch_size", 8) * rl.get("gradient_accumulation_steps", 1)
        changes = ["delete.tokens={}", "delete.budget=null", "warmup.clean=1"]
        if warmup.steps:
            steps = math.ceil(summary["warmup_actions"] / examples / length)
            changes.append(f"warmup.steps={max(warmup.steps, steps)}")
        if summary["steps"]:
            steps = math.ceil(summary["actions"] / rollouts / length)
            changes.append(f"trainer.max_steps={max(summary['steps'], steps)}")
        return changes


def read(path: Path) -> tuple[Study, list[Pair]]:
    """A study file, with every experiment of it checked.

    Raises:
        UserError: mistakes in it or in one of its experiments, a line each.
    """
    problems: list[str] = []
    study = validate(Study, read_yaml(path), problems)
    if study is None:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    pairs = [
        Pair(name, seed, entry.config, entry.set) for seed in study.seeds for name, entry in study.experiments.items()
    ]
    for pair in pairs:
        try:
            config = pair.config()
            if "{seed}" in config.model or not config.delete.tokens:
                raise UserError("a study trains the policy from its base model, with a delete token; change that key")
        except UserError as error:
            problems += [f"{path}: experiments.{pair.experiment}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return study, pairs


def run_study(path: Path, out: Path | None, jobs: int, dry_run: bool) -> int:
    """Run what is left of a study, policies first and then their twins, and write what came out.

    Returns:
        The exit code: 1 where a run failed, 130 where Ctrl-C ended it.

    Raises:
        UserError: mistakes in the file, or a folder that holds something else.
    """
    study, pairs = read(path)
    folder = out or Path("runs") / study.name
    policies = {pair.id: folder / pair.id / "policy" for pair in pairs}
    twins = {pair.id: folder / pair.id / "twin" for pair in pairs}
    if dry_run:
        print(*(place for pair in pairs for place in (policies[pair.id], twins[pair.id])), sep="\n")
        return 0
    failures: dict[str, str] = {}
    with claimed(folder) as lock:
        try:
            for places in (policies, twins):
                ready = [pair for pair in pairs if places is policies or is_finished(policies[pair.id])]
                commands: dict[str, list[str]] = {}
                for pair in ready:
                    place = places[pair.id]
                    changes = [] if places is policies else pair.twin(policies[pair.id])
                    if not _is_done(place, pair.config(changes)):
                        move_aside(place)
                        place.parent.mkdir(exist_ok=True)
                        commands[pair.id] = pair.command(place, changes)
                failed = run_all(commands, {pair.id: places[pair.id] for pair in ready}, jobs, lock)
                tell(failed, places)
                failures |= failed
        except KeyboardInterrupt:
            print("interrupted; the same command does the others", file=sys.stderr)
            return 130
    complete = [pair for pair in pairs if is_finished(twins[pair.id])]
    if complete:
        write(study, complete, folder)
    return 1 if failures else 0


def _is_done(place: Path, config: Config) -> bool:
    """Whether this run is there already.

    Raises:
        UserError: another one is there.
    """
    if not is_finished(place):
        return False
    if RunFolder.open(place).config() != config:
        raise UserError(f"{place}: made with another config, since the study or its experiment changed; give --out")
    return True


# what came out


def rows(pairs: Sequence[Pair], folder: Path) -> Iterator[dict[str, Any]]:
    """Accuracy, actions and deletes per answer of each arm: by experiment, seed and decoding."""
    for pair in pairs:
        found, twin = (_controls(folder / pair.id / which) for which in ("policy", "twin"))
        for how in DECODINGS:
            arms, theirs = found[how]["arms"], twin[how]
            spent = arms["allowed"]["actions_per_answer"]
            cells = {"policy": arms["allowed"], "blocked": arms["blocked"], "random": arms["random"]}
            cells["twin"] = theirs["arms"]["allowed"]
            for arm in ("best_of", "majority"):
                tries = theirs["curve"][arm]
                n = next((n for n, (actions, _) in enumerate(tries, 1) if actions >= spent - 1e-9), len(tries))
                actions, accuracy = tries[n - 1]
                cells[arm] = {"accuracy": accuracy, "actions_per_answer": actions, "deletes_per_answer": 0.0, "n": n}
            for arm, cell in cells.items():
                yield {
                    "experiment": pair.experiment,
                    "seed": pair.seed,
                    "decoding": how,
                    "arm": arm,
                    "accuracy": cell["accuracy"],
                    "actions": cell["actions_per_answer"],
                    "deletes": cell["deletes_per_answer"],
                    "n": cell.get("n", 1),
                }


def _controls(run: Path) -> Any:
    try:
        return json.loads((run / "controls.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: controls.json cannot be read ({error}); remove the run and start again") from error


@dataclass(frozen=True)
class Verdict:
    """One experiment by one decoding, over seeds.

    Attributes:
        accuracy, actions, deletes: by arm.
        above: the policy over each other arm, seed by seed.
        errors: the policy's share of the errors of its best rival.
        rival: that rival's arm.
        beats: whether the policy's interval lies above that of every rival.
        gone: whether, blocked, it is no longer above the twin.
    """

    experiment: str
    decoding: str
    accuracy: dict[str, Estimate]
    actions: dict[str, Estimate]
    deletes: dict[str, Estimate]
    above: dict[str, Estimate]
    errors: float
    rival: str
    beats: bool
    gone: bool


def verdicts(records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """What the rows come to, for each experiment and decoding."""
    out = []
    for experiment in dict.fromkeys(record["experiment"] for record in records):
        for how in DECODINGS:
            mine = [r for r in records if (r["experiment"], r["decoding"]) == (experiment, how)]
            columns = {
                key: {arm: [r[key] for r in mine if r["arm"] == arm] for arm in ARMS}
                for key in ("accuracy", "actions", "deletes")
            }
            accuracy = {arm: Estimate.of(values) for arm, values in columns["accuracy"].items()}
            above = {
                arm: Estimate.of([a - b for a, b in zip(columns["accuracy"]["policy"], values, strict=True)])
                for arm, values in columns["accuracy"].items()
                if arm != "policy"
            }
            rival = max(RIVALS, key=lambda arm: accuracy[arm].mean)
            left = 1 - accuracy[rival].mean
            out.append(
                Verdict(
                    experiment,
                    how,
                    accuracy,
                    {arm: Estimate.of(values) for arm, values in columns["actions"].items()},
                    {arm: Estimate.of(values) for arm, values in columns["deletes"].items()},
                    above,
                    (1 - accuracy["policy"].mean) / left if left else math.nan,
                    rival,
                    all(_low(accuracy["policy"]) > _high(accuracy[arm]) for arm in RIVALS),
                    _low(accuracy["blocked"]) <= _high(accuracy["twin"]),
                )
            )
    return out


def write(study: Study, pairs: Sequence[Pair], folder: Path) -> None:
    """results.csv, results.md and results.png in the study's folder; the table on the terminal too."""
    from rl_backspace.picture import draw_study

    records = list(rows(pairs, folder))
    found = verdicts(records)
    places = [folder / pair.id / which for pair in pairs for which in ("policy", "twin")]
    seconds = sum((RunFolder.open(place).summary() or {})["seconds"] for place in places)
    text = page(study, found, len(places), seconds)
    with atomically(folder / "results.csv") as temporary:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        temporary.write_text(stream.getvalue(), encoding="utf-8")
    with atomically(folder / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomically(folder / "results.png") as temporary:
        curves = {(p.experiment, p.seed, w): _controls(folder / p.id / w) for p in pairs for w in ("policy", "twin")}
        draw_study(found, curves, temporary)
    print(text)


def page(study: Study, found: Sequence[Verdict], runs: int, seconds: float) -> str:
    """The table and what it says, in Markdown; every number from the results."""
    lines = [
        "| task | decoding | delete token | blocked | random times | twin | likeliest of n | commonest of n | errors |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        cells = [_percent(one.accuracy[arm]) for arm in ARMS]
        cells[0] = f"**{cells[0]}**" if one.beats else cells[0]
        cells[-2] += f" (n = {one.actions['best_of'].mean / one.actions['twin'].mean:.2g})"
        lines.append(f"| {one.experiment} | {one.decoding} | {' | '.join(cells)} | × {one.errors:.2f} |")
    tasks = dict.fromkeys(one.experiment for one in found)
    won = [task for task in tasks if all(one.beats for one in found if one.experiment == task)]
    lines += ["", EXPLANATION.format(seeds=", ".join(map(str, study.seeds))), ""]
    lines += [
        f"The delete token wins {sum(one.beats for one in found)} of {len(found)} comparisons; by both decodings on "
        f"{', '.join(won) if won else 'no task'}.",
        "",
    ]
    for one in found:
        gap = 100 * (one.accuracy["blocked"].mean - one.accuracy["twin"].mean)
        lines += [
            f"- {one.experiment}, {one.decoding}: {_percent(one.above['twin'], '+')} over the twin, "
            f"{_percent(one.above[one.rival], '+')} over its best rival ({ARMS[one.rival]}). Blocked it is {gap:+.1f} "
            f"points from the twin: the gain is {'gone' if one.gone else 'not gone'}. "
            f"{one.actions['policy'].mean:.1f} actions and {one.deletes['policy'].mean:.2f} deletes per answer; the "
            f"twin {one.actions['twin'].mean:.1f} actions."
        ]
    return "\n".join([*lines, "", f"Compute: {runs} runs, {seconds / 3600:.1f} hours of one core in all.", ""])


def _percent(value: Estimate, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f}" + (
        "" if value.low is None else f" ± {50 * (_high(value) - _low(value)):.1f}"
    )


def _low(value: Estimate) -> float:
    return value.mean if value.low is None else value.low


def _high(value: Estimate) -> float:
    return value.mean if value.high is None else value.high
