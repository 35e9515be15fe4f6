"""Studies on runs whose numbers are known: what is run, what is not run again, and what the results say."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import checkpoint
from commands import call

from rl_backspace import study
from rl_backspace.config import dump
from rl_backspace.study import ARMS, Pair, read, rows, verdicts

EXPERIMENT = {
    "name": "small",
    "task": {"fn": "signs", "count": 3, "train": 50, "test": 8},
    "rewards": {"correct": {"fn": "correctness:checked"}},
    "warmup": {"steps": 10, "group": 2, "trainer": {"per_device_train_batch_size": 4}},
    "trainer": {"max_steps": 5, "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8},
}
RIGHT = {"policy": 0.9, "blocked": 0.5, "random": 0.3, "twin": 0.6}  # of seed 0; each seed's are a little higher
LENGTH, SPENT = 4.0, 7.0  # actions of an answer without deletes and with


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "model": str(checkpoint(tmp_path / "base"))}))
    write_study()
    return tmp_path


def write_study(**fields: Any) -> None:
    entry = {"config": "experiment.yaml", "set": ["trainer.max_steps=6"]}
    Path("study.yaml").write_text(yaml.safe_dump({"name": "s", "experiments": {"signs": entry}, **fields}))


def finish(place: Path, config: Any, accuracy: float = 0.0) -> None:
    """A run with known results, as `train` would leave it."""
    (place / "adapter").mkdir(parents=True)
    (place / "adapter" / "adapter_config.json").write_text("{}")
    (place / "config.yaml").write_text(dump(config))
    up = 0.01 * config.seed

    def cell(value: float, actions: float, deletes: float = 0.0) -> dict[str, float]:
        return {"accuracy": value + up, "actions_per_answer": actions, "deletes_per_answer": deletes}

    tries = [[n * LENGTH, min(1.0, 0.6 + 0.05 * n + up)] for n in range(1, 9)]
    if config.delete.tokens:
        arms = {
            "allowed": cell(RIGHT["policy"], SPENT, 1.5),
            "blocked": cell(RIGHT["blocked"], LENGTH),
            "random": cell(RIGHT["random"], SPENT, 1.5),
        }
    else:
        arms = {"allowed": cell(RIGHT["twin"], LENGTH)}
    curve = {"allowed": [[4.0, 0.5], [9.0, 0.9]], "best_of": tries, "majority": [[a, y - 0.02] for a, y in tries]}
    (place / "controls.json").write_text(json.dumps({how: {"arms": arms, "curve": curve} for how in study.DECODINGS}))
    summary = {
        "actions_per_answer": {"base": {"blocked": {"sampled": LENGTH}}},
        "warmup_actions": 600,
        "actions": 1000,
        "steps": 6,
        "seconds": 30.0,
    }
    (place / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs are made up; what would have been run is noted."""
    noted: list[list[str]] = []

    def run(commands: Mapping[str, list[str]], places: Mapping[str, Path], jobs: int, lock: int) -> dict[str, str]:
        failures = {}
        for id, command in commands.items():
            noted.append(command)
            if stop and len(noted) > stop[0]:
                raise KeyboardInterrupt
            pair = Pair("signs", 0, command[4], tuple(command[5:-2]))
            content = [argument for argument in command[5:-2] if not argument.startswith("seed=")]
            seed = next(int(a.removeprefix("seed=")) for a in command if a.startswith("seed="))
            config = Pair("signs", seed, command[4], tuple(content)).config()
            assert pair.file == "experiment.yaml" and command[-1] == str(places[id])
            if fail and fail[0] in command:
                failures[id] = "it broke"
            else:
                finish(places[id], config)
        return failures

    stop, fail = list[int](), list[str]()
    monkeypatch.setattr(study, "run_all", run)
    ENDS.update(stop=stop, fail=fail)
    return noted


ENDS: dict[str, list[Any]] = {}  # stop: after so many runs; fail: those with this in their command


def test_a_study_runs_policies_and_then_twins_that_train_no_less(here: Path, runner: list[list[str]]) -> None:
    result = call("study", "study.yaml")
    assert result.code == 0, result.err
    assert len(runner) == 6  # three seeds by default
    policies, twins = runner[:3], runner[3:]
    assert all("delete.tokens={}" not in command for command in policies)
    for seed, command in enumerate(twins):
        assert {"delete.tokens={}", "warmup.clean=1", f"seed={seed}", "evaluation.controls=true"} <= set(command)
        assert "warmup.steps=19" in command  # 600 actions, 2 * 4 answers of 4 a step: 18.75
        assert "trainer.max_steps=16" in command  # 1000 actions, 16 rollouts of 4 a step: 15.6
        assert command[-1] == f"runs/s/signs-{seed}/twin"


def test_finished_runs_are_never_run_again(here: Path, runner: list[list[str]]) -> None:
    ENDS["stop"].append(4)
    assert call("study", "study.yaml").code == 130
    done = {path.parent for path in here.glob("runs/s/*/*/summary.json")}
    assert len(done) == 4 and not (here / "runs/s/results.md").exists()
    ENDS["stop"].clear()
    del runner[:]
    assert call("study", "study.yaml").code == 0
    assert len(runner) == 2
    text = (here / "runs/s/results.md").read_text()
    del runner[:]
    assert call("study", "study.yaml").code == 0
    assert not runner and (here / "runs/s/results.md").read_text() == text


def test_more_seeds_can_be_added_and_another_experiment_is_refused(here: Path, runner: list[list[str]]) -> None:
    write_study(seeds=[0])
    assert call("study", "study.yaml").code == 0 and len(runner) == 2
    write_study(seeds=[0, 5])
    assert call("study", "study.yaml").code == 0 and len(runner) == 4
    entry = {"config": "experiment.yaml", "set": ["trainer.max_steps=7"]}
    write_study(seeds=[0], experiments={"signs": entry})
    result = call("study", "study.yaml")
    assert result.code == 2 and "runs/s/signs-0/policy: made with another config" in result.err


def test_a_run_that_fails_is_told_and_the_others_count(here: Path, runner: list[list[str]]) -> None:
    ENDS["fail"].append("seed=1")
    result = call("study", "study.yaml")
    assert result.code == 1 and "failed: signs-1: it broke" in result.err
    with open("runs/s/results.csv") as stream:
        assert {row["seed"] for row in csv.DictReader(stream)} == {"0", "2"}


def test_the_results_are_what_the_runs_say(here: Path, runner: list[list[str]]) -> None:
    assert call("study", "study.yaml").code == 0
    with open("runs/s/results.csv") as stream:
        records = list(csv.DictReader(stream))
    assert len(records) == 3 * 2 * len(ARMS)
    found = {(r["arm"], r["seed"]): r for r in records if r["decoding"] == "greedy"}
    assert float(found["policy", "2"]["accuracy"]) == pytest.approx(0.92)
    best = found["best_of", "0"]  # two tries: the first number that costs no fewer than 7 actions
    assert (float(best["accuracy"]), float(best["actions"]), best["n"]) == (pytest.approx(0.7), 8.0, "2")
    text = (here / "runs/s/results.md").read_text()
    assert "| signs | greedy | **91.0 ± 2.5** | 51.0 ± 2.5 | 31.0 ± 2.5 | 61.0 ± 2.5 | 71.0 ± 2.5 (n = 2) |" in text
    assert "| × 0.31 |" in text  # 9 % against 29 %
    assert "wins 2 of 2 comparisons; by both decodings on signs" in text
    assert "+30.0 ± 0.0 over the twin, +20.0 ± 0.0 over its best rival (twin, likeliest of n)" in text
    assert "Blocked it is -10.0 points from the twin: the gain is gone" in text
    assert "Compute: 6 runs, 0.1 hours" in text
    assert (here / "runs/s/results.png").stat().st_size > 10_000


def test_a_win_needs_intervals_apart_from_every_rival(here: Path, runner: list[list[str]]) -> None:
    call("study", "study.yaml")
    records = list(rows(read(Path("study.yaml"))[1], here / "runs" / "s"))
    assert all(verdict.beats for verdict in verdicts(records))
    for arm in study.RIVALS:
        close = [{**r, "accuracy": 0.89 + 0.01 * r["seed"]} if r["arm"] == arm else r for r in records]
        for verdict in verdicts(close):
            assert not verdict.beats and verdict.rival == arm
    strong = [{**r, "accuracy": 0.8 + 0.01 * r["seed"]} if r["arm"] == "blocked" else r for r in records]
    assert all(verdict.gone for verdict in verdicts(records)) and not any(v.gone for v in verdicts(strong))


def test_dry_runs_only_tell(here: Path, runner: list[list[str]]) -> None:
    result = call("study", "study.yaml", "--dry-run", "--out", "elsewhere")
    assert result.code == 0 and len(result.out.split()) == 6 and "elsewhere/signs-0/policy" in result.out
    assert not runner and not (here / "elsewhere").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": []}, "study.yaml: seeds"),
        ({"sedes": [1]}, "study.yaml: sedes: unknown"),
        ({"experiments": {}}, "study.yaml: experiments"),
        ({"experiments": {"a": {"config": "nothing.yaml"}}}, "nothing.yaml"),
        (
            {"experiments": {"a": {"config": "experiment.yaml", "set": ["trainer.max_step=3"]}}},
            "experiments.a: trainer",
        ),
        ({"experiments": {"a": {"config": "experiment.yaml", "set": ["delete.tokens={}"]}}}, "with a delete token"),
        ({"experiments": {"a": {"config": "experiment.yaml", "set": ["model=runs/x-{seed}"]}}}, "from its base model"),
    ],
)
def test_bad_studies_are_refused_in_one_line(fields: dict[str, Any], said: str, here: Path) -> None:
    write_study(**fields)
    result = call("study", "study.yaml")
    assert result.code == 2 and len(result.errors) == 1 and said in result.errors[0]


def test_a_run_without_controls_is_told(here: Path, runner: list[list[str]]) -> None:
    call("study", "study.yaml")
    (here / "runs/s/signs-1/twin/controls.json").unlink()
    result = call("study", "study.yaml")
    assert result.code == 2 and "runs/s/signs-1/twin: controls.json cannot be read" in result.err
