"""Every shipped experiment parses and runs a step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rl_backspace import study, warmup
from rl_backspace.config import override, parse, parse_pretrain, read_yaml
from rl_backspace.experiment import prepare
from rl_backspace.policy import EMBEDDED
from rl_backspace.pretrain import pretrain
from rl_backspace.run import train
from rl_backspace.study import read

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SMALL = [
    "warmup.steps=2",
    "warmup.trainer.per_device_train_batch_size=4",
    "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=16",
    "trainer.num_generations=4",
    "evaluation.rows=16",
    "task.train=1000",
]


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("bases/*.yaml")), ids=lambda path: path.stem)
def test_a_base_is_made_as_the_embedded_one_was(path: Path, tmp_path: Path) -> None:
    """The same shape, from a few steps on a few rows."""
    content = read_yaml(path)
    override(content, ["steps=2", "batch=4"])
    for task in content["tasks"]:
        task["train"] = 20
    pretrain(parse_pretrain(content), tmp_path / "model")
    for name in ("config.json", "tokenizer.json") if (EMBEDDED / path.stem).exists() else ():
        made, embedded = (json.loads((at / name).read_text()) for at in (tmp_path / "model", EMBEDDED / path.stem))
        assert made == embedded


def test_embedded_models_are_small_and_can_be_made_again() -> None:
    embedded = [path for path in EMBEDDED.iterdir() if (path / "config.json").exists()]
    assert len(embedded) == 4
    for path in embedded:
        assert (EXPERIMENTS / "bases" / f"{path.name}.yaml").exists()
        assert sum(file.stat().st_size for file in path.iterdir()) < 5e6


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_runs_a_step(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "HELD_OUT", 8)
    monkeypatch.setattr(warmup, "POOL", 32)
    content = read_yaml(path)
    override(content, SMALL)
    config = parse(content)
    out = tmp_path / "run"
    train(prepare(config, out), out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["logp_gap_max"] < 1e-3
    assert set(summary["accuracy"]) == {"base", "before", "after"}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_studies_are_of_experiments_that_are_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXPERIMENTS.parent)
    content, pairs = read(path)
    assert len(pairs) == len(content.seeds) * len(content.experiments) > 0


def test_the_published_study_is_what_its_runs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the small files of each run, made with the experiment files as they are now; the README has its table."""
    monkeypatch.chdir(EXPERIMENTS.parent)
    monkeypatch.setattr(study, "run_all", lambda *_: None)  # what is not there stays so
    results, page = EXPERIMENTS / "studies" / "results", tmp_path / "README.md"
    shutil.copytree(results, tmp_path / "results")
    shutil.copy("README.md", page)
    file = EXPERIMENTS / "studies" / "study.yaml"
    assert study.run_study(file, tmp_path / "results", jobs=1, dry_run=False, into=page) == 0
    for name in ("results.csv", "results.md"):
        assert (tmp_path / "results" / name).read_text() == (results / name).read_text()
    assert page.read_text() == Path("README.md").read_text()


def test_the_embedded_base_leaves_room_to_learn() -> None:
    """Right on 40 to 70 % of the shipped experiment."""
    from rl_backspace.evaluate import evaluate

    experiment = prepare(parse(read_yaml(EXPERIMENTS / "arith.yaml")), Path("never-written"))
    rows = experiment.task.test[:500]
    results = evaluate(experiment.policy, experiment.task, rows, experiment.budget, tokens=("blocked",))["blocked"]
    assert all(0.4 < results[how]["accuracy"] < 0.7 for how in ("sampled", "greedy"))
