"""Does deleting help? Each experiment and its twin, over seeds, and one table of what came out.

The twin has the same base model, data and seed, no delete token, and no fewer training actions than the policy had,
in the warm-up (on clean answers) and in RL. The policy runs first, since only then is it known how many those are.

A study file, in YAML:

    name: study
    seeds: [0, 1, 2]
    experiments:                     # name: an experiment file, and overrides of it
      signs: {config: experiments/arith.yaml, set: ["trainer.max_steps=400"]}
      keep: {config: experiments/arith.yaml, set: ["delete.memory=keep"], twin: signs}    # beside that one's twin

The results are written from config.yaml, summary.json and controls.json of each run, and nothing else.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, AliasPath, BaseModel, Field, PositiveFloat, ValidationError

from rl_backspace.compare import Estimate, differences
from rl_backspace.config import Config, Seed, Strict, is_name, override, parse, read_yaml, validate
from rl_backspace.controls import TRIES
from rl_backspace.errors import UserError, one_line
from rl_backspace.experiment import WARMUP_DEFAULTS
from rl_backspace.folder import atomically, is_run, refuse_existing
from rl_backspace.sweep import Job, claimed, is_config, is_finished, move_aside, resolve, run_all, tell

DECODINGS = ("sampled", "greedy")
ARMS = {
    "policy": "delete token",
    "blocked": "blocked",
    "own_tries": "blocked, n tries",
    "random": "random times",
    "twin": "twin",
    "twin_tries": "twin, n tries",
}
TRAINED = ("warmup_actions", "rl_actions")
RIVALS = ("blocked", "own_tries", "twin", "twin_tries")
EXPLANATION = (
    "Accuracy in %, mean over seeds with its 95 % t-interval. *Blocked*: the same weights, deletes illegal. *Twin*: no "
    "delete token, the same base, data and seed, and no fewer training actions. *n tries*: the better one, seed by "
    "seed, of the likeliest and the commonest of n answers without deletes, the first greedy or all sampled; n is the "
    "least number that costs no fewer actions than the policy's answers. *Random times*: as many deletes, whatever is "
    "there. Bold: above blocked, twin and tries, with intervals that do not overlap. Errors: as a multiple of the best "
    "rival's. `study FILE --only TASK --out FOLDER` runs a task's rows again."
)
COLUMNS = (
    *("experiment", "seed", "decoding", "arm", "accuracy", "actions", "deletes", "n"),
    *TRAINED,
)
KEPT = "study.yaml"
MARKS = ("<!-- study -->", "<!-- /study -->")
LONGER = 1.03  # what a twin is to be trained on, over what it needs: its answers may get shorter in training
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
        its own will be: than the shorter of reference answers and the base model's, and `LONGER`.
        """
        summary, warmup = _summary(policy), self.config().warmup
        length = min(summary.reference_actions, summary.base_actions)
        changes = list(TWIN)
        if warmup.steps:
            batch = warmup.trainer.get("per_device_train_batch_size", WARMUP_DEFAULTS["per_device_train_batch_size"])
            examples = warmup.steps * warmup.group * batch * warmup.trainer.get("gradient_accumulation_steps", 1)
            longer = max(1, LONGER * summary.warmup_actions / examples / length)
            changes += [
                f"warmup.steps={math.ceil(warmup.steps * longer)}",
                f"warmup.trainer.per_device_train_batch_size={batch * warmup.group}",
            ]
        if summary.steps:
            longer = max(1, LONGER * summary.actions / max(1, summary.rollouts) / length)
            changes.append(f"trainer.max_steps={math.ceil(summary.steps * longer)}")
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
        configs = pair.config(), other.config()
    except UserError:  # told where it stands
        return []
    same = {"model", "task", "lora", "algorithm", "evaluation"}
    ours, theirs = (
        {**config.model_dump(include=same), "trainer": {**config.trainer, "max_steps": 0}} for config in configs
    )
    different = next((key for key in ours if ours[key] != theirs[key]), None)
    if different is None:
        return []
    return [f"twin: {pair.beside} has another {different}, so its twin is no twin of this one; leave twin out"]


def run_study(
    path: Path, out: Path | None, jobs: int, dry_run: bool, only: Sequence[str] = (), into: Path | None = None
) -> int:
    """Run what is left of a study, seed by seed the policies and then their twins, and write what came out. With more
    jobs, whatever can start does.

    Args:
        only: experiments to run, with those whose twins they need; none: all. Those that are there are written, all.
        into: a Markdown file, which gets the table between its lines `MARKS`.

    Returns:
        The exit code: 1 where a run failed, 130 where Ctrl-C ended it.

    Raises:
        UserError: mistakes in the file, an unknown experiment, a folder that holds something else, no marks, or
            results that cannot be written.
    """
    study, pairs = read(path)
    chosen = _chosen(study, only)
    if into is not None:
        _between_marks(into)
    folder = out or Path("runs") / study.name
    if not (folder / KEPT).is_file():
        refuse_existing(folder)
    others = set()  # of pairs that are not to run: made with another config, and so not counted
    for pair in pairs:
        policy, twin = pair.runs(folder)
        try:
            _is_done(policy, pair)
            if pair.beside is None:
                _is_done(twin, pair, policy)
        except UserError:
            if pair.experiment in chosen:
                raise
            others.add(pair.id)
    wanted = [pair for pair in pairs if pair.experiment in chosen]
    if dry_run:
        print(*dict.fromkeys(place for pair in wanted for place in pair.runs(folder)), sep="\n")
        return 0
    failures, interrupted = dict[str, str](), False
    with claimed(folder) as lock:
        todo = _left(wanted, folder)
        text = path.read_bytes()
        with atomically(folder / KEPT) as temporary:
            temporary.write_bytes(text)
        try:
            for job in todo.values():
                move_aside(job.place)
                job.place.parent.mkdir(exist_ok=True)
            total = len({place for pair in wanted for place in pair.runs(folder)})
            run_all(todo, total, jobs, lock, failures)
        except KeyboardInterrupt:
            print("interrupted; the same command does the others", file=sys.stderr)
            interrupted = True
        finally:
            tell(failures, {id: job.place for id, job in todo.items()})
    complete = [
        pair
        for pair in pairs
        if not others & {pair.id, f"{pair.beside}-{pair.seed}"} and all(map(is_finished, pair.runs(folder)))
    ]
    if complete:
        place = str(folder)
        try:
            table, page = write(complete, [pair.id for pair in pairs if pair not in complete], folder)
            if into is not None:
                place = f"--into {into}"
                _insert(table, into)
        except OSError as error:
            said = f"{place}: the results could not be written: {one_line(error)}"
            raise UserError(f"{said}; the runs are kept: mend that and give the same command again") from error
        print(page)
    return 130 if interrupted else int(bool(failures))


def _insert(table: str, page: Path) -> None:
    before, after = _between_marks(page)
    ends = "\r\n" if before.endswith("\r\n") else "\n"
    with atomically(page.resolve()) as temporary:
        temporary.write_bytes(f"{before}{table.replace(chr(10), ends)}{after}".encode())
        shutil.copymode(page, temporary)


def _between_marks(path: Path) -> tuple[str, str]:
    """What stands before the table's place in a Markdown file, its first mark included, and what from the last one on;
    line ends as they are."""
    try:
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UserError(f"--into {path}: {one_line(error)}; give a Markdown file") from error
    first, last = ([*re.finditer(rf"^{mark}[ \t]*\r?(?:\n|\Z)", text, re.M)] for mark in MARKS)
    if len(first) != 1 or len(last) != 1 or first[0].end() > last[0].start():
        raise UserError(
            f"--into {path}: expected one line {MARKS[0]} and below it one line {MARKS[1]}; "
            f"got {len(first)} and {len(last)}; put them where the table is to go"
        )
    return text[: first[0].end()], text[last[0].start() :]


def _chosen(study: Study, only: Sequence[str]) -> set[str]:
    """The experiments to run."""
    if unknown := [name for name in only if name not in study.experiments]:
        raise UserError(f"--only {unknown[0]}: not in the study; it has {', '.join(study.experiments)}")
    names = set(only or study.experiments)
    return names | {twin for name in names if (twin := study.experiments[name].twin)}


def _left(pairs: Sequence[Pair], folder: Path) -> dict[str, Job]:
    """The runs that are not there, seed by seed the policies and then their twins.

    Raises:
        UserError: another one is there, or what a policy left is not what its twin needs.
    """
    todo: dict[str, Job] = {}
    for seed in dict.fromkeys(pair.seed for pair in pairs):
        mine = [pair for pair in pairs if pair.seed == seed]
        for pair in mine:
            place, _ = pair.runs(folder)
            if not _is_done(place, pair):
                todo[f"{pair.id}/policy"] = Job(place, functools.partial(pair.command, place))
        for pair in mine:
            policy, place = pair.runs(folder)
            if pair.beside is None and not _is_done(place, pair, policy):
                after = f"{pair.id}/policy"
                command = functools.partial(_twin, pair, policy, place)
                if after not in todo:
                    command()  # refuses a policy that is not whole now, not after the other runs
                todo[f"{pair.id}/twin"] = Job(place, command, after if after in todo else None)
    return todo


def _twin(pair: Pair, policy: Path, place: Path) -> list[str]:
    """The command of a policy's twin.

    Raises:
        UserError: the policy is not whole, or the experiment has changed since.
    """
    _is_done(policy, pair)
    return pair.command(place, pair.twin(policy))


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
    wanted = pair.config(pair.twin(policy) if policy else [])
    if not is_config(place / "config.yaml", wanted) and not (policy and _is_long_enough(place, wanted, policy)):
        raise UserError(f"{place}: made with another config, since the study or its experiment changed; give --out")
    return True


def _is_long_enough(place: Path, wanted: Config, policy: Path) -> bool:
    """Whether a twin was trained on no fewer actions than its policy, and has another config than the wanted one only
    in its numbers of steps."""
    try:
        found = parse(read_yaml(place / "config.yaml"))
    except UserError:
        return False
    ours, theirs = _summary(policy), _summary(place)
    steps = {key: value for key, value in wanted.trainer.items() if key == "max_steps"}
    warmup = found.warmup.model_copy(update={"steps": wanted.warmup.steps})
    same = found.model_copy(update={"warmup": warmup, "trainer": {**found.trainer, **steps}}) == wanted
    return same and theirs.warmup_actions >= ours.warmup_actions and theirs.actions >= ours.actions


# what came out


def rows(pairs: Sequence[Pair], folder: Path) -> Iterator[dict[str, Any]]:
    """Accuracy, actions and deletes per answer of each arm: by experiment, seed and decoding."""
    for pair in pairs:
        place, beside = pair.runs(folder)
        policy, twin = _controls(place, _Controls[_PolicyArms]), _controls(beside)
        ours, theirs = _summary(place), _summary(beside)
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
                trained = theirs if arm in ("twin", "twin_tries") else ours
                yield {
                    "experiment": pair.experiment,
                    "seed": pair.seed,
                    "decoding": how,
                    "arm": arm,
                    "accuracy": cell["accuracy"],
                    "actions": cell["actions_per_answer"],
                    "deletes": cell["deletes_per_answer"],
                    "n": cell.get("n", 1),
                    "warmup_actions": trained.warmup_actions,
                    "rl_actions": trained.actions,
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


class _Cell(BaseModel):
    accuracy: float
    actions_per_answer: PositiveFloat
    deletes_per_answer: float


class _TwinArms(BaseModel):
    allowed: _Cell


class _PolicyArms(_TwinArms):
    blocked: _Cell
    random: _Cell


class _Curve(BaseModel):
    best_of: list[tuple[float, float]] = Field(min_length=1)
    majority: list[tuple[float, float]] = Field(min_length=1)


Arms = TypeVar("Arms", _PolicyArms, _TwinArms)


class _Examined(BaseModel, Generic[Arms]):
    arms: Arms
    curve: _Curve


class _Controls(BaseModel, Generic[Arms]):
    """What is read of controls.json."""

    sampled: _Examined[Arms]
    greedy: _Examined[Arms]


class _Accuracy(BaseModel):
    sampled: float
    greedy: float


class _Summary(BaseModel):
    """What is read of summary.json."""

    seconds: float
    warmup_actions: int
    actions: int
    rollouts: int
    steps: int
    reference_actions: PositiveFloat
    base_actions: PositiveFloat = Field(validation_alias=AliasPath("actions_per_answer", "base", "blocked", "sampled"))
    base: _Accuracy = Field(validation_alias=AliasPath("accuracy", "base", "blocked"))
    before: _Accuracy = Field(validation_alias=AliasPath("accuracy", "before", "allowed"))


def _controls(run: Path, model: type[BaseModel] = _Controls[_TwinArms]) -> Any:
    """Whole, for the picture; checked where the results are read of it."""
    return _content(run / "controls.json", model)[0]


def _summary(run: Path) -> _Summary:
    return _content(run / "summary.json", _Summary)[1]


Content = TypeVar("Content", bound=BaseModel)


def _content(path: Path, model: type[Content]) -> tuple[Any, Content]:
    """What a run's file holds, and what is read of it; raises UserError where that is not what `train` writes."""
    try:
        text = path.read_bytes()
        return json.loads(text), model.model_validate_json(text)
    except (OSError, ValueError) as error:  # pydantic's is one too
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else one_line(error)
        raise UserError(f"{path.parent}: {path.name} is not what `train` writes ({reason}); remove the run") from error


@dataclass(frozen=True)
class Verdict:
    """One experiment by one decoding, over seeds.

    Attributes:
        seeds: how many.
        accuracy, actions, deletes, n: by arm.
        above: the policy over each other arm, seed by seed.
        left: blocked over the twin, seed by seed: what of the gain is there without deleting.
        rival: the arm that is best of those without deletes.
        fewer: whether the twin was trained on fewer actions than the policy, in the warm-up or RL of some seed.
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
    fewer: bool

    @property
    def beats(self) -> bool:
        """Whether the policy's interval lies above that of every rival, none of which had less to spend or to learn
        from."""
        mine = self.accuracy["policy"]
        fair = all(self.actions[arm].mean >= self.actions["policy"].mean - 1e-9 for arm in ("own_tries", "twin_tries"))
        fair &= not self.fewer
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
                for key in ("accuracy", "actions", "deletes", "n", *TRAINED)
            }
            trained = {key: columns.pop(key) for key in TRAINED}
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
                    fewer=any(
                        theirs < ours
                        for arms in trained.values()
                        for ours, theirs in zip(arms["policy"], arms["twin"], strict=True)
                    ),
                    rival=sorted(RIVALS, key=lambda arm, right=right: sum(right[arm]))[-1],  # type: ignore[misc]
                )
            )
    return found


def _over(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    return Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])


def write(pairs: Sequence[Pair], missing: Sequence[str], folder: Path) -> tuple[str, str]:
    """results.csv, results.md and results.png in the study's folder; the page's table, and all of it."""
    from rl_backspace.picture import draw_study

    records = list(rows(pairs, folder))
    found = verdicts(records)
    table = table_of(found, missing, changes_of(pairs))
    text = "\n".join([table, *details(found, pairs, folder), ""])
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
            if pair.beside is None
            for which, run in zip(("policy", "twin"), pair.runs(folder), strict=True)
        }
        drawn = {experiment for experiment, _, _ in curves}
        draw_study([one for one in found if one.experiment in drawn], curves, temporary)
    return table, text


@dataclass(frozen=True)
class Change:
    """What one experiment is another one with: the one whose twin it is beside, and the settings, as Markdown."""

    of: str
    text: str


def changes_of(pairs: Sequence[Pair]) -> dict[str, Change]:
    """By experiment, those that are beside another one's twin."""
    configs = {pair.experiment: _settings(pair.config()) for pair in pairs}
    found = {}
    for pair in pairs:
        if pair.beside is not None and pair.experiment not in found:
            told = differences([configs[pair.experiment], configs[pair.beside]])
            texts = [_code(f"{key}={mine}") for key, (mine, _) in told]
            found[pair.experiment] = Change(pair.beside, ", ".join(texts) or "the same again")
    return found


def _settings(config: Config) -> dict[str, Any]:
    """Those of an experiment, by section; what a setting holds is told whole."""
    return {
        section: {key: json.dumps(value) if isinstance(value, dict) else value for key, value in content.items()}
        if isinstance(content, dict)
        else content
        for section, content in config.model_dump(mode="json", exclude={"name", "seed", "evaluation"}).items()
    }


def _code(text: str) -> str:
    """A code span that a table's cell can hold."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{' '.join(text.split())}{fence}".replace("|", r"\|")


def table_of(found: Sequence[Verdict], missing: Sequence[str], changes: Mapping[str, Change]) -> str:
    """The table and how to read it, in Markdown; below it another one of what was changed in which experiment."""
    lines = [f"| task | decoding | {' | '.join(ARMS.values())} | errors |", f"|---|---|{'---:|' * (len(ARMS) + 1)}"]
    tasks = [one for one in found if one.experiment not in changes]
    most = max(one.seeds for one in found)
    for one in tasks:
        cells = {arm: _percent(one.accuracy[arm]) for arm in ARMS}
        if one.beats:
            cells["policy"] = f"**{cells['policy']}**"
        if one.fewer:
            cells["twin"] += " (trained on fewer actions)"
        for arm in ("own_tries", "twin_tries"):
            cells[arm] += f" (n {one.n[arm].mean:.3g})"
        errors = "–" if one.errors is None else f"× {one.errors:.2f}"
        name = f"{one.experiment}{_of_seeds(one, most)}"
        lines.append(f"| {name} | {one.decoding} | {' | '.join(cells.values())} | {errors} |")
    names = dict.fromkeys(one.experiment for one in tasks)
    won = [name for name in names if all(one.beats for one in tasks if one.experiment == name)]
    lines += [
        "",
        EXPLANATION,
        "",
        f"The delete token wins {sum(one.beats for one in tasks)} of {len(tasks)} comparisons; by both decodings on "
        f"{', '.join(won) if won else 'no task'}.",
    ]
    if changes:
        lines += ["", *_changed(found, changes)]
    if missing:
        lines += ["", f"Not there, and not counted: {', '.join(missing)}."]
    return "\n".join([*lines, ""])


def _changed(found: Sequence[Verdict], changes: Mapping[str, Change]) -> Iterator[str]:
    """A table of what was changed, each below the experiment that it was changed in."""
    of = {(one.experiment, one.decoding): one for one in found}
    yield "| changed | sampled | greedy | blocked: sampled, greedy | deletes per answer: sampled, greedy |"
    yield "|---|---:|---:|---:|---:|"
    for whole in dict.fromkeys(change.of for change in changes.values()):
        texts = {whole: f"{whole}, as above", **{n: f"{whole}, {c.text}" for n, c in changes.items() if c.of == whole}}
        for name, text in texts.items():
            sides = [of[name, how] for how in DECODINGS]
            text += _of_seeds(sides[0], of[whole, DECODINGS[0]].seeds)
            accuracy = " | ".join(_percent(one.accuracy["policy"]) for one in sides)
            blocked = ", ".join(_percent(one.accuracy["blocked"]) for one in sides)
            deletes = ", ".join(f"{one.deletes['policy'].mean:.2f}" for one in sides)
            yield f"| {text} | {accuracy} | {blocked} | {deletes} |"


def _of_seeds(one: Verdict, most: int) -> str:
    """How many seeds there are of it, where there are more of others."""
    return f" ({one.seeds} of {most} seeds)" if one.seeds < most else ""


def details(found: Sequence[Verdict], pairs: Sequence[Pair], folder: Path) -> list[str]:
    """What the results say beyond the table, a line each."""
    lines = []
    for one in found:
        lines += [
            f"- {one.experiment}, {one.decoding}: {_percent(one.above['twin'], '+')} over the twin"
            f"{' (trained on fewer actions)' if one.fewer else ''}, "
            f"{_percent(one.above[one.rival], '+')} over its best rival ({ARMS[one.rival]}). Blocked it is "
            f"{_percent(one.left, '+')} from the twin: {one.blocking}. {one.actions['policy'].mean:.1f} actions and "
            f"{one.deletes['policy'].mean:.2f} deletes per answer; the twin {one.actions['twin'].mean:.1f} actions."
        ]
    return [*lines, "", *_training(pairs, folder)]


def _training(pairs: Sequence[Pair], folder: Path) -> list[str]:
    """What each side was trained on, and what that took."""
    lines, seconds = [], 0.0
    for experiment in dict.fromkeys(pair.experiment for pair in pairs):
        mine = [pair for pair in pairs if pair.experiment == experiment]
        policies, twins = zip(*(map(_summary, pair.runs(folder)) for pair in mine), strict=True)
        seconds += sum(summary.seconds for summary in (*policies, *(twins if mine[0].beside is None else ())))
        warm, rl, twin_warm, twin_rl = (
            sum(getattr(summary, key) for summary in side)
            for side in (policies, twins)
            for key in ("warmup_actions", "actions")
        )
        checked = "; its corrections are labelled by the task's check of prefixes" if _is_checked(mine[0]) else ""
        whose = f" of {mine[0].beside}" if mine[0].beside else ""
        base, before, twin_before = (
            " and ".join(f"{_percent(Estimate.of([getattr(one, how) for one in cells]))} {how}" for how in DECODINGS)
            for cells in ([p.base for p in policies], [p.before for p in policies], [t.before for t in twins])
        )
        lines += [
            f"- {experiment}, before RL: the base model {base}; after the warm-up {before}; the twin{whose} "
            f"{twin_before}.",
            f"- {experiment}, seeds {', '.join(str(pair.seed) for pair in mine)}: trained on {warm:,} actions in the "
            f"warm-up and {rl:,} in RL{checked}. The twin{whose}: {twin_warm:,} and {twin_rl:,}.",
        ]
    count = len({run for pair in pairs for run in pair.runs(folder)})
    took = f"- {count} runs took {seconds / 3600:.1f} hours in all. The settings were chosen for the policy."
    return [*lines, took]


def _is_checked(pair: Pair) -> bool:
    """Whether corrections ask the task which prefixes can come right."""
    config = pair.config()
    return config.warmup.labels == "prefixes" and _checks_prefixes(json.dumps(config.task.model_dump()), config.seed)


@functools.cache  # experiments share tasks, whose rows take a second to make
def _checks_prefixes(spec: str, seed: int) -> bool:
    from rl_backspace.plugins import load_task

    task = load_task(json.loads(spec), seed)
    return task.without_checks().alive is not task.alive


def _percent(value: Estimate, sign: str = "") -> str:
    half = "" if value.low is None or value.high is None else f" ± {50 * (value.high - value.low):.1f}"
    return f"{100 * value.mean:{sign}.1f}{half}"
