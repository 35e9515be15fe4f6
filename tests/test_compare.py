"""Comparisons of run folders that are made here, of numbers that are known."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import random
import re
import shutil
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
        assert labels == [groups[0].runs[0].config["name"]]
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
        "lora=yes, warmup.beta=0.3, trainer.beta=–",
        "lora=null, warmup.beta=0.3, trainer.beta=–",
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
    (row,) = [row for row in table("compare/compare.csv") if row["label"] == "plain"]
    assert row["task.count"] == "10"


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
    shutil.rmtree("runs/far0")
    shutil.rmtree("runs/far1")
    shutil.rmtree("runs/far2")
    assert "*" not in call("runs").out


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
    for path in ("runs/cut", "runs/notes", "nowhere", "runs/good/config.yaml"):
        before = tree(here)
        result = call(path)
        assert result.code == 2 and len(result.errors) == 1 and path in result.errors[0]
        assert "Traceback" not in result.err and tree(here) == before


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


def test_matplotlib_waits_until_it_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys, rl_backspace.cli, rl_backspace.compare, rl_backspace.sweep\nassert 'matplotlib' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
