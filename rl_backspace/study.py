"""Does deleting help? Each experiment and its twin, over seeds, and one table of what came out.

The twin has the same base model, data and seed, no delete token, and no fewer training actions than the policy had,
in the warm-up (on clean answers) and in RL. The policy runs first, since only then is it known how many those are.

A study file, in YAML:

    name: study
    seeds: [0, 1, 2]
    experiments:                     # name: an experiment file, and overrides of it
      signs: {config: experiments/arith.yaml, set: ["trainer.max_steps=400"]}
      keep: {config: experiments/arith.yaml, set: ["delete.memory=keep"], twin: signs}    # beside that one's twin

config.yaml, summary.json and controls.json of each run are all that the results are written from.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from rl_backspace.compare import Estimate
from rl_backspace.config import Config, Seed, Strict, is_name, override, parse, read_yaml, validate
from rl_backspace.controls import TRIES
from rl_backspace.errors import UserError, one_line
from rl_backspace.experiment import WARMUP_DEFAULTS
from rl_backspace.folder import atomically, is_run, refuse_existing
from rl_backspace.sweep import claimed, is_config, is_finished, move_aside, resolve, run_all, tell

DECODINGS = ("sampled", "greedy")
ARMS = {
    "policy": "delete token",
    "blocked": "blocked",
    "own_tries": "blocked, n tries",
    "random": "random times",
    "twin": "twin",
    "twin_tries": "twin, n tries",
}
RIVALS = ("blocked", "own_tries", "twin", "twin_tries")
EXPLANATION = (
    "Accuracy in %, mean over seeds with its 95 % t-interval. *Blocked*: the same weights, deletes illegal. *Twin*: no "
    "delete token, the same base, data and seed, and no fewer training actions. *n tries*: the better one, seed by "
    "seed, of the likeliest and the commonest of n answers without deletes, the first greedy or all sampled; n is the "
    "least number that costs no fewer actions than the policy's answers. *Random times*: as many deletes, whatever is "
    "there. Bold: above blocked, twin and tries, with intervals that do not overlap. Errors: as a multiple of the best "
    "rival's. `study FILE --only TASK --out FOLDER` runs a task's rows again."
)
COLUMNS = ("experiment", "seed", "decoding", "arm", "accuracy", "actions", "deletes", "n")
KEPT = "study.yaml"
MARKS = ("<!-- study -->", "<!-- /study -->")
TWIN = ("delete.tokens={}", "warmup.clean=1", "warmup.beta=0", "warmup.group=1")


class Entry(Strict):
    config: str
    set: tuple[str, ...] = Field(default=(), strict=False, description="overrides, as on the command line")
    twin: str | None = Field(default=None, description="the experiment whose twin is this one's too; null: its own")


class Study(Strict):
    name: Annotated[str, AfterValidator(is_name)]
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    experiments: dict[Annotated[str, AfterValidator(is_name)], Entry] = Field(min_length=1)


@dataclass(frozen=True)
class Pair:
    """One experiment with one seed: the policy's config and, once it has run, the twin's.

    Attributes:
        beside: the experiment whose twin this policy is compared with; None: its own.
    """

    experiment: str
    seed: int
    file: str
    overrides: tuple[str, ...]
    beside: str | None = None

    @property
    def id(self) -> str:
        return f"{self.experiment}-{self.seed}"

    def runs(self, folder: Path) -> tuple[Path, Path]:
        """Where the policy and the twin that it is compared with are."""
        return folder / self.id / "policy", folder / f"{self.beside or self.experiment}-{self.seed}" / "twin"

    def arguments(self, extra: Sequence[str] = ()) -> list[str]:
        return [*self.overrides, f"seed={self.seed}", f"evaluation.controls={TRIES}", *extra]

    def config(self, extra: Sequence[str] = ()) -> Config:
        content = read_yaml(Path(self.file))
        override(content, self.arguments(extra))
        return parse(content)

    def command(self, out: Path, extra: Sequence[str] = ()) -> list[str]:
        return [sys.executable, "-m", "rl_backspace", "train", self.file, *self.arguments(extra), "--out", str(out)]

    def twin(self, policy: Path) -> list[str]:
        """The overrides that make the twin of a policy that has run.

        Its warm-up sees as many answers in a step, each of another prompt, and has no KL term, which is there to mend
        what deleting does. Its steps are the policy's, times what the policy's examples and rollouts were longer than
        its own will be: than the shorter of reference answers and the base model's.
        """
        summary, warmup = _summary(policy), self.config().warmup
        length = min(summary["reference_actions"], summary["actions_per_answer"]["base"]["blocked"]["sampled"])
        changes = list(TWIN)
        if warmup.steps:
            batch = warmup.trainer.get("per_device_train_batch_size", WARMUP_DEFAULTS["per_device_train_batch_size"])
            examples = warmup.steps * warmup.group * batch * warmup.trainer.get("gradient_accumulation_steps", 1)
            longer = max(1, summary["warmup_actions"] / examples / length)
            changes += [
                f"warmup.steps={math.ceil(warmup.steps * longer)}",
                f"warmup.trainer.per_device_train_batch_size={batch * warmup.group}",
            ]
        if summary["steps"]:
            longer = max(1, summary["actions"] / summary["rollouts"] / length)
            changes.append(f"trainer.max_steps={math.ceil(summary['steps'] * longer)}")
        spent = max(_controls(policy)[how]["arms"]["allowed"]["actions_per_answer"] for how in DECODINGS)
        return [*changes, f"evaluation.controls={max(TRIES, math.ceil(1.5 * spent / length))}"]


def read(path: Path) -> tuple[Study, list[Pair]]:
    """A study file, with the settings of every policy and twin checked.

    Raises:
        UserError: mistakes in it or in one of its experiments, a line each.
    """
    problems: list[str] = []
    study = validate(Study, read_yaml(path), problems)
    if study is None:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    pairs = [
        Pair(name, seed, entry.config, entry.set, entry.twin)
        for seed in study.seeds
        for name, entry in study.experiments.items()
    ]
    of = {pair.id: pair for pair in pairs}
    if len(set(study.seeds)) < len(study.seeds):
        problems.append(f"{path}: seeds: got {study.seeds}; give each once")
    told: dict[str, list[str]] = {}
    for pair in pairs:
        try:
            base = read_yaml(Path(pair.file))
        except UserError as error:
            problems.append(f"{path}: experiments.{pair.experiment}: {error}")
            continue
        config, lines = resolve(base, pair.arguments(), told)
        if not lines:
            lines = resolve(base, pair.arguments(TWIN), told)[1]
        if config is not None and ("{seed}" in config.model or is_run(Path(config.model)) or not config.delete.tokens):
            lines = ["a study trains the policy from its base model, with a delete token; change that key"]
        if not lines and pair.beside is not None:
            lines = _beside(pair, of.get(f"{pair.beside}-{pair.seed}"))
        problems += [f"{path}: experiments.{pair.experiment}: {line}" for line in lines]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return study, pairs


def _beside(pair: Pair, other: Pair | None) -> list[str]:
    """What is wrong with comparing a policy with another experiment's twin."""
    if other is None or other.beside is not None:
        return [f"twin: got {pair.beside!r}; expected an experiment of this study that has a twin of its own"]
    try:
        ours, theirs = pair.config(), other.config()
    except UserError:  # told where it stands
        return []
    for key in ("model", "task", "lora", "algorithm", "evaluation"):
        if getattr(ours, key) != getattr(theirs, key):
            return [f"twin: {pair.beside} has another {key}, so its twin is no twin of this one; leave twin out"]
    return []


def run_study(
    path: Path, out: Path | None, jobs: int, dry_run: bool, only: Sequence[str] = (), into: Path | None = None
) -> int:
    """Run what is left of a study, seed by seed the policies and then their twins, and write what came out.

    Args:
        only: experiments to run, with those whose twins they need; none: all. Those that are there are written, all.
        into: a Markdown file, which gets the table between its lines `MARKS`.

    Returns:
        The exit code: 1 where a run failed, 130 where Ctrl-C ended it.

    Raises:
        UserError: mistakes in the file, an unknown experiment, a folder that holds something else, or no marks.
    """
    study, pairs = read(path)
    chosen = _chosen(study, only)
    if into is not None:
        _between_marks(into)
    folder = out or Path("runs") / study.name
    if not (folder / KEPT).is_file():
        refuse_existing(folder)
    policies = {pair.id: pair.runs(folder)[0] for pair in pairs}
    twins = {pair.id: pair.runs(folder)[1] for pair in pairs if pair.beside is None}
    for pair in pairs:
        _is_done(policies[pair.id], pair)
        if pair.beside is None:
            _is_done(twins[pair.id], pair, policies[pair.id])
    if dry_run:
        chosen_pairs = [pair for pair in pairs if pair.experiment in chosen]
        print(*dict.fromkeys(place for pair in chosen_pairs for place in pair.runs(folder)), sep="\n")
        return 0
    failed, interrupted = False, False
    with claimed(folder) as lock:
        text = path.read_bytes()
        with atomically(folder / KEPT) as temporary:
            temporary.write_bytes(text)
        try:
            for seed in study.seeds:
                mine = [pair for pair in pairs if pair.seed == seed and pair.experiment in chosen]
                failed |= _run(mine, policies, {}, jobs, lock)
                mine = [pair for pair in mine if pair.id in twins and is_finished(policies[pair.id])]
                failed |= _run(mine, twins, policies, jobs, lock)
        except KeyboardInterrupt:
            print("interrupted; the same command does the others", file=sys.stderr)
            interrupted = True
    complete = [pair for pair in pairs if all(map(is_finished, pair.runs(folder)))]
    if complete:
        table = write(complete, [pair.id for pair in pairs if pair not in complete], folder)
        if into is not None:
            before, after = _between_marks(into)
            with atomically(into) as temporary:
                temporary.write_text(f"{before}{MARKS[0]}\n{table}{MARKS[1]}{after}", encoding="utf-8")
    return 130 if interrupted else int(failed)


def _between_marks(path: Path) -> tuple[str, str]:
    """What stands before the table's place in a Markdown file, and after it."""
    try:
        before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    except (OSError, ValueError) as error:
        raise UserError(f"--into {path}: {one_line(error)}; give a Markdown file") from error
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise UserError(f"--into {path}: no lines {MARKS[0]} and {MARKS[1]}; add them where the table is to go")
    return before, after


def _chosen(study: Study, only: Sequence[str]) -> set[str]:
    """The experiments to run."""
    if unknown := [name for name in only if name not in study.experiments]:
        raise UserError(f"--only {unknown[0]}: not in the study; it has {', '.join(study.experiments)}")
    names = set(only or study.experiments)
    return names | {twin for name in names if (twin := study.experiments[name].twin)}


def _run(pairs: Sequence[Pair], places: Mapping[str, Path], policies: Mapping[str, Path], jobs: int, lock: int) -> bool:
    """Run those that are not there; with `policies` they are their twins. Whether one failed, which is told."""
    commands: dict[str, list[str]] = {}
    for pair in pairs:
        place, policy = places[pair.id], policies.get(pair.id)
        if not _is_done(place, pair, policy):
            move_aside(place)
            place.parent.mkdir(exist_ok=True)
            commands[pair.id] = pair.command(place, pair.twin(policy) if policy else [])
    failures = run_all(commands, {pair.id: places[pair.id] for pair in pairs}, jobs, lock)
    tell(failures, places)
    return bool(failures)


def _is_done(place: Path, pair: Pair, policy: Path | None = None) -> bool:
    """Whether this run is there already; with `policy` it is its twin.

    Raises:
        UserError: another one is there.
    """
    if not is_finished(place):
        return False
    if policy and not is_finished(policy):
        raise UserError(
            f"{place}: a twin whose policy {policy} is not there; remove the twin, or bring the policy back"
        )
    if not is_config(place / "config.yaml", pair.config(pair.twin(policy) if policy else [])):
        raise UserError(f"{place}: made with another config, since the study or its experiment changed; give --out")
    return True


# what came out


def rows(pairs: Sequence[Pair], folder: Path) -> Iterator[dict[str, Any]]:
    """Accuracy, actions and deletes per answer of each arm: by experiment, seed and decoding."""
    for pair in pairs:
        policy, twin = map(_controls, pair.runs(folder))
        for how in DECODINGS:
            arms = policy[how]["arms"]
            spent = arms["allowed"]["actions_per_answer"]
            cells = {
                "policy": arms["allowed"],
                "blocked": arms["blocked"],
                "own_tries": _tries(policy, how, spent),
                "random": arms["random"],
                "twin": twin[how]["arms"]["allowed"],
                "twin_tries": _tries(twin, how, spent),
            }
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


def _tries(found: Any, how: str, spent: float) -> dict[str, float]:
    """The best use of tries that cost no fewer actions than this: the likeliest or the commonest, of this decoding's
    and sampled ones or of sampled ones alone."""
    choices = []
    for decoding in dict.fromkeys((how, "sampled")):
        for arm in ("best_of", "majority"):
            tries = found[decoding]["curve"][arm]
            n = next((n for n, (actions, _) in enumerate(tries, 1) if actions >= spent - 1e-9), len(tries))
            actions, accuracy = tries[n - 1]
            choices.append({"accuracy": accuracy, "actions_per_answer": actions, "deletes_per_answer": 0.0, "n": n})
    return max(choices, key=lambda choice: choice["accuracy"])


def _controls(run: Path) -> Any:
    return _content(run, "controls.json", lambda found: [found[how]["arms"]["allowed"] for how in DECODINGS])


def _summary(run: Path) -> Any:
    keys = ("seconds", "warmup_actions", "actions", "rollouts", "reference_actions", "steps")
    return _content(run, "summary.json", lambda found: [*(found[key] for key in keys), _stages(found)])


def _stages(summary: Any) -> dict[str, dict[str, float]]:
    """Accuracy by decoding, of the base model and after the warm-up."""
    stages = {"base": summary["accuracy"]["base"]["blocked"], "before": summary["accuracy"]["before"]["allowed"]}
    return {stage: {how: float(cell[how]) for how in DECODINGS} for stage, cell in stages.items()}


def _content(run: Path, file: str, check: Callable[[Any], Any]) -> Any:
    """What a run's file holds; raises UserError where that is not what `train` writes."""
    try:
        found = json.loads((run / file).read_text(encoding="utf-8"))
        check(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: {file} is not what `train` writes ({one_line(error)}); remove the run") from error
    return found


@dataclass(frozen=True)
class Verdict:
    """One experiment by one decoding, over seeds.

    Attributes:
        seeds: how many.
        accuracy, actions, deletes, n: by arm.
        above: the policy over each other arm, seed by seed.
        left: blocked over the twin, seed by seed: what of the gain is there without deleting.
        rival: the arm that is best of those without deletes.
    """

    experiment: str
    decoding: str
    seeds: int
    accuracy: dict[str, Estimate]
    actions: dict[str, Estimate]
    deletes: dict[str, Estimate]
    n: dict[str, Estimate]
    above: dict[str, Estimate]
    left: Estimate
    rival: str

    @property
    def beats(self) -> bool:
        """Whether the policy's interval lies above that of every rival, and no tries spend fewer actions."""
        mine = self.accuracy["policy"]
        fair = all(self.actions[arm].mean >= self.actions["policy"].mean - 1e-9 for arm in ("own_tries", "twin_tries"))
        return self.seeds > 1 and fair and all(mine.low > self.accuracy[arm].high for arm in RIVALS)  # type: ignore[operator]

    @property
    def errors(self) -> float | None:
        """The policy's errors as a multiple of its best rival's; None where that makes none."""
        theirs = 1 - self.accuracy[self.rival].mean
        return (1 - self.accuracy["policy"].mean) / theirs if theirs > 0 else None

    @property
    def blocking(self) -> str:
        """Whether blocking the token takes the gain over the twin away."""
        gain = self.above["twin"]
        if self.seeds < 2 or gain.low <= 0:  # type: ignore[operator]
            return "no gain is shown"
        if self.left.high < gain.mean / 2:  # type: ignore[operator]
            return "the gain goes"
        return "some of the gain stays" if self.left.low > 0 else "what stays cannot be told"  # type: ignore[operator]


def verdicts(records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """What the rows come to, for each experiment and decoding."""
    found = []
    for experiment in dict.fromkeys(record["experiment"] for record in records):
        for how in DECODINGS:
            mine = [r for r in records if (r["experiment"], r["decoding"]) == (experiment, how)]
            columns = {
                key: {arm: [float(r[key]) for r in mine if r["arm"] == arm] for arm in ARMS}
                for key in ("accuracy", "actions", "deletes", "n")
            }
            right = columns["accuracy"]
            others = [arm for arm in ARMS if arm != "policy"]
            found.append(
                Verdict(
                    experiment,
                    how,
                    len(right["policy"]),
                    **{
                        key: {arm: Estimate.of(values) for arm, values in arms.items()} for key, arms in columns.items()
                    },
                    above={arm: _over(right["policy"], right[arm]) for arm in others},
                    left=_over(right["blocked"], right["twin"]),
                    rival=sorted(RIVALS, key=lambda arm, right=right: sum(right[arm]))[-1],  # type: ignore[misc]
                )
            )
    return found


def _over(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    return Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])


def write(pairs: Sequence[Pair], missing: Sequence[str], folder: Path) -> str:
    """results.csv, results.md and results.png in the study's folder, and the page on the terminal; its table."""
    from rl_backspace.picture import draw_study

    records = list(rows(pairs, folder))
    found = verdicts(records)
    table = table_of(found)
    text = "\n".join([table, *details(found, pairs, missing, folder), ""])
    print(text)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    for name, content in (("results.csv", stream.getvalue()), ("results.md", text)):
        with atomically(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    with atomically(folder / "results.png") as temporary:
        curves = {
            (pair.experiment, pair.seed, which): _controls(run)
            for pair in pairs
            for which, run in zip(("policy", "twin"), pair.runs(folder), strict=True)
        }
        draw_study(found, curves, temporary)
    return table


def table_of(found: Sequence[Verdict]) -> str:
    """The table and how to read it, in Markdown."""
    lines = [f"| task | decoding | {' | '.join(ARMS.values())} | errors |", f"|---|---|{'---:|' * (len(ARMS) + 1)}"]
    for one in found:
        cells = {arm: _percent(one.accuracy[arm]) for arm in ARMS}
        if one.beats:
            cells["policy"] = f"**{cells['policy']}**"
        for arm in ("own_tries", "twin_tries"):
            cells[arm] += f" (n {one.n[arm].mean:.3g})"
        errors = "–" if one.errors is None else f"× {one.errors:.2f}"
        lines.append(f"| {one.experiment} | {one.decoding} | {' | '.join(cells.values())} | {errors} |")
    tasks = dict.fromkeys(one.experiment for one in found)
    won = [task for task in tasks if all(one.beats for one in found if one.experiment == task)]
    lines += [
        "",
        EXPLANATION,
        "",
        f"The delete token wins {sum(one.beats for one in found)} of {len(found)} comparisons; by both decodings on "
        f"{', '.join(won) if won else 'no task'}.",
    ]
    return "\n".join([*lines, ""])


def details(found: Sequence[Verdict], pairs: Sequence[Pair], missing: Sequence[str], folder: Path) -> list[str]:
    """What the results say beyond the table, a line each."""
    lines = []
    for one in found:
        lines += [
            f"- {one.experiment}, {one.decoding}: {_percent(one.above['twin'], '+')} over the twin, "
            f"{_percent(one.above[one.rival], '+')} over its best rival ({ARMS[one.rival]}). Blocked it is "
            f"{_percent(one.left, '+')} from the twin: {one.blocking}. {one.actions['policy'].mean:.1f} actions and "
            f"{one.deletes['policy'].mean:.2f} deletes per answer; the twin {one.actions['twin'].mean:.1f} actions."
        ]
    lines += ["", *_training(pairs, folder)]
    if missing:
        lines += ["", f"Not there, and not counted: {', '.join(missing)}."]
    return lines


def _training(pairs: Sequence[Pair], folder: Path) -> list[str]:
    """What each side was trained on, and what that took."""
    lines, seconds = [], 0.0
    for experiment in dict.fromkeys(pair.experiment for pair in pairs):
        mine = [pair for pair in pairs if pair.experiment == experiment]
        policies, twins = zip(*(map(_summary, pair.runs(folder)) for pair in mine), strict=True)
        seconds += sum(summary["seconds"] for summary in (*policies, *(twins if mine[0].beside is None else ())))
        counted = ("warmup_actions", "actions")
        (warm, rl), (twin_warm, twin_rl) = (
            [sum(s[key] for s in side) for key in counted] for side in (policies, twins)
        )
        fewer = any(twin[key] < policy[key] for policy, twin in zip(policies, twins, strict=True) for key in counted)
        checked = "; its corrections are labelled by the task's check of prefixes" if _is_checked(mine[0]) else ""
        whose = f" of {mine[0].beside}" if mine[0].beside else ""
        base, before, twin_before = (
            " and ".join(f"{_percent(Estimate.of([_stages(s)[stage][how] for s in side]))} {how}" for how in DECODINGS)
            for stage, side in (("base", policies), ("before", policies), ("before", twins))
        )
        lines.append(
            f"- {experiment}, before RL: the base model {base}; after the warm-up {before}; the twin{whose} "
            f"{twin_before}."
        )
        lines.append(
            f"- {experiment}, seeds {', '.join(str(pair.seed) for pair in mine)}: trained on {warm:,} actions in the "
            f"warm-up and {rl:,} in RL{checked}. The twin{whose}: {twin_warm:,} and {twin_rl:,}"
            f"{', FEWER for some seed' if fewer else ''}."
        )
    count = len({run for pair in pairs for run in pair.runs(folder)})
    took = f"- {count} runs took {seconds / 3600:.1f} hours in all. The settings were chosen for the policy."
    return [*lines, took]


def _is_checked(pair: Pair) -> bool:
    """Whether corrections ask the task which prefixes can come right."""
    from rl_backspace.plugins import load_task

    config = pair.config()
    task = load_task(config.task.model_dump(), config.seed)
    return config.warmup.labels == "prefixes" and task.without_checks().alive is not task.alive


def _percent(value: Estimate, sign: str = "") -> str:
    half = "" if value.low is None or value.high is None else f" ± {50 * (value.high - value.low):.1f}"
    return f"{100 * value.mean:{sign}.1f}{half}"
