"""Sweep files as wandb has them, and the runs that come of them."""

from __future__ import annotations

import collections
import contextlib
import csv
import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml
from checkpoints import checkpoint
from commands import call, full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.wandb_agent import Agent

from rl_backspace import sweep
from rl_backspace.compare import PICTURE
from rl_backspace.config import override, parse, read_yaml
from rl_backspace.errors import UserError
from rl_backspace.folder import RunFolder
from rl_backspace.sweep_file import arguments, read

SWEEPS = Path(__file__).parents[1] / "experiments" / "sweeps"
COMMAND = ["${env}", "rl-backspace", "train", "experiment.yaml", "${args}"]
EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "model": "nowhere",
    "task": {"fn": "signs", "count": 3, "train": 60, "test": 8},
    "delete": {"budget": 14},
    "lora": {"r": 4, "alpha": 8},
    "warmup": {"steps": 0},
    "rewards": {"correct": {"fn": "correctness:checked"}, "delete_cost": {"fn": "delete_cost:flat"}},
    "trainer": {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
    },
    "evaluation": {"rows": 2},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background ignores
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    return tmp_path


def write(parameters: Any, path: str = "s.yaml", **changes: Any) -> Path:
    """A sweep file; keys that are None are left out."""
    content = {"program": "x", "method": "grid", "command": COMMAND, "parameters": parameters, **changes}
    content = {key: value for key, value in content.items() if value is not None}
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False))
    return Path(path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def refused(*given: object) -> list[str]:
    """Exit code 2, only lines to read, nothing written; those lines."""
    before = tree(Path())
    result = call("sweep", *given)
    assert result.code == 2 and result.out == ""
    assert result.err.splitlines() == [f"error: {line}" for line in result.errors]
    assert tree(Path()) == before
    return result.errors


# what wandb's agent writes on a command line

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6) | st.sampled_from(
    ["None", "null", "yes", "3", "1e-5", "a: b", "a #b", "[1", "{a: 1}", "'3'", '"x"', "it's", 'it\'s "x"', "~", "a\nb"]
)
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,5}(\.[a-z0-9_]{1,4}){0,2}", fullmatch=True)


@given(st.dictionaries(names, values, max_size=3))
def test_arguments_are_those_of_wandbs_agent(chosen: dict[str, Any]) -> None:
    theirs = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    assert arguments(chosen) == theirs["args"]
    assert arguments(chosen, "") == theirs["args_no_hyphens"]


def read_back(value: Any) -> Any:
    """What an override makes of a value as wandb writes it."""
    content: dict[str, Any] = {}
    override(content, arguments({"x": value}))
    return content["x"]


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # which tells 1, 1.0 and True apart


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -3, 2.5, 1e-5, 1e16, 1e300, "text", "a.py:b", "text with spaces", "Ünïcödé", "<|x|>"),
        *([], {}, [None, True], {"a": None, "b": [False, 1e-7]}, ["None", "3", "it's", 'a "b"', "yes", "", "a: b"]),
        {"<|undo|>": "line", "<|back|>": 3},
    ],
)
def test_overrides_take_what_the_agent_writes(value: Any) -> None:
    assert same(read_back(value), value)


# which runs there are


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(["seed", "a.b.c", "a.b.d", "x.c", "y"]),
        st.lists(
            st.integers(0, 5) | st.sampled_from(["x/y", "..", "ü", "a" * 90]), min_size=1, max_size=4, unique=True
        ),
        min_size=1,
    )
)
def test_a_grid_is_every_combination_once(tmp_path_factory: pytest.TempPathFactory, choices: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "grid.yaml"
    parameters = {name: {"values": its} for name, its in choices.items()}
    content = {"method": "grid", "command": COMMAND, "parameters": parameters}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    runs = read(path).runs
    expected = [dict(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]
    assert sorted(map(str, (sorted(run.values.items()) for run in runs))) == sorted(
        map(str, (sorted(row.items()) for row in expected))
    )
    ids = [run.id for run in runs]
    assert len(set(map(str.lower, ids))) == len(ids)
    assert all(re.fullmatch(r"[\w.,=+-]{8,100}", id, re.ASCII) and id[0] not in ".-" for id in ids)
    varied = [name.split(".")[-1] for name, its in choices.items() if len(its) > 1]
    assert all(name in id for name in varied[:1] for id in ids)
    assert [run.id for run in read(path, 2).runs] == ids[:2]


def test_a_grid_may_count(here: Path) -> None:
    path = write({"seed": {"min": 3, "max": 5}, "x": {"value": None}}, run_cap=7)
    assert [run.values for run in read(path).runs] == [{"seed": n, "x": None} for n in (3, 4, 5)]
    assert [run.values["seed"] for run in read(path, 2).runs] == [3, 4]
    assert [run.id.split("-")[0] for run in read(path).runs] == ["seed=3", "seed=4", "seed=5"]


DISTRIBUTIONS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "uniform": ({"min": 2.0, "max": 5.0}, scipy.stats.uniform(2, 3).cdf),
    "log_uniform_values": ({"min": 1e-5, "max": 1e-2}, scipy.stats.loguniform(1e-5, 1e-2).cdf),
    "normal": ({"mu": 3, "sigma": 2}, scipy.stats.norm(3, 2).cdf),
}


def draws(spec: dict[str, Any], count: int = 1500) -> list[Any]:
    runs = read(write({"x": spec, "dummy": {"min": 0, "max": 10**9}}, method="random", run_cap=count)).runs
    assert len(runs) == count
    return [run.values["x"] for run in runs]


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_draws_follow_their_distribution(kind: str, here: Path) -> None:
    spec, cdf = DISTRIBUTIONS[kind]
    assert scipy.stats.kstest(draws({"distribution": kind, **spec}), cdf).pvalue > 1e-3


@pytest.mark.parametrize(("q", "whole"), [(2, True), (0.25, False), (None, False)])
def test_rounded_draws_are_multiples(q: float | None, whole: bool, here: Path) -> None:
    spec = {"distribution": "q_uniform", "min": 1, "max": 9, **({} if q is None else {"q": q})}
    drawn = draws(spec, 300)
    assert {type(value) for value in drawn} == {int if whole else float}
    assert all(value % (q or 1.0) == 0 and 0 <= value <= 9 for value in drawn)
    assert len(set(drawn)) >= 4


def test_choices_are_drawn_with_their_probabilities(here: Path) -> None:
    counts = collections.Counter(draws({"values": ["a", None, 3], "probabilities": [0.7, 0.3, 0]}))
    assert set(counts) == {"a", None}
    assert scipy.stats.binomtest(counts["a"], 1500, 0.7).pvalue > 1e-3
    alike = collections.Counter(draws({"values": [1, 2, 3]}))
    assert scipy.stats.chisquare(list(alike.values())).pvalue > 1e-3
    whole = collections.Counter(draws({"min": 1, "max": 4}))
    assert set(whole) == {1, 2, 3, 4} and scipy.stats.chisquare(list(whole.values())).pvalue > 1e-3
    floats = draws({"min": 1.0, "max": 4.0}, 20)
    assert all(isinstance(value, float) and 1 <= value <= 4 for value in floats) and len(set(floats)) == 20


def test_a_random_sweep_draws_the_same_runs_each_time(here: Path) -> None:
    parameters = {"seed": {"values": [0, 1, 2]}, "x": {"min": 0.0, "max": 1.0}, "y": {"distribution": "normal"}}
    ids = [run.id for run in read(write(parameters, method="random", run_cap=9)).runs]
    assert ids == [run.id for run in read(write(parameters, method="random", run_cap=9)).runs]
    backwards = dict(reversed(parameters.items()))
    drawn = [run.values for run in read(write(parameters, method="random", run_cap=9)).runs]
    assert drawn == [run.values for run in read(write(backwards, method="random", run_cap=9)).runs]
    assert ids[:4] == [run.id for run in read(write(parameters, method="random"), 4).runs]
    assert ids[:4] == [run.id for run in read(write(parameters, method="random", run_cap=9), 4).runs]
    other = {**parameters, "y": {"distribution": "normal", "sigma": 2}}
    assert {run.values["x"] for run in read(write(other, method="random"), 9).runs}.isdisjoint(
        run["x"] for run in drawn
    )
    few = {"seed": {"values": [0, 1]}}
    assert sorted(run.values["seed"] for run in read(write(few, method="random", run_cap=50)).runs) == [0, 1]


# what is wrong with a file

X = {"x": {"values": [1]}}
BAD_FILES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "bayes": (X, {"method": "bayes"}, "method: bayes needs wandb's server"),
    "no method": (X, {"method": None}, "method: missing; add it"),
    "early end": (X, {"early_terminate": {"type": "hyperband"}}, "early_terminate: wandb's server decides"),
    "unknown key": (X, {"paramters": {}}, "paramters: unknown key; did you mean 'parameters'"),
    "no end": (X, {"method": "random"}, "run_cap: missing"),
    "no number": (X, {"run_cap": 0}, "run_cap: expected a number greater than 0; got 0"),
    "no parameters": ({}, {}, "parameters: expected at least one entry; got {}"),
    "a list": ([1], {}, "parameters: expected a block of keys; got [1]"),
    "no spec": ({"x": 3}, {}, "parameters.x: expected value, values, min and max alike whole or not, or"),
    "a slip": ({"x": {"vales": [1]}}, {}, "or a distribution of constant, categorical, categorical_w_p"),
    "no values": ({"x": {"values": []}}, {}, "parameters.x.values: expected at least one entry; got []"),
    "too many keys": (
        {"x": {"values": [1], "min": 3}},
        {},
        "parameters.x.min: unknown key; known here: distribution, values",
    ),
    "no such": ({"x": {"distribution": "unifrm"}}, {}, "got {'distribution': 'unifrm'}; did you mean 'uniform'"),
    "exponents": ({"x": {"distribution": "log_uniform", "min": -3, "max": 1}}, {}, "did you mean 'q_uniform'"),
    "1e-5 is text to wandb": (
        {"x": {"distribution": "log_uniform_values", "min": "1e-5", "max": 1.0}},
        {"method": "random", "run_cap": 1},
        "parameters.x.min: expected a valid number; got '1e-5' (str); to wandb a number has a point and a sign in it",
    ),
    "nested": ({"a": {"parameters": {"b": X["x"]}}}, {}, "nested parameters would replace the whole block; write a.b"),
    "half": (
        {"x": {"distribution": "uniform", "min": 1}},
        {"method": "random", "run_cap": 1},
        "parameters.x.max: missing",
    ),
    "mixed": ({"x": {"min": 1, "max": 2.5}}, {}, "min and max alike whole or not, or a distribution"),
    "upside down": ({"x": {"min": 3, "max": 3}}, {}, "parameters.x.max: expected a number above 3; got 3"),
    "not above 0": (
        {"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}},
        {"method": "random", "run_cap": 1},
        "parameters.x.min: expected a number greater than 0",
    ),
    "text": (
        {"x": {"distribution": "uniform", "min": "a", "max": True}},
        {"method": "random", "run_cap": 1},
        "x.min: expected a valid number; got 'a' (str)\ns.yaml: parameters.x.max: expected a valid number; got True",
    ),
    "probabilities": ({"x": {"values": [1, 2], "probabilities": [1]}}, {}, "expected 2 numbers that sum to 1"),
    "no grid": ({"x": {"distribution": "normal"}}, {}, "parameters.x: a grid cannot have normal"),
    "too many": ({"x": {"min": 1, "max": 10**12}}, {}, "parameters: more than 10000 runs"),
    "a name": ({"delete.tokens.<|x|>": {"value": 1}}, {}, "wandb takes names of letters, digits"),
    "overlap": ({"a": X["x"], "a.b": X["x"]}, {}, "parameters.a and parameters.a.b set the same thing"),
    "alias": ({"reward.a.b": X["x"], "rewards.a.b": X["x"]}, {}, "set the same thing"),
    "no command": (X, {"command": None}, "command: expected a list such as"),
    "another command": (X, {"command": ["python", "t.py", "${args}"]}, "command: expected rl-backspace train"),
    "no args": (X, {"command": COMMAND[:-1]}, "command: without ${args} every run would be the same"),
    "another macro": (X, {"command": [*COMMAND, "${args_json}"]}, "command: '${args_json}' is none of ${args}"),
    "its own folder": (X, {"command": [*COMMAND, "--out=x"]}, "command: --out=x is not for a sweep"),
    "no program": (X, {"command": ["nowhere/x", *COMMAND]}, "command: there is no program 'nowhere/x'"),
    "no experiment": (X, {"command": ["rl-backspace", "train", "no.yaml", "${args}"]}, "command: no.yaml: No such"),
}


@pytest.mark.parametrize(("parameters", "changes", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_clear_line(parameters: Any, changes: dict[str, Any], said: str, here: Path) -> None:
    errors = refused(write(parameters, **changes))
    assert len(errors) == len(said.splitlines()), errors
    assert said in "\n".join(errors)
    assert all(error.startswith("s.yaml: ") for error in errors)


@pytest.mark.parametrize("text", ["[1", "- a\n", ""])
def test_what_is_no_sweep_file(text: str, here: Path) -> None:
    Path("s.yaml").write_text(text)
    assert "s.yaml: " in refused("s.yaml")[0]
    assert refused("nowhere.yaml") == ["nowhere.yaml: no such file; give a sweep file in wandb's format"]


ODD_FILES: dict[str, tuple[str, str]] = {  # parameters as text
    "a day that is not": ("x: {values: [2024-13-01]}", "not valid YAML: month must be in 1..12"),
    "many digits": (f"x: {{value: 1{'0' * 5000}}}", "not valid YAML: Exceeds the limit"),
    "given twice": ("seed: {values: [0, 1]}\n  seed: {values: [5]}", "not valid YAML: key 'seed' is given twice"),
    "a list of itself": ("x: {values: &a [*a]}", "a value holds itself; write it out"),
    "a block of itself": ("x: {value: &a {a: *a}}", "a value holds itself; write it out"),
    "a list for a name": ("x: {distribution: [a]}", "parameters.x: expected value, values, .* got {'distribution'"),
    "no end of them": (f"seed: {{min: 0, max: 1{'0' * 400}}}", "parameters: more than 10000 runs"),
    "too deep": (f"x: {{value: {'[' * 3000}{']' * 3000}}}", "not valid YAML: "),
}


@pytest.mark.parametrize(("parameters", "said"), ODD_FILES.values(), ids=ODD_FILES)
def test_an_odd_file_is_one_line_too(parameters: str, said: str, here: Path) -> None:
    Path("s.yaml").write_text(f"method: grid\ncommand: {json.dumps(COMMAND)}\nparameters:\n  {parameters}\n")
    (error,) = refused("s.yaml")
    assert re.match(f"s.yaml: {said}", error)


def test_a_long_range_needs_no_end_where_the_runs_have_one(here: Path) -> None:
    path = write({"seed": {"min": 0, "max": 10**30}, "x": {"values": [1, 2]}}, run_cap=5)
    assert [tuple(run.values.values()) for run in read(path).runs] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    assert [run.values["seed"] for run in read(path, 2).runs] == [0, 0]


# what is wrong with its runs, before the first one starts

SEEDS = {"seed": {"values": [0, 1, 2]}}
BAD_RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no such key": ({"sed": {"values": [1, 2]}}, ["parameters.sed: unknown key; did you mean 'seed'"]),
    "no such field": ({"trainer.max_step": {"value": 3}}, ["parameters.trainer.max_step: .*did you mean 'max_steps'"]),
    "bad values": (
        {"trainer.max_steps": {"values": ["many", 2, 1.5]}},
        [
            "parameters.trainer.max_steps: expected a valid integer; got 'many'",
            r"parameters.trainer.max_steps: .*got 1.5",
        ],
    ),
    "reward kwargs": (
        {"reward.delete_cost.kwargs.cots": {"values": [0.1, 0.2]}, "warmup.steps": {"values": [-1]}},
        ["parameters.warmup.steps: expected"],
    ),
    "reward kwargs alone": (
        {"rewards.delete_cost.kwargs.cots": {"values": [0.1, 0.2]}},
        ["parameters.rewards.delete_cost.kwargs.cots: unknown; .*did you mean 'cost'"],
    ),
    "no such reward": (
        {"rewards.delete_cst.weight": {"values": [0.1, 0.2]}},
        ["parameters.rewards.delete_cst.weight: rewards.delete_cst.fn: missing; .*did you mean 'delete_cost'"],
    ),
    "no block": ({"name.x": {"values": [1, 2]}}, ["parameters.name.x: name is 'tiny', which has no keys"]),
    "task": ({"task.cuont": {"values": [3, 4]}}, ["parameters.task.cuont: .*did you mean 'count'"]),
    "together": (
        {"trainer.num_generations": {"values": [2, 3]}},
        [r"parameters.trainer.num_generations: trainer: .*divisible by num_generations \(3\)"],
    ),
    "no model": (
        {"model": {"values": ["arith-2m", "/nowhere"]}},
        ["parameters.model: 'arith-2m' is no folder; did you mean 'arith-1m'", "parameters.model: '/nowhere' is no"],
    ),
    "read as another value": (
        {"delete.boundary": {"values": ["no", "\n", "ok", "'\n'"]}},
        [
            r"""parameters.delete.boundary: 'no' would be read as False .*; quote it once more, as '"no"'$""",
            r"""parameters.delete.boundary: '\\n' would be read as None .* as '"\\n"'$""",
        ],
    ),
    "the same runs": (
        {"warmup.beta": {"values": [0.01, "1e-2"]}},
        [r"parameters: seed=0,beta=0.01-\w+ and seed=0,beta=1e-2-\w+ come to the same run"],
    ),
    "elsewhere": (
        {"trainer.max_completion_length": {"values": [5, 15]}, "warmup.steps": {"values": [0, 1]}},
        [r"delete.budget: 14 actions .* \(with seed=0, trainer.max_completion_length=15, warmup.steps=0\)"],
    ),
}


@pytest.mark.parametrize(("parameters", "patterns"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_mistakes_are_told_once_for_all_runs_and_nothing_runs(
    parameters: dict[str, Any], patterns: list[str], here: Path
) -> None:
    errors = refused(write({**SEEDS, **parameters}))
    assert len(errors) == len(patterns), errors
    for error, pattern in zip(errors, patterns, strict=True):
        assert re.match(rf"s\.yaml: {pattern}", error), error


def test_the_experiments_and_the_commands_own_mistakes_are_called_so(here: Path) -> None:
    content = {**EXPERIMENT, "sed": 1}
    Path("experiment.yaml").write_text(yaml.safe_dump(content))
    errors = refused(write(SEEDS, command=[*COMMAND, "modle=x", "lora.r"]))
    assert [error.split(": ")[:2] for error in errors] == [["s.yaml", "command"]]
    errors = refused(write(SEEDS, command=[*COMMAND, "modle=x"]))
    assert [error.split(": ")[:-1] for error in errors] == [
        ["experiment.yaml", "sed", "unknown key; did you mean 'seed'?; known here"],
        ["s.yaml", "command", "modle", "unknown key; did you mean 'model'?; known here"],
    ]


def test_a_strict_audit_is_heeded_once_for_all_seeds(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audited = []

    def heed(config: Any) -> None:
        audited.append(config)
        raise UserError("rewards: this one can be farmed")

    monkeypatch.setattr("rl_backspace.experiment.prepare", lambda config, out: config)
    monkeypatch.setattr("rl_backspace.audit.heed", heed)
    weights = {"rewards.delete_cost.weight": {"values": [0.5, 1.0]}}
    Path("experiment.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "audit": "strict", "model": "arith-1m"}))
    assert refused(write({**SEEDS, **weights})) == ["experiment.yaml: rewards: this one can be farmed"]
    assert [config.rewards["delete_cost"].weight for config in audited] == [1.0, 0.5]


def test_a_dry_run_prints_the_runs_and_writes_nothing(here: Path) -> None:
    path = write({**SEEDS, "rewards.delete_cost.kwargs.cost": {"values": [0.0, 0.125]}}, name="My sweep!")
    before = tree(here)
    result = call("sweep", path, "--dry-run")
    assert result.code == 0 and tree(here) == before
    ids = result.out.split()
    assert [id.rpartition("-")[0] for id in ids] == [f"seed={s},cost={c}" for s in range(3) for c in ("0", "0.125")]
    assert "6 runs, 0 of them finished; would write runs/My-sweep" in result.err
    assert call("sweep", path, "--dry-run", "--count", 2).out.split() == ids[:2]


# running, with a stand-in for training: as fast as a script, and as good for all that a sweep does with it

STAND_IN = """#!{python} -S
import json, os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.default_int_handler)
times = dict(start=time.time(), threads=os.environ.get("OMP_NUM_THREADS"), group=os.environ.get("WANDB_RUN_GROUP"))
*given, _, out = sys.argv[3:]
config, out = json.loads(Path("resolved.json").read_text()), Path(out)
for argument in given:
    key, _, value = argument.removeprefix("--").partition("=")
    *block, name = key.split(".")
    (config[block[0]] if block else config)[name] = json.loads(value)
seed = config["seed"]
print("run", given)
if seed == 13:
    sys.exit("error: an unlucky\\nerror: number 13")
if seed == 14:
    raise RuntimeError("number 14")
out.mkdir()
(out / "config.yaml").write_text(json.dumps(config))
deadline = time.time() + (30 if seed == 99 and not Path("quick").exists() else 0.3)
try:
    while time.time() < deadline:
        time.sleep(0.01)
except KeyboardInterrupt:
    (out / "saved").touch()
    sys.exit(130)
cells = lambda value: dict(allowed=dict(sampled=value, greedy=value), blocked=dict(sampled=0, greedy=0))
summary = dict(accuracy=dict(before=cells(seed / 100)), deletes_per_answer=dict(before=cells(1.0)))
(out / "times.json").write_text(json.dumps(dict(times, end=time.time())))
(out / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def stand_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A sweep's command that trains nothing, of parameters that are numbers, one block deep; and no picture."""
    monkeypatch.setattr("rl_backspace.picture.draw", lambda *given: given[-1].write_text(PICTURE))
    Path("resolved.json").write_text(parse(read_yaml(Path("experiment.yaml"))).model_dump_json())
    script = here / "bin" / "rl-backspace"
    script.parent.mkdir()
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    return ["${env}", str(script), "train", "experiment.yaml", "${args}"]


def seeds(*chosen: int) -> dict[str, Any]:
    return {"seed": {"values": list(chosen)}}


def overlap(folder: Path) -> int:
    """The most runs that went on at a time."""
    times = [json.loads(path.read_text()) for path in folder.glob("*/times.json")]
    return max(sum(a["start"] <= b["start"] < a["end"] for a in times) for b in times)


def test_runs_that_fail_do_not_stop_the_others(stand_in: list[str]) -> None:
    path = write(seeds(1, 13, 2, 14, 3), command=stand_in)
    result = call("sweep", path, "--jobs", 2)
    folder = Path("runs/s")
    assert result.code == 1 and "Traceback" not in result.err
    assert overlap(folder) == 2
    times = [json.loads(one.read_text()) for one in folder.glob("*/times.json")]
    assert [(one["threads"], one["group"]) for one in times] == [("1", "s")] * 3
    told = [line for line in result.err.splitlines() if line.startswith("failed: ")]
    assert re.fullmatch(r"failed: seed=13-\w+: number 13 \(see runs/s/seed=13-\w+\.log\)", told[0])
    assert re.fullmatch(r"failed: seed=14-\w+: RuntimeError: number 14 \(see .*\)", told[1])
    assert "5/5" in result.err and "failed=2" in result.err  # the bar
    (row,) = csv.DictReader(Path("runs/s/compare.csv").read_text().splitlines())
    assert row["seeds"] == "1 2 3" and float(row["accuracy.sampled.mean"]) == pytest.approx(0.02)
    assert "2.0 ±" in result.out  # the table
    before = {str(one): one.stat().st_mtime_ns for one in folder.glob("*/*")}
    again = call("sweep", path)
    assert again.code == 1 and "2 of 5 runs to do" in again.err
    assert {str(one): one.stat().st_mtime_ns for one in folder.glob("*/*")} == before  # finished ones are left alone
    assert again.out == result.out
    told = [line for line in again.err.splitlines() if line.startswith("failed: ")]
    assert len(told) == 2


def test_many_that_fail_alike_are_one_line(stand_in: list[str]) -> None:
    parameters = {**seeds(13), "trainer.max_steps": {"values": [1, 2, 3]}}
    result = call("sweep", write(parameters, command=stand_in))
    assert result.code == 1 and result.out == ""
    (line,) = [line for line in result.err.splitlines() if line.startswith("failed: ")]
    assert "and 2 more: number 13" in line


def test_threads_are_left_as_they_are(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("sweep", write(seeds(1), command=stand_in)).code == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert call("sweep", write(seeds(1), command=stand_in), "--jobs", 2, "--out", "other").code == 0
    times = [json.loads(one.read_text())["threads"] for one in sorted(Path().glob("**/times.json"))]
    assert times == ["3", None]


def test_a_folder_is_for_one_sweep(stand_in: list[str]) -> None:
    assert call("sweep", write(seeds(1, 2), command=stand_in)).code == 0
    assert read_yaml(Path("runs/s/sweep.yaml")) == read_yaml(Path("s.yaml"))
    (error,) = refused(write(seeds(3, 4), command=stand_in))
    assert error.startswith("runs/s: holds another sweep: none of its 2 runs is in s.yaml")
    write(seeds(1, 2), command=stand_in, description="more words", run_cap=9)
    assert "0 of 2 runs to do" in call("sweep", "s.yaml").err
    changed = {**EXPERIMENT, "trainer": {**EXPERIMENT["trainer"], "max_steps": 3}}
    Path("experiment.yaml").write_text(yaml.safe_dump(changed))
    (error,) = refused("s.yaml")
    assert error.startswith("runs/s/seed=1-") and "experiment.yaml was another, as 2 of the runs" in error
    Path("mine").mkdir()
    Path("mine/file").touch()
    (error,) = refused("s.yaml", "--out", "mine")
    assert error.startswith("mine: already there and not empty")


def test_a_sweep_can_be_extended(stand_in: list[str]) -> None:
    assert call("sweep", write({"seed": {"value": 1}, "warmup.beta": {"value": "1e-2"}}, command=stand_in)).code == 0
    (first,) = Path("runs/s").glob("*/summary.json")
    before = first.stat().st_mtime_ns
    result = call("sweep", write({**seeds(1, 2), "warmup.beta": {"value": "1e-2"}}, command=stand_in))
    assert result.code == 0 and "1 of 2 runs to do" in result.err and first.stat().st_mtime_ns == before
    (row,) = csv.DictReader(Path("runs/s/compare.csv").read_text().splitlines())
    assert row["seeds"] == "1 2"
    kept = Path("runs/s/sweep.yaml")
    copied = kept.read_bytes(), kept.stat().st_ino
    result = call("sweep", kept, "--out", "runs/s")
    assert result.code == 0 and "0 of 2 runs to do" in result.err
    assert (kept.read_bytes(), kept.stat().st_ino) == copied == (Path("s.yaml").read_bytes(), copied[1])


def test_a_full_disk_is_one_line_and_loses_nothing(stand_in: list[str]) -> None:
    path = write(seeds(1, 13), command=stand_in)
    with full_disk():
        result = call("sweep", path)
    assert result.code == 2 and result.errors == [
        "runs/s: File too large; mend that to go on with the same command, or give --out another"
    ]
    assert call("sweep", path).code == 1
    write(seeds(1, 13, 2, 3), command=stand_in)
    before = tree(Path("runs"))
    with full_disk():
        assert call("sweep", path).code == 2
    assert tree(Path("runs")) == before
    shutil.copy(path, "runs/s/sweep.yaml")
    before = tree(Path("runs"))
    next(Path("runs/s").glob("seed=13*.log")).unlink()
    with full_disk():
        result = call("sweep", path)
    assert result.code == 2 and len(result.errors) == 1 and "failed" not in result.err  # a run without a word
    assert sorted(one.name for one in Path("runs/s").glob("*.log"))[-1].startswith("seed=13")  # and no more of them
    with full_disk():
        result = call("compare", "runs/s")
    assert result.code == 2 and "cannot be written: File too large" in result.errors[0]
    for name in ("compare.csv", "runs.csv", "compare.png", "sweep.yaml"):
        assert Path("runs/s", name).read_bytes() == before[f"runs/s/{name}"]
    Path("runs/s/compare.csv").write_text("")  # as an older version left it
    assert call("compare", "runs/s").code == 0


def test_a_comparison_that_fails_leaves_the_runs(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(seeds(1, 13), command=stand_in)
    Path("runs/s").mkdir(parents=True)
    Path("runs/s/sweep.yaml").touch()
    Path("runs/s/compare.csv").write_text("mine")
    (error,) = refused(path)  # before the first run
    assert error.startswith("runs/s/compare.csv: already there, and no comparison wrote it")
    Path("runs/s/compare.csv").unlink()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rl_backspace.picture.draw", fail)
    result = call("sweep", path)
    told = result.err[result.err.index("failed: ") :].splitlines()
    assert result.code == 1 and [line.split(":")[0] for line in told] == [
        "failed",
        "error",
        "the runs are kept; once that is mended",
    ]
    assert "No space left" in told[1] and told[2].endswith("rl-backspace compare runs/s")


def test_a_run_that_finished_just_now_is_not_moved(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(seeds(1, 2), command=stand_in)
    claimed = sweep.claimed

    def late(folder: Path) -> Any:
        monkeypatch.setattr(sweep, "claimed", claimed)
        assert call("sweep", path).code == 0  # another one, which ends before this one has the lock
        return claimed(folder)

    monkeypatch.setattr(sweep, "claimed", late)
    result = call("sweep", path)
    assert result.code == 0 and "0 of 2 runs to do" in result.err and not Path("runs/s/unfinished").exists()


def test_a_command_that_cannot_start_fails_alone(stand_in: list[str]) -> None:
    Path(stand_in[1]).write_text("#!/nowhere/python\n")
    result = call("sweep", write(seeds(1, 2), command=stand_in[1:]))
    (line,) = [line for line in result.err.splitlines() if line.startswith("failed: ")]
    assert result.code == 1 and "and 1 more: FileNotFoundError" in line and "2/2" in result.err


def test_ctrl_c_while_a_run_is_started_ends_that_one_too(stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(*given: Any, popen: Any = subprocess.Popen, **options: Any) -> Any:
        started.append(popen(*given, **options))
        wait_for(lambda: list(Path("runs/s").glob("seed=99*/config.yaml")))
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    result = call("sweep", write(seeds(99, 1), command=stand_in))
    assert result.code == 130 and "interrupted: 0 of 2 runs finished" in result.err
    assert [process.poll() for process in started] == [130]
    assert list(Path("runs/s").glob("seed=99*/saved"))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def sweep_to_file(background: bool = False) -> None:
    if background:  # as a shell starts what ends in &
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = call("sweep", "s.yaml")
    Path("err").write_text(result.err)
    sys.exit(result.code)


@pytest.fixture
def sweeping(stand_in: list[str], request: pytest.FixtureRequest) -> Iterator[BaseProcess]:
    """A sweep in a process of its own, whose second run takes long; its parameter: whether in the background."""
    write(seeds(1, 99, 2), command=stand_in)
    background = getattr(request, "param", False)
    process = multiprocessing.get_context("fork").Process(target=sweep_to_file, args=[background])  # with all imports
    process.start()
    wait_for(lambda: list(Path("runs/s").glob("seed=99*/config.yaml")))
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize(
    ("number", "sweeping"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)],
    indirect=["sweeping"],
)
def test_what_ends_a_sweep_ends_its_runs_first(number: int, sweeping: BaseProcess) -> None:
    os.kill(sweeping.pid or 0, number)
    sweeping.join(60)
    err = Path("err").read_text()
    assert sweeping.exitcode == 130 and "Traceback" not in err
    assert err.endswith("interrupted: 1 of 3 runs finished; the same command does the others\n")
    assert len(list(Path("runs/s").glob("seed=99*/saved"))) == 1
    Path("quick").touch()
    result = call("sweep", "s.yaml")
    assert result.code == 0 and "2 of 3 runs to do" in result.err
    (aside,) = Path("runs/s/unfinished").iterdir()
    assert re.fullmatch(r"seed=99-\w+\.1", aside.name) and (aside / "saved").exists()
    assert f"did not finish before; moved to {aside}, to run again" in result.err
    straight = call("sweep", "s.yaml", "--out", "straight")
    assert straight.out.replace("straight", "runs/s") == result.out
    for name in ("compare.csv", "runs.csv"):
        texts = [Path(folder, name).read_text() for folder in ("runs/s", "straight")]
        assert texts[0] == texts[1].replace("straight", "runs/s")


def test_runs_that_outlive_their_sweep_are_waited_for(sweeping: BaseProcess) -> None:
    sweeping.kill()
    sweeping.join()
    Path("quick").touch()
    result = call("sweep", "s.yaml")
    assert (result.code, result.errors) == (
        2,
        ["runs/s: its runs are going on; wait for them, or end them"],
    )
    log = next(Path("runs/s").glob("seed=99*.log"))
    pids = [int(line.name) for line in Path("/proc").iterdir() if line.name.isdigit() and _writes(line, log)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert pids
    wait_for(lambda: call("sweep", "s.yaml").code == 0)
    assert len(list(Path("runs/s/unfinished").iterdir())) == 1
    assert len(list(Path("runs/s").glob("*/summary.json"))) == 3


def _writes(process: Path, log: Path) -> bool:
    with contextlib.suppress(OSError):
        return (process / "fd/1").resolve() == log.resolve()
    return False


# and with training


def test_a_sweep_that_was_cut_short_ends_as_one_that_was_not(here: Path) -> None:
    """Tiny runs: one that finished before, Ctrl-C in the second one, and the same command again."""
    content = {**EXPERIMENT, "model": str(checkpoint(here / "base"))}
    Path("experiment.yaml").write_text(yaml.safe_dump(content))
    path = write({"seed": {"values": [0, 1]}, "trainer.max_steps": {"value": 25}})
    runs = read(path).runs
    for run in runs:
        result = call("train", "experiment.yaml", *arguments(run.values), "--out", f"straight/{run.id}")
        assert result.code == 0, result.err
    straight = call("compare", "straight")
    assert straight.code == 0

    first, second = (here / "cut" / run.id for run in runs)
    shutil.copytree(here / "straight" / runs[0].id, first)
    shutil.copy(path, here / "cut" / "sweep.yaml")
    before = {one: one.stat().st_mtime_ns for one in first.rglob("*")}

    def interrupt() -> None:
        metrics = second / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"reward"' in metrics.read_text(), 180)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    cut = call("sweep", path, "--out", "cut")
    assert cut.code == 130 and "1 of 2 runs finished" in cut.err
    assert (second / "adapter" / "adapter_config.json").exists()  # it saved
    assert not (second / "summary.json").exists()
    again = call("sweep", path, "--out", "cut")
    assert again.code == 0, again.err
    assert f"{Path('cut') / runs[1].id}: did not finish before" in again.err
    assert {one: one.stat().st_mtime_ns for one in first.rglob("*")} == before
    assert again.out == straight.out.replace("straight", "cut")


def test_a_disk_that_is_full_in_the_end_keeps_the_policy(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunFolder, file: str, content: Any) -> None:
        if file == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    content = {
        **EXPERIMENT,
        "model": str(checkpoint(here / "base")),
        "trainer": {**EXPERIMENT["trainer"], "max_steps": 1},
    }
    Path("experiment.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(RunFolder, "_write", full)
    for failing, said in (
        ("versions.json", "runs/versions.json: cannot write the run folder: No space left on device"),
        (
            "summary.json",
            "OSError: [Errno 28] No space left on device; the adapter as it was is in runs/summary",
        ),
    ):
        result = call("train", "experiment.yaml", "--out", f"runs/{failing}")
        assert result.code == 2 and len(result.errors) == 1 and result.errors[0].startswith(said)
    assert Path("runs/summary.json/adapter/adapter_config.json").exists()


# the same file with an account


def test_wandbs_agent_starts_the_same_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's own code, with a stand-in that says what it was called with; then that call, for a config."""
    values = {
        "seed": 3,
        "lora": None,
        "rewards.delete_cost.kwargs.cost": 1e-05,
        "delete.tokens": {"<|undo|>": "line", "<|back|>": 3},
        "trainer.scale_rewards": False,
        "warmup.sources": {"random": 1.0},
    }
    say = here / "bin" / "rl-backspace"
    say.parent.mkdir()
    say.write_text(
        f"#!{sys.executable}\nimport json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open('said', 'w'))"
    )
    say.chmod(0o755)
    monkeypatch.setenv("PATH", f"{say.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "old")  # both are the agent's to set; here so that they are put back
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    monkeypatch.setenv("WANDB_DIR", "")
    agent = Agent(api=None, queue=None, sweep_id="s1")
    path = write({name: {"value": value} for name, value in values.items()})
    agent._sweep_command = read_yaml(path)["command"]
    command = {"run_id": "r7", "program": "x", "args": {name: {"value": value} for name, value in values.items()}}
    agent._command_run(command)
    assert agent._run_processes["r7"].wait() == 0
    (said, environment) = json.loads(Path("said").read_text())
    (run,) = read(path).runs
    ours = read(path).command(run, Path("out"))
    assert ours[ours.index("train") : -2] == said
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, environment[name])

    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def init(**given: Any) -> None:
        seen.update(given)
        raise Stop

    content = {**EXPERIMENT, "model": str(checkpoint(here / "base"))}
    Path("experiment.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("wandb.init", init)
    with pytest.raises(Stop):
        call(*said)
    config = parse(read_yaml(Path("runs/tiny-r7/config.yaml")))  # a folder that no other run of the sweep has
    assert config.seed == 3 and config.lora is None and config.trainer["scale_rewards"] is False
    assert config.rewards["delete_cost"].kwargs == {"cost": 1e-5}
    assert config.delete.tokens == {"<|undo|>": "line", "<|back|>": 3}
    assert seen["name"] == "tiny-r7" and seen["mode"] is None and seen["project"] is None  # the sweep's own
    assert config.wandb is None


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_it_can_run(path: Path, here: Path) -> None:
    """Once the runs are there that they go on from."""
    shutil.copytree(SWEEPS.parent, "experiments")
    if "runs/warm-" in path.read_text():
        for error in refused(f"experiments/sweeps/{path.name}"):
            assert "there is no run runs/warm-" in error
    for seed in range(3):
        (here / f"runs/warm-{seed}/adapter").mkdir(parents=True)
        (here / f"runs/warm-{seed}/config.yaml").touch()
        (here / f"runs/warm-{seed}/adapter/adapter_config.json").touch()
    result = call("sweep", f"experiments/sweeps/{path.name}", "--dry-run")
    assert result.code == 0 and len(result.out.splitlines()) > 1
