"""Comparisons of run folders that are made here, of numbers that are known."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from commands import Result
from commands import call as command
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from rl_backspace.compare import PICTURE, Estimate, differences, group, is_apart, load, short_names
from rl_backspace.config import dump, override, parse

BASE: dict[str, Any] = {
    "name": "run",
    "model": "arith-1m",
    "task": {"fn": "signs", "count": 5},
    "rewards": {"correct": {"fn": "correctness:checked"}, "delete_cost": {"fn": "delete_cost:flat"}},
    "trainer": {"max_steps": 20},
}
OUTPUTS = {"compare.csv", "runs.csv", "compare.png"}


def call(*arguments: object) -> Result:
    return command("compare", *arguments)


@pytest.fixture
def drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(drawing: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same where it does not matter that the picture is one."""
    monkeypatch.setattr("rl_backspace.picture.draw", lambda *given: given[-1].write_text(PICTURE))
    return drawing


def make(
    folder: str | Path,
    overrides: Sequence[str] = (),
    accuracy: float = 0.5,
    stage: str = "after",
    deletes: float = 1.0,
    rewards: Sequence[float] = (),
    terms: Sequence[str] = ("correct", "delete_cost"),
) -> Path:
    """A run folder as `train` leaves it.

    Args:
        accuracy: sampled, with the token; the other three are 0.1, 0.2 and 0.3 lower.
        rewards: the total at each logged step; each term is a share of it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    content = copy.deepcopy(BASE)
    override(content, overrides)
    (folder / "config.yaml").write_text(dump(parse(content)))
    values = {
        ("allowed", "sampled"): accuracy,
        ("allowed", "greedy"): accuracy - 0.1,
        ("blocked", "sampled"): accuracy - 0.2,
        ("blocked", "greedy"): accuracy - 0.3,
    }

    def nested(function: Any) -> dict[str, Any]:
        cells: dict[str, Any] = {"base": {"blocked": {"sampled": 0.0, "greedy": 0.0}}, stage: {}}
        for (token, how), value in values.items():
            cells[stage].setdefault(token, {})[how] = function(token, how, value)
        return cells

    summary = {
        "accuracy": nested(lambda token, how, value: value),
        "interval": nested(lambda token, how, value: [value - 0.03, value + 0.04]),
        "deletes_per_answer": nested(lambda token, how, value: deletes * (token == "allowed")),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    records: list[dict[str, Any]] = [{"phase": "warm-up", "step": 5, "loss": 1.0}]
    for step, reward in enumerate(rewards, 1):
        shares = {f"rewards/{name}/mean": reward / (index + 1) for index, name in enumerate(terms)}
        records.append({"phase": "rl", "step": step, "reward": reward, "reward_std": 9.0, **shares})
    records.append({"phase": "rl", "step": len(rewards), "train_loss": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def table(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# groups

settings_of_runs = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.fixed_dictionaries(
            {},
            optional={
                "rewards.delete_cost.kwargs.cost": st.sampled_from([0.0, 0.01, 0.1]),
                "rewards.delete_cost.weight": st.sampled_from([0.5, 1.0]),
                "warmup.steps": st.sampled_from([10, 20]),
                "trainer.learning_rate": st.sampled_from([1e-4, 1.00001e-4]),
                "lora": st.sampled_from(["null", "{r: 4}"]),
                "warmup.sources": st.sampled_from(["{random: 1}", "{random: 1, early: 2}"]),
                "rewards.loop_penalty": st.just('{fn: "loop_penalty:repeats"}'),
            },
        ),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda run: str(run),
)


@settings(deadline=None, max_examples=30)
@given(settings_of_runs)
def test_groups_are_what_differs_in_the_seed_alone(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, dict[str, Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    configs: dict[str, dict[str, Any]] = {}
    for index, (seed, its) in enumerate(runs):
        path = make(folder / f"r{index}", [f"seed={seed}", f"name=n{index}", *(f"{k}={v}" for k, v in its.items())])
        configs[str(path)] = yaml.safe_load((path / "config.yaml").read_text())
    found, skipped = load([folder])
    groups = group(found)
    apart = ("seed", "name", "wandb")

    def told(path: Path, *without: str) -> str:
        return json.dumps({k: v for k, v in configs[str(path)].items() if k not in without}, sort_keys=True)

    for one, other in itertools.combinations([(g, run) for g in groups for run in g.runs], 2):
        assert (one[0] is other[0]) == (told(one[1].path, *apart) == told(other[1].path, *apart))
    assert len(found) == len({told(Path(path), "name", "wandb") for path in configs})  # a seed counts once
    assert len(found) + len(skipped) == len(runs)
    labels = [one.label for one in groups]
    assert len(set(labels)) == len(labels)
    if len(groups) == 1:
        assert labels == [groups[0].runs[0].name]
    for one in groups:
        assert [run.seed for run in one.runs] == sorted({run.seed for run in one.runs})


def test_labels_are_the_keys_that_differ(here: Path) -> None:
    for cost, steps in ((0.0, 10), (0.01, 10), (0.01, 20)):
        for seed in (0, 1):
            given = [f"seed={seed}", f"warmup.steps={steps}", f"rewards.delete_cost.kwargs.cost={cost}"]
            make(f"runs/{cost}-{steps}-{seed}", given)
    labels = [one.label for one in group(load([Path("runs")])[0])]
    assert labels == ["cost=0, steps=10", "cost=0.01, steps=10", "cost=0.01, steps=20"]
    make("other/a")
    make("other/b", ["lora=null"])
    make("other/c", ["warmup.beta=0.125"])
    make("other/d", ["warmup.beta=0.125", "trainer.beta=1e-5"])
    assert [one.label for one in group(load([Path("other")])[0])] == [
        "lora=yes, warmup.beta=0, trainer.beta=–",
        "lora=null, warmup.beta=0, trainer.beta=–",
        "lora=yes, warmup.beta=0.125, trainer.beta=–",
        "lora=yes, warmup.beta=0.125, trainer.beta=1e-05",
    ]


def test_more_settings_than_can_be_read_leave_the_folders_names(here: Path) -> None:
    for name, seed in itertools.product(("plain", "another"), (0, 1)):
        keys = ("count", "low", "high", "train", "test", "other", "another", "yet_another")
        make(f"{name}-{seed}", [f"seed={seed}", *(f"task.{key}={len(name + key)}" for key in keys)])
    result = call("plain-0", "plain-1", "another-0", "another-1")
    assert {row["label"] for row in table("compare/compare.csv")} == {"plain", "another"}
    assert "rows have their folders' names" in " ".join(result.out.split())
    for name, seed in itertools.product(("grpo", "ppo"), (0, 1)):
        keys = ("count", "low", "high", "train", "test", "other", "another", "yet_another")
        digest = f"{len(name)}{seed}cafe89"
        make(f"s/seed={seed},algorithm={name}-{digest}", [f"seed={seed}", *(f"task.{k}={len(name)}" for k in keys)])
    assert {one.label for one in group(load([Path("s")])[0])} == {"algorithm=grpo", "algorithm=ppo"}
    (row,) = [row for row in table("compare/compare.csv") if row["label"] == "plain"]
    assert row["task.count"] == "10"


def test_what_cannot_matter_does_not_split_seeds(here: Path) -> None:
    for seed, key in enumerate(("audit=skip", "trainer.logging_steps=5", "warmup.trainer.save_steps=7", "name=x")):
        make(f"runs/{seed}", [f"seed={seed}", key, f"model=runs/warm-{seed}"])
    make("runs/4", ["seed=4", "model=runs/warm-{seed}"])
    make("runs/5", ["seed=4", "model=runs/warm-4"])
    result = call("runs")
    assert [row["seeds"] for row in table("runs/compare.csv")] == ["0 1 2 3 4"]
    assert result.err == "skipped runs/5: the same config and seed as runs/4, so no run of its own\n"
    for seed in (1, 2):
        make(f"named/{seed}", [f"seed={seed}", "model=gpt-2"])
    assert [one.seed for one in group(load([Path("named")])[0])[0].runs] == [1, 2]  # the 2 in it is no seed


def test_values_of_two_types_are_two_settings(here: Path) -> None:
    for index, cost in enumerate(("1", "1.0", "true", "'1'")):
        make(f"runs/{index}", [f"rewards.delete_cost.kwargs.cost={cost}"])
    assert sorted(one.label for one in group(load([Path("runs")])[0])) == [
        "cost='1'",
        "cost=1",
        "cost=1.0",
        "cost=True",
    ]


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join), unique=True, min_size=1))
def test_short_names_are_the_shortest_that_tell(keys: list[str]) -> None:
    for key, name in short_names(keys).items():
        sharing = [other for other in keys if f".{other}".endswith(f".{name}")]
        assert key in sharing
        assert sharing == [key] or name == key
        shorter = name.partition(".")[2]
        if shorter:
            assert sum(f".{other}".endswith(f".{shorter}") for other in keys) > 1


@given(st.lists(st.sampled_from([0.1, 0.10001, 0.100012, 2, None, "x"]), min_size=2, unique=True))
def test_values_that_differ_are_told_apart(chosen: list[Any]) -> None:
    ((key, texts),) = differences([{"a": {"b": value}} for value in chosen])
    assert key == "a.b" and len(set(texts)) == len(chosen)


# numbers


def test_intervals_are_students_over_seeds(here: Path) -> None:
    chance = random.Random(0)
    values = [chance.gauss(0.5, 0.05) for _ in range(4)]
    for seed, value in enumerate(values):
        make(f"runs/{seed}", [f"seed={seed}"], accuracy=value, deletes=10 * value, rewards=[value] * 20)
    result = call("runs")
    (row,) = table("runs/compare.csv")
    for column, scale in (("accuracy.sampled", 1), ("deletes.greedy", 10), ("reward", 1), ("reward.delete_cost", 0.5)):
        sample = [scale * value for value in values]
        interval = scipy.stats.ttest_1samp(sample, 0).confidence_interval(0.95)
        expected = [np.mean(sample), interval.low, interval.high]
        assert [float(row[f"{column}.{end}"]) for end in ("mean", "low", "high")] == pytest.approx(expected)
        assert row[f"{column}.n"] == "4"
    half = 100 * (float(row["accuracy.sampled.high"]) - float(row["accuracy.sampled.mean"]))
    assert f"{100 * np.mean(values):.1f} ± {half:.1f}" in result.out
    assert row["seeds"] == "0 1 2 3" and row["label"] == "run" and row["stage"] == "after"
    runs = table("runs/runs.csv")
    assert [float(run["accuracy.sampled"]) for run in runs] == pytest.approx(values)
    assert [run["seed"] for run in runs] == list("0123")


def test_one_seed_has_the_runs_own_interval_of_accuracy_alone(here: Path) -> None:
    make("one", accuracy=0.6, rewards=[0.5] * 10)
    result = call("one")
    (row,) = table("compare/compare.csv")
    assert (float(row["accuracy.sampled.low"]), float(row["accuracy.sampled.high"])) == pytest.approx((0.57, 0.64))
    assert row["reward.low"] == row["deletes.sampled.low"] == "" and row["reward.mean"] == "0.5"
    assert "60.0 (57.0–64.0)" in result.out and "prompts of one seed" in " ".join(result.out.split())
    summary = json.loads(Path("one/summary.json").read_text())
    del summary["interval"]  # an older one
    Path("one/summary.json").write_text(json.dumps(summary))
    assert "60.0 │" in call("one").out


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (9, 1), (10, 1), (20, 2), (21, 3), (100, 10)])
def test_rewards_are_the_mean_of_the_last_tenth(steps: int, last: int, here: Path) -> None:
    rewards = [float(step**2) for step in range(steps)]
    make("one", rewards=rewards)
    with open("one/metrics.jsonl", "a") as stream:
        stream.write('{"phase": "rl", "rewa')  # a line that was cut off
    assert call("one").code == 0
    (row,) = table("compare/compare.csv")
    assert float(row["reward.mean"]) == pytest.approx(np.mean(rewards[-last:]))
    assert float(row["reward.correct.mean"]) == pytest.approx(np.mean(rewards[-last:]))


def test_a_run_that_diverged_is_shown_and_last(here: Path) -> None:
    nan = math.nan
    make("runs/a", rewards=[0.9] * 50 + [nan] * 50)
    make("runs/b", ["warmup.steps=2"], rewards=[0.1] * 100)
    make("runs/c", ["warmup.steps=3"], rewards=[0.2] * 100)
    with open("runs/c/metrics.jsonl", "a") as stream:  # a term that stopped half way
        stream.write("".join(f'{{"phase": "rl", "step": {step}, "reward": 0.2}}\n' for step in range(101, 201)))
    result = call("runs", "--sort", "reward")
    rows = table("runs/compare.csv")
    assert [row["warmup.steps"] for row in rows] == ["3", "2", "1000"] and rows[2]["reward.mean"] == "nan"
    assert rows[0]["reward.mean"] == pytest.approx("0.2") and rows[0]["reward.correct.mean"] == "nan"
    assert re.search(r"steps=1000 +│ +1 │ +nan │", result.out)
    assert [row["warmup.steps"] for row in table("runs/compare.csv")][-1] == "1000"
    assert call("runs", "--sort=-reward").code == 0
    assert [row["warmup.steps"] for row in table("runs/compare.csv")] == ["2", "3", "1000"]


def test_the_last_stage_is_compared(here: Path) -> None:
    make("runs/warm", ["trainer.max_steps=0"], stage="before", accuracy=0.9)
    make("runs/rl", rewards=[0.1] * 5, accuracy=0.4)
    result = call("runs")
    assert [(row["stage"], row["accuracy.sampled.mean"]) for row in table("runs/compare.csv")] == [
        ("before", "0.9"),
        ("after", "0.4"),
    ]
    assert re.search("max_steps=0 +│ before", result.out) and re.search("max_steps=20 +│  after", result.out)
    accuracies, rewards = result.out.split("rewards, mean")
    assert "max_steps=0" not in rewards and "max_steps=0" in accuracies  # it has none
    assert [row["reward.n"] for row in table("runs/compare.csv")] == ["0", "1"]
    alone = call("runs/warm", "--out", "alone")
    assert "after the correction warm-up" in alone.out and "rewards" not in alone.out


def test_terms_that_only_some_have(here: Path) -> None:
    make("runs/a", rewards=[0.5] * 5)
    make("runs/b", ["rewards.mine={fn: 'correctness:exact'}"], rewards=[0.5] * 5, terms=("correct", "mine"))
    result = call("runs")
    rows = table("runs/compare.csv")
    assert {row["label"] for row in rows} == {"mine=–", "mine=yes"}
    assert [row["reward.mine.n"] for row in sorted(rows, key=lambda row: row["label"])] == ["1", "0"]
    assert "–" in result.out


# order and marks


def test_the_order_is_that_of_any_column(here: Path) -> None:
    for index, (accuracy, deletes, reward) in enumerate(((0.5, 3, 1.0), (0.7, 1, 2.0), (0.6, 2, 3.0))):
        rewards = [reward] * 5
        make(f"runs/{index}", [f"warmup.steps={index + 1}"], accuracy=accuracy, deletes=deletes, rewards=rewards)
    make("runs/3", ["warmup.steps=4"], accuracy=0.9)

    def order(*sort: str) -> str:
        assert call("runs", *sort).code == 0
        return "".join(row["warmup.steps"] for row in table("runs/compare.csv"))

    assert order() == "4231" == order("--sort", "blocked.greedy")
    assert order("--sort", "deletes.sampled") == "1324"
    assert order("--sort=-deletes.sampled") == "2431" and order("--sort=-reward") == "1234"
    assert order("--sort", "seeds") == "1234"
    assert order("--sort", "reward") == order("--sort", "reward.delete_cost") == "3214"  # none is last
    before = tree(here)
    result = call("runs", "--sort", "acuracy.sampled")
    assert result.code == 2 and tree(here) == before
    assert "--sort: no column 'acuracy.sampled'; did you mean 'accuracy.sampled'?; there are" in result.errors[0]


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 0.5)), min_size=2, max_size=2))
def test_what_overlaps_is_not_apart(pairs: list[tuple[float, float]]) -> None:
    one, other = (Estimate(mean, mean - half, mean + half, 3) for mean, half in pairs)
    assert is_apart(one, other) == is_apart(other, one)
    assert is_apart(one, other) == (abs(pairs[0][0] - pairs[1][0]) > pairs[0][1] + pairs[1][1]) or math.isclose(
        abs(pairs[0][0] - pairs[1][0]), pairs[0][1] + pairs[1][1], abs_tol=1e-12
    )
    assert not is_apart(one, one)
    for none in (None, Estimate(5.0, None, None, 1)):
        assert not is_apart(one, none) and not is_apart(none, one)


def test_rows_apart_from_the_best_are_marked(here: Path) -> None:
    for name, accuracy in (("best", 0.9), ("near", 0.895), ("far", 0.5)):
        for seed in range(3):
            make(f"runs/{name}{seed}", [f"seed={seed}", f"model={name}"], accuracy=accuracy + 0.005 * seed)
    result = call("runs")
    marked = [line.split()[1] for line in result.out.splitlines() if re.search(r"± [\d.]+ \*", line)]
    assert marked == ["model=far"]
    assert "* accuracy.sampled does not overlap the interval of the first row" in " ".join(result.out.split())
    for seed in (0, 1):
        shutil.rmtree(f"runs/far{seed}")
    assert "*" not in call("runs").out  # one seed tells nothing of others


def test_ranks_and_marks_are_among_one_task_and_stage(here: Path) -> None:
    for name, accuracy, stage, keys in (
        ("easy", 0.9, "after", ["task.count=3"]),
        ("hard", 0.3, "after", ["task.count=7"]),
        ("better", 0.5, "after", ["task.count=7", "warmup.steps=2", "task.train=90"]),
        ("warm", 0.1, "before", ["task.count=3", "trainer.max_steps=0"]),
    ):
        for seed in range(3):
            its = accuracy + 0.005 * seed
            make(f"runs/{name}{seed}", [f"seed={seed}", *keys], accuracy=its, stage=stage, rewards=[its] * 5)
    result = call("runs")
    assert [float(row["accuracy.sampled.mean"]) for row in table("runs/compare.csv")] == pytest.approx(
        [0.505, 0.305, 0.905, 0.105]
    )
    titles = [line.strip() for line in result.out.splitlines() if "accuracy on held-out" in line]
    assert [title.partition(": accuracy")[0] for title in titles] == [
        "{count: 7, fn: signs, train: 90}",
        "{count: 3, fn: signs}",
    ]
    marked = [line for line in result.out.splitlines() if re.search(r"± [\d.]+ \*", line)]
    assert len(marked) == 1 and "count=7" in marked[0]  # `hard`, which is below `better`


@pytest.mark.parametrize("width", [20, 80, 1000])
def test_numbers_are_whole_in_a_narrow_terminal(width: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes it one
    monkeypatch.setenv("COLUMNS", str(width))
    for seed in range(3):
        keys = [f"seed={seed}", "rewards.a_long_name_of_a_reward={fn: 'correctness:exact'}"]
        make(f"runs/{seed}", keys, 0.5 + 0.01 * seed, rewards=[0.1] * 5, terms=("correct", "a_long_name_of_a_reward"))
    out = re.sub(r"\x1b\[[\d;]*m", "", call("runs").out)
    for text in ("51.0 ± 2.5", "31.0 ± 2.5", "1.00 ± 0.00", "0.100 ± 0.000", "a_long_name_of_a_reward", "seeds"):
        assert text in out
    assert "…" not in out


# folders


def test_what_did_not_finish_is_skipped(here: Path) -> None:
    make("runs/good")
    (make("runs/cut", ["seed=1"]) / "summary.json").unlink()
    (make("runs/broken", ["seed=2"]) / "summary.json").write_text("{")
    (make("runs/strange", ["seed=3"]) / "summary.json").write_text('{"accuracy": {"after": 3}}')
    shutil.copytree("runs/good", "runs/twin")
    Path("runs/notes").mkdir()
    result = call("runs")
    assert result.code == 0
    assert [line.split(":")[0] for line in result.err.splitlines()] == [
        f"skipped runs/{name}" for name in ("broken", "cut", "strange", "twin")
    ]
    assert "did not finish" in result.err and "the same config and seed as runs/good" in result.err
    (row,) = table("runs/compare.csv")
    assert row["seeds"] == "0"
    assert call("runs/good", "runs/good", "--out", "twice").err == ""
    shutil.rmtree("runs/twin")
    make("runs/twin", accuracy=0.75)
    told = "the same config and seed as runs/good, but with other results: accuracy.sampled is 0.75 and there 0.5"
    assert told in call("runs").err
    for path in ("runs/cut", "runs/notes", "nowhere", "runs/good/config.yaml"):
        before = tree(here)
        result = call(path)
        assert result.code == 2 and len(result.errors) == 1 and path in result.errors[0]
        assert "Traceback" not in result.err and tree(here) == before


ODD_RUNS: dict[str, tuple[str, str]] = {  # the file and what it is then
    "no accuracy": ("summary.json", '{"accuracy": {"after": {"allowed": {"sampled": NaN}}}}'),
    "no end": (
        "summary.json",
        '{"accuracy": {"after": {}}, "deletes_per_answer": {"after": {"allowed": {"greedy": Infinity}}}}',
    ),
    "a list": ("summary.json", "[1]"),
    "no seed": ("config.yaml", "{seed: null, task: {fn: signs}}"),
    "no task": ("config.yaml", "{seed: 1}"),
    "keys of two types": ("config.yaml", "{task: {fn: signs, 3: 4, x: 5}}"),
    "no numbers": ("metrics.jsonl", '{"reward": "much", "step": 1}\n'),
    "no step": ("metrics.jsonl", '{"reward": 1.0}\n'),
    "null": ("metrics.jsonl", "null\n"),
}


@pytest.mark.parametrize(("file", "text"), ODD_RUNS.values(), ids=ODD_RUNS)
def test_an_odd_run_is_skipped(file: str, text: str, here: Path) -> None:
    make("runs/good")
    make("runs/odd", ["seed=1"], rewards=[0.1])
    Path("runs/odd", file).write_text(text)
    result = call("runs")
    assert result.code == 0 and re.fullmatch(r"skipped runs/odd: not what `train` writes \(.+\)\n", result.err)
    assert [row["seeds"] for row in table("runs/compare.csv")] == ["0"]


def test_what_the_system_refuses_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("runs/a")
    for arguments in (["a" * 300], ["runs", "--out", "a" * 300]):
        result = call(*arguments)
        assert result.code == 2 and len(result.errors) == 1 and "File name too long" in result.errors[0]

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rl_backspace.compare.load", interrupted)
    result = call("runs")
    assert (result.code, result.err) == (130, "interrupted\n")


def test_output_that_cannot_be_written_leaves_the_files(here: Path) -> None:
    make("runs/a")
    make("runs/b", ["seed=1"], accuracy=0.6)
    command = [sys.executable, "-m", "rl_backspace", "compare", "runs"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr == "error: OSError: [Errno 28] No space left on device\n"
    assert {path.name for path in Path("runs").iterdir()} == {"a", "b", *OUTPUTS}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "55.0 ? " in result.stdout


def test_runs_of_another_version_are_compared_as_they_are(here: Path) -> None:
    make("runs/new")
    path = make("runs/old", ["seed=1", "warmup.steps=7"]) / "config.yaml"
    path.write_text(path.read_text() + "gone: 3\n")
    result = call("runs")
    assert result.code == 0
    assert {row["gone"] for row in table("runs/compare.csv")} == {"–", "3"}


def test_only_what_a_comparison_wrote_is_replaced(drawing: Path) -> None:
    make("runs/a")
    make("runs/b", ["seed=1"])
    assert call("runs").code == 0
    before = tree(drawing)
    assert {Path(name).name for name in before if Path(name).parent == drawing / "runs"} == OUTPUTS
    make("runs/c", ["seed=2"], accuracy=0.7)
    added = {name: content for name, content in tree(drawing).items() if name not in before}
    assert call("runs").code == 0
    after = tree(drawing)
    changed = {Path(name).name for name in before if after[name] != before[name]}
    assert changed == OUTPUTS and set(after) == {*before, *added}
    assert call("runs/a", "runs/b").code == 0 and set(map(str, Path("compare").iterdir())) == {
        f"compare/{name}" for name in OUTPUTS
    }
    for name in OUTPUTS:
        Path("mine").mkdir()
        Path("mine", name).write_text("mine")
        result = call("runs", "--out", "mine")
        assert result.code == 2 and [line for line in result.errors if f"mine/{name}: already there" in line]
        assert [path.name for path in Path("mine").iterdir()] == [name]
        shutil.rmtree("mine")
    for out in ("runs/a/config.yaml", "runs/a/config.yaml/x"):
        result = call("runs", "--out", out)
        assert result.code == 2 and len(result.errors) == 1 and out in result.errors[0]


# the picture


def pixels(path: str | Path) -> np.ndarray:
    """(height, width, 3), 0 to 255."""
    from matplotlib.image import imread

    return (255 * imread(path)[:, :, :3]).round().astype(int)


@pytest.mark.parametrize(
    ("groups", "seeds", "steps", "terms"), [(1, 1, 0, 1), (1, 2, 1, 1), (3, 2, 30, 4), (12, 1, 40, 7), (15, 1, 0, 2)]
)
def test_every_group_is_in_the_picture(groups: int, seeds: int, steps: int, terms: int, drawing: Path) -> None:
    from rl_backspace.picture import COLOURS

    chance = random.Random(1)
    names = [f"term{index}" for index in range(terms)]
    for index, seed in itertools.product(range(groups), range(seeds)):
        rewards = [0.05 * index + step / 50 + chance.gauss(0, 0.02) for step in range(steps)]
        given = [f"seed={seed}", f"warmup.steps={index + 1}"]
        accuracy, deletes = 0.9 - 0.05 * index + chance.gauss(0, 0.01), chance.uniform(0, 4)
        make(f"runs/{index}-{seed}", given, accuracy, deletes=deletes, rewards=rewards, terms=names)
    assert call("runs").code == 0
    image = pixels("runs/compare.png")
    assert 600 < image.shape[0] < 2500 and 900 < image.shape[1] < 2500
    for colour in COLOURS[: min(groups, len(COLOURS))]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(image - rgb).max(axis=2) < 6).sum() > 80  # a marker in the plot and one in the legend


def test_a_picture_shows_text_as_it_is_and_what_its_axes_are(drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = Figure.savefig

    def keep(figure: Figure, *given: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    terms = [f"term{index}" for index in range(6)]
    for index, model in enumerate((r"$\frac$", "$a$ b")):
        make(f"runs/{index}", [f"model={model}"], rewards=[math.nan, *([0.5] * 99)], terms=terms)
    assert call("runs").code == 0
    (figure,) = figures
    panels = [axes for axes in figure.get_axes() if axes.get_visible()]
    labelled = [axes.get_title(loc="left") for axes in panels if "step of RL" in axes.get_xlabel()]
    assert labelled == ["term4", "term5"]
    assert all("mean of 4 logged steps" in axes.get_xlabel() for axes in panels if axes.get_xlabel().startswith("step"))
    assert all(axes.xaxis.get_tick_params()["labelbottom"] for axes in panels if axes.get_xlabel())
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {r"model=$\frac$", "model=$a$ b"}


def test_matplotlib_waits_until_it_is_needed() -> None:
    code = (
        "import sys, rl_backspace.cli, rl_backspace.compare, rl_backspace.sweep\nassert 'matplotlib' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
