from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from checkpoints import CHARACTERS, checkpoint
from commands import Result, call, full_disk
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl
from trl.rewards import think_format_reward
from wandb.proto.wandb_internal_pb2 import Record

from rl_backspace.callbacks import StopOnInterrupt
from rl_backspace.config import parse, read_yaml
from rl_backspace.errors import UserError
from rl_backspace.folder import RunFolder, TraceTable
from rl_backspace.policy import load
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Machine, Retry, Rules, Unit, replay
from rl_backspace.tasks import signs

BASE_OF_ARITH = Path(__file__).parents[1] / "experiments" / "bases" / "arith-1m.yaml"

ANSWER, ACTIONS = 5, 14
LENGTH = "def length(completions):\n    return [float(len(text)) for text in completions]\n"


class Replace(dict[str, Any]):
    """A block that replaces the one it changes."""


def merge(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested blocks are merged, all else is replaced."""
    merged = dict(content)
    for key, value in changes.items():
        old = content.get(key)
        nested = isinstance(value, dict) and isinstance(old, dict) and not isinstance(value, Replace)
        merged[key] = merge(old, value) if nested else dict(value) if isinstance(value, dict) else value
    return merged


def experiment(folder: Path, base: Path, /, **changes: Any) -> Path:
    """An experiment file that trains for a second."""
    content: dict[str, Any] = {
        "name": "tiny",
        "model": str(base),
        "task": {"fn": "signs", "count": 3, "train": 60, "test": 8},
        "delete": {"budget": ACTIONS},
        "lora": {"r": 4, "alpha": 8},
        "warmup": {"steps": 0},
        "rewards": {"correct": {"fn": "correctness:checked"}},
        "trainer": {
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": ANSWER,
        },
        "evaluation": {"rows": 2},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(merge(content, changes)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, and every folder."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


def assert_refused(folder: Path, *arguments: object) -> list[str]:
    """Exit code 2, only `error:` lines to read, nothing written; those lines."""
    before = tree(folder)
    result = call(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err + result.out
    assert result.errors
    assert tree(folder) == before
    return result.errors


# one trained run, looked at from all sides


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "mine.py").write_text(LENGTH)
    path = experiment(
        folder,
        base,
        seed=3,
        warmup={
            "steps": 60,
            "clean": 0.2,
            "sources": {"random": 1.0},
            "trainer": {"per_device_train_batch_size": 16, "learning_rate": 1e-2},
        },
        rewards={
            "delete_cost": {"fn": "delete_cost:flat", "weight": 0.5},
            "loop_penalty": {"fn": "loop_penalty:repeats"},
            "length": {"fn": f"{folder / 'mine.py'}:length", "weight": 0.0},
        },
        trainer={"max_steps": 3, "per_device_train_batch_size": 16, "learning_rate": 1e-3},
        evaluation={"rows": 8},
    )
    result = call("train", path, "--out", folder / "run", "--reward.delete_cost.kwargs.cost=0.25")
    assert result.code == 0, result.err
    return folder / "run", result


@pytest.fixture(scope="module")
def run(finished: tuple[Path, Result]) -> Path:
    return finished[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_shows_progress_results_and_where_they_are(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert str(folder) in "".join(result.out.split("\n"))
    for stage in ("base", "before", "after"):
        assert re.search(rf"{stage} +│ (allowed|blocked) +│ +[\d.]+ ", result.out)
    last = re.split(r"[\r\n]", result.err)
    assert any(line.startswith("warm-up: 100%") for line in last)
    assert any(line.startswith("rl: 100%") and "reward=" in line and "accuracy=" in line for line in last)


def test_the_resolved_config_parses_again(run: Path) -> None:
    config = parse(read_yaml(run / "config.yaml"))
    assert config.seed == 3
    assert config.rewards["delete_cost"].kwargs == {"cost": 0.25}
    assert config.delete.tokens == {"<|delete|>": "token"}  # a default, written out


def test_versions_and_seed_are_kept(run: Path) -> None:
    versions = json.loads((run / "versions.json").read_text())
    assert versions["seed"] == 3
    assert versions["packages"]["torch"] == torch.__version__
    assert versions["packages"]["transformers"] == transformers.__version__
    assert {"rl-backspace", "trl", "peft"} <= set(versions["packages"])


def test_metrics_hold_every_step_and_every_reward_term(run: Path) -> None:
    metrics = lines(run / "metrics.jsonl")
    assert {record["phase"] for record in metrics} == {"warm-up", "detector", "rl", "evaluation"}
    measured = [record for record in metrics if record["phase"] == "detector"]
    assert [record["step"] for record in measured] == [0, 60]  # before and after, and at each refresh between
    assert all(set(record) >= {"random", "early", "samples", "uncertain", "rollouts"} for record in measured)
    steps = [record for record in metrics if record["phase"] == "rl" and "reward" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    weights = {"correct": 1.0, "delete_cost": 0.5, "loop_penalty": 1.0, "length": 0.0}
    for record in steps:
        means = {name: record[f"rewards/{name}/mean"] for name in weights}
        assert record["reward"] == pytest.approx(sum(weights[name] * means[name] for name in weights), abs=1e-5)
        assert all(math.isfinite(record[f"rewards/{name}/std"]) for name in weights)
        assert record["logp_gap_max"] < 1e-4
        assert record["deletes_per_answer"] >= 0
    assert steps[-1]["rewards/length/mean"] > 0  # a metric only, and a metric


def test_traces_replay_to_what_they_say(run: Path) -> None:
    policy = load(run / "adapter")
    config = parse(read_yaml(run / "config.yaml"))
    traces = lines(run / "traces.jsonl")
    assert [sum(trace["step"] == step for trace in traces) for step in range(3)] == [8, 8, 8]
    assert any(trace["deletes"] for trace in traces) and not all(trace["deletes"] for trace in traces)
    for trace in traces:
        machine = replay(trace["actions"], policy.rules, Budget(ANSWER, ACTIONS))
        assert policy.text(machine.visible) == trace["visible"]
        assert (machine.end, machine.deleted) == (trace["end"], trace["deletes"])
        assert list(trace["rewards"]) == list(config.rewards)
        assert trace["rewards"]["length"] == len(trace["visible"])
        numbers, target = trace["prompt"].rstrip(":").split("=")
        values = [int(number) for number in numbers.split()]
        signs = [{"+": 1, "-": -1}.get(sign, math.nan) for sign in trace["visible"]]
        total = sum(s * v for s, v in zip(signs, values, strict=True)) if len(signs) == 3 else math.nan
        assert trace["rewards"]["correct"] == float(total == int(target) and trace["end"] == "eos")
    late = [trace for trace in traces if trace["step"] == 2]
    assert all(trace["rewards"]["delete_cost"] == pytest.approx(-0.25 * trace["deletes"]) for trace in late)
    assert all(trace["rewards"]["delete_cost"] == 0 for trace in traces if trace["step"] == 0)


def test_the_summary_is_nested_by_stage_token_and_decoding(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for measure in ("accuracy", "deletes_per_answer"):
        for stage in ("before", "after"):
            for token in ("allowed", "blocked"):
                cells = summary[measure][stage][token]
                assert set(cells) == {"sampled", "greedy"}
                assert all(0 <= value <= (1 if measure == "accuracy" else ACTIONS) for value in cells.values())
                if measure == "deletes_per_answer" and token == "blocked":
                    assert set(cells.values()) == {0}
    assert 0 <= summary["logp_gap_max"] < 1e-4
    assert summary["forward_passes"] == summary["actions"] - summary["deletes"]
    assert summary["actions"] > summary["deletes"] > 0
    assert summary["steps"] == 3 and summary["seconds"] > 0


def test_the_adapter_loads_in_plain_peft(run: Path, base: Path) -> None:
    ids = torch.arange(CHARACTERS + 1)[None]
    with torch.no_grad():
        expected = load(run / "adapter").model.eval()(input_ids=ids).logits
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
        auto = AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter"))
        for model in (plain, auto):
            assert torch.equal(model.eval()(input_ids=ids).logits, expected)
        untrained = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
    assert not torch.allclose(untrained, expected, atol=0.1)  # and it learned something
    assert AutoTokenizer.from_pretrained(run / "adapter").convert_tokens_to_ids("<|delete|>") == CHARACTERS


def test_eval_measures_what_train_measured(run: Path) -> None:
    before = tree(run)
    result = call("eval", run, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    summary = json.loads((run / "summary.json").read_text())
    for measure in ("accuracy", "deletes_per_answer", "finished"):
        for token in ("allowed", "blocked"):
            got = {how: results["arms"][token][measure] for how, results in found.items()}
            assert got == summary[measure]["after"][token]
    assert tree(run) == before


def test_eval_takes_fewer_rows_and_prints_a_table(run: Path) -> None:
    assert json.loads(call("eval", run, "--json", "--rows", 3).out)["greedy"]["arms"]["allowed"]["answers"] == 3
    shown = call("eval", run, "--rows", 3).out
    assert "random times" in shown and "wrong at first, right in the end" in shown


def test_generate_prints_a_trace_for_each_prompt(run: Path) -> None:
    default = call("generate", run)
    assert default.code == 0 and len(default.out.splitlines()) == 3
    prompts = ["1 2 3=6:", "4 5 6=3:"]
    result = call("generate", run, *prompts, "--seed", 1)
    assert [line[: len(p) + 1] for line, p in zip(result.out.splitlines(), prompts, strict=True)] == [
        f"{p} " for p in prompts
    ]
    assert call("generate", run, *prompts, "--seed", 1).out == result.out
    greedy = {call("generate", run, *prompts, "--temperature", 0, "--seed", seed).out for seed in range(3)}
    assert len(greedy) == 1


def test_generate_takes_prompts_from_anywhere_and_prints_json(
    run: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "one.txt").write_text("1 2 3=6:\n")
    (here / "many.jsonl").write_text('"4 5 6=3:"\n{"prompt": "7 8 9=6:", "answer": "?"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("9 9 9=9:\n"))
    result = call("generate", run, "3 3 3=3:", "-", "--file", here / "many.jsonl", "--json", "--temperature", 0)
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["prompt"] for record in records] == ["3 3 3=3:", "9 9 9=9:", "4 5 6=3:", "7 8 9=6:"]
    for record in records:
        assert set(record) == {"prompt", "actions", "typed", "visible", "end", "deletes"}
    (text,) = call("generate", run, "--file", here / "one.txt", "--json").out.splitlines()
    assert json.loads(text)["prompt"] == "1 2 3=6:"
    (here / "bad.jsonl").write_text('"a"\n{"question": 1}\n')
    assert "bad.jsonl: line 2 has no prompt" in assert_refused(here, "generate", run, "--file", here / "bad.jsonl")[0]
    for content in ("5", "null", '{"prompt": 7}', '{"prompt": []}', '["1 2 3=6:"]', '[{"role": "user"}]', "{"):
        (here / "bad.jsonl").write_text(f"{content}\n")
        said = assert_refused(here, "generate", run, "--file", here / "bad.jsonl")
        assert len(said) == 1 and "bad.jsonl: line 1 has no prompt" in said[0]
    for name in ("empty.txt", "empty.jsonl"):
        (here / name).write_text("\n")
        assert "got an empty file" in assert_refused(here, "generate", run, "--file", here / name)[0]
    (here / "odd.jsonl").write_text('"1 2 3=6:\u2028"\n\n"4 5 6=3:"\n', encoding="utf-8")
    assert call("generate", run, "--file", here / "odd.jsonl", "--json").out.count("\n") == 2
    said = assert_refused(here, "generate", run, "1 2 3=6:", "--final", "--json")
    assert said == ["--final and --json: got both; expected one of them"]


def test_generate_deletes_as_readily_as_it_is_told_to(run: Path) -> None:
    def deletes(*options: object) -> list[int]:
        lines = call("generate", run, "1 2 3=6:", "--json", "--temperature", 0, *options).out.splitlines()
        return [json.loads(line)["deletes"] for line in lines]

    assert deletes("--blocked", "--bias", 50) == [0] and deletes("--bias", 50)[0] > 2
    final = call("generate", run, "1 2 3=6:", "--final", "--temperature", 0, "--bias", 5, "--window", 1)
    record = call("generate", run, "1 2 3=6:", "--json", "--temperature", 0, "--bias", 5, "--window", 1)
    assert final.out.strip() == json.loads(record.out)["visible"].strip()


def test_without_lora_all_of_the_model_is_trained_and_saved(here: Path) -> None:
    """From a base whose generation config is one that transformers publishes but would not write."""
    base = checkpoint(here / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [7]}')
    path = experiment(
        here,
        base,
        lora=None,
        warmup={"steps": 60, "clean": 0.2, "trainer": {"per_device_train_batch_size": 16, "learning_rate": 1e-2}},
        trainer={"per_device_train_batch_size": 16, "learning_rate": 1e-3, "gradient_checkpointing": True},
        rewards={"length": {"fn": "mine.py:length"}},
    )
    (here / "mine.py").write_text(LENGTH)
    result = call("train", path, "--out", "run")
    assert result.code == 0, result.err
    assert "written to run: model, summary.json, metrics.jsonl, traces.jsonl" in result.out.replace("\n", " ")
    assert not (here / "run" / "adapter").exists()
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert 0 < summary["logp_gap_max"] < 1e-4 and summary["deletes"] > 0
    ids = torch.arange(CHARACTERS + 1)[None]
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, here / "run" / "model"))
    with torch.no_grad():
        assert torch.equal(after(input_ids=ids).logits, load(here / "run" / "model").model.eval()(input_ids=ids).logits)
    trained = after.state_dict()
    assert not [name for name, weights in before.state_dict().items() if torch.equal(weights, trained[name])]
    measured = json.loads(call("eval", "run", "--json").out)
    assert measured["greedy"]["arms"]["allowed"]["accuracy"] == summary["accuracy"]["after"]["allowed"]["greedy"]
    assert call("generate", "run", "1 2 3=6:").out.startswith("1 2 3=6: ")


@pytest.mark.parametrize(("lora", "kept"), [({"r": 4}, "adapter"), (None, "model")])
def test_no_steps_of_rl_are_a_warm_up_alone(
    lora: Any, kept: str, here: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what only RL needs is no matter: prompts enough for its batches, a reference, rewards that work."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an RL trainer was made")

    monkeypatch.setattr("rl_backspace.run.BackspaceGRPOTrainer", never)
    (here / "mine.py").write_text("def reward(completions):\n    raise RuntimeError('the judge is away')\n")
    path = experiment(
        here,
        base,
        lora=lora,
        warmup={"steps": 2, "trainer": {"per_device_train_batch_size": 4}},
        rewards={"mine": {"fn": "mine.py:reward"}},
        trainer={"per_device_train_batch_size": 800, "beta": 0.1},
    )
    result = call("train", path, "--out", "run", "trainer.max_steps=0")
    assert result.code == 0, result.err
    assert f"written to run: {kept}, summary.json, metrics.jsonl, config.yaml" in result.out.replace("\n", " ")
    assert "after GRPO" not in result.out and "forward passes" not in result.out
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"base", "before"}
    assert {summary[count] for count in ("steps", "actions", "deletes", "forward_passes")} == {0}
    assert summary["logp_gap_max"] is None and summary["seconds"] > 0
    measured = json.loads(call("eval", "run", "--json").out)
    assert measured["sampled"]["arms"]["allowed"]["accuracy"] == summary["accuracy"]["before"]["allowed"]["sampled"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "{run}", "--rows", "0"], "--rows"),
        (["eval", "{run}", "--seed", "x"], "--seed"),
        (["eval", "{run}", "--seed", str(2**32)], "--seed"),
        (["eval", "{run}", "--seed", "-1"], "--seed"),
        (["generate", "{run}", "--seed", "9" * 21], "--seed"),
        (["generate", "{run}", "--temperature", "-1"], "--temperature"),
        (["generate", "{run}", "1" * 200], "the model's limit is 128"),
        (["generate", "{run}", ""], "a prompt has no tokens"),
        (["eval", "{run}/adapter"], "no finished run here (config.yaml is missing)"),
        (["generate", "/nowhere"], "/nowhere: no finished run here"),
        (["generate", "{run}/adapter"], "so no task with prompts; give one"),
        (["generate", "{run}", "--file", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
        (["generate", "{run}", "--tokens", "0"], "--tokens"),
        (["generate", "{run}", "--tokens", "500"], "the model's limit is 128"),
        (["generate", "{run}", "--window", "-1"], "--window"),
        (["export", "{run}", "{run}"], "already there and not empty; choose another folder\n"),
        (["pretrain", str(BASE_OF_ARITH), "{run}"], "not empty; choose another folder\n"),
        (["export", "/nowhere", "x"], "/nowhere: no finished run here"),
        (["eval"], "RUN"),
        (["evaluate", "{run}"], "No such command 'evaluate'"),
        (["train", "{run}/config.yaml", "--out", "{run}"], "already there and not empty"),
    ],
)
def test_bad_commands_on_a_run_leave_it_alone(arguments: list[str], said: str, run: Path) -> None:
    (error,) = assert_refused(run, *(argument.format(run=run) for argument in arguments))
    assert said in f"{error}\n"


def test_a_run_that_was_cut_short_is_no_run(here: Path) -> None:
    (here / "config.yaml").write_text("name: [")
    (error,) = assert_refused(here, "eval", here)
    assert "adapter/adapter_config.json is missing" in error
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    (error,) = assert_refused(here, "generate", here)
    assert "not valid YAML" in error


def test_chat_data_with_trls_and_an_async_reward(here: Path) -> None:
    """Your own chat messages, a reward of TRL's that reads messages, and one that waits for something."""
    model = checkpoint(here / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"
    tokenizer.save_pretrained(model)
    rows = [{"chat": [{"role": "user", "content": f"say {i}"}], "say": str(i), "level": i} for i in range(40)]
    (here / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "mine.py").write_text(
        "import asyncio\n"
        "async def level(completions, level, deletes):\n"
        "    await asyncio.sleep(0)\n"
        "    assert all(c[0]['role'] == 'assistant' for c in completions) and len(deletes) == len(level)\n"
        "    return [float(x) for x in level]\n"
    )
    path = experiment(
        here,
        model,
        task=Replace(fn="data", path="chat.jsonl", prompt="chat", answer="say"),
        warmup={"steps": 1, "trainer": {"per_device_train_batch_size": 4}},
        rewards={
            "think": {"fn": "trl.rewards:think_format_reward"},
            "level": {"fn": "mine.py:level", "weight": 0.0},
            "correct": {"fn": "correctness:exact"},
        },
    )
    result = call("train", path, "--out", "run")
    assert result.code == 0, result.err
    traces = lines(here / "run" / "traces.jsonl")
    assert traces
    for trace in traces:
        said = [[{"role": "assistant", "content": trace["visible"]}]]
        (message,) = trace["prompt"]
        assert trace["rewards"]["think"] == think_format_reward(said)[0]
        assert f"say {trace['rewards']['level']:.0f}" == message["content"]
    answered = call("generate", "run", "say 7")
    assert answered.code == 0 and answered.out.startswith("say 7 ")


# the corrections that a warm-up would begin with, to be read

LADDER = {"random": 1, "early": 1, "samples": 1, "uncertain": 1, "rollouts": 1}


def corrections(folder: Path, base: Path, **changes: Any) -> Path:
    warmup = {"steps": 2, "clean": 0.2, "group": 3, "sources": LADDER}
    return experiment(folder, base, **{**changes, "warmup": {**warmup, **changes.get("warmup", {})}})


def assert_fields_agree(record: dict[str, Any], deletes: dict[int, Unit], retry: Retry = "ban") -> None:
    """What is told of a correction, by its actions alone."""
    tokenizer = character_tokenizer()
    keys = {token: "⌫" if len(deletes) == 1 else f"⌫{unit} " for token, unit in deletes.items()}
    keys[tokenizer.eos_token_id] = "⏎"

    def read(token: int) -> str:
        return keys.get(token) or tokenizer.decode([token]).replace("\n", "↵") or f"[{token}]"  # a row with no text

    actions, targets, learn = record["actions"], record["targets"], record["learn"]
    assert len(actions) == len(targets) == len(learn) == len(record["learned"])
    assert record["typed"] == "".join(map(read, actions))
    assert record["learned"] == [read(t) if learned else None for t, learned in zip(targets, learn, strict=True)]
    machine, seen = Machine(Rules(deletes, frozenset([tokenizer.eos_token_id]), retry=retry), Budget(99, 999)), []
    for action in actions:
        machine.step(action)
        seen.append(tokenizer.decode(machine.answer))
    assert record["visible"] == seen[-1]
    if record["source"] == "rollouts":
        assert record["mistakes"] == []
        return
    assert targets == actions and machine.end == "eos"
    assert bool(record["mistakes"]) == (record["source"] is not None) == (not all(learn))
    assert sum(mistake["deletes"] for mistake in record["mistakes"]) == machine.deleted
    runs = [list(run) for learned, run in itertools.groupby(range(len(learn)), learn.__getitem__) if not learned]
    wrong = [tokenizer.decode([actions[i] for i in run]) for run in runs]
    assert [mistake["wrong"] for mistake in record["mistakes"]] == wrong
    for mistake in record["mistakes"]:
        assert mistake["after"] + mistake["wrong"] in seen
        assert mistake["after"] + mistake["right"] == record["visible"]


@pytest.mark.parametrize("tokens", [{"<|delete|>": "token"}, {"<|delete|>": 2, "<|clear|>": "answer"}])
def test_corrections_are_written_as_lines_that_say_what_they_are(
    tokens: dict[str, Unit], here: Path, base: Path
) -> None:
    path = corrections(here, base, delete={"tokens": Replace(tokens)})
    before = set(tree(here))
    result = call("corrections", path, "--count", 40, "--out", "made.jsonl")
    assert (result.code, result.out) == (0, "")
    assert "120 corrections of 40 prompts written to made.jsonl" in result.err
    assert set(tree(here)) == {*before, str(here / "made.jsonl")}
    records = lines(here / "made.jsonl")
    assert len(records) == 120
    assert {record["source"] for record in records} == {None, *LADDER}
    task = signs(3, train=60, test=8)
    answers = {row["prompt"]: row for row in task.train}
    for record in records:
        row = answers[record["prompt"]]  # a train prompt
        assert record["answer"] == row["answer"]
        assert_fields_agree(record, dict(enumerate((tokens[name] for name in sorted(tokens)), CHARACTERS)))
        if record["source"] != "rollouts":
            assert task.correct(row, record["visible"])
            for mistake in record["mistakes"]:
                assert task.alive(row, mistake["after"])
                assert not task.alive(row, mistake["after"] + mistake["wrong"])
    groups = [{record["prompt"] for record in records[i : i + 3]} for i in range(0, 120, 3)]
    assert all(len(group) == 1 for group in groups)


def test_corrections_are_printed_with_what_is_learned_below(here: Path, base: Path) -> None:
    path = corrections(here, base)
    before = tree(here)
    result = call("corrections", path, "--count", 8)
    assert result.code == 0 and tree(here) == before
    *printed, _, _ = result.out.splitlines()  # the last two say how to read them
    call("corrections", path, "--count", 8, "--out", "made.jsonl")
    records = lines(here / "made.jsonl")
    assert len(printed) == 2 * len(records) == 48
    for typed, learned, record in zip(printed[::2], printed[1::2], records, strict=True):
        assert typed == f"{record['prompt']} {record['typed']}"
        marks, source = learned[: len(typed)], learned[len(typed) :].strip()
        assert source == (record["source"] or "no error")
        told = zip(record["learned"], record["actions"], record["targets"], strict=True)
        expected = [
            "." * (1 if action < CHARACTERS + 1 else len(f"[{action}]"))  # a row with no text shows its number
            if text is None
            else "^"
            if action == target
            else text
            for text, action, target in told
        ]
        assert marks == " " * (len(record["prompt"]) + 1) + "".join(expected)


def test_the_same_seed_gives_the_same_corrections(here: Path, base: Path) -> None:
    path = corrections(here, base)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("corrections", path, "--count", 5, "--out", name, f"seed={seed}").code == 0
    assert (here / "a").read_bytes() == (here / "b").read_bytes() != (here / "c").read_bytes()
    clean = call("corrections", path, "--count", 2, "warmup.clean=1.0", "--warmup.group=2")
    assert clean.out.count("no error") == 4


def test_corrections_of_your_own_data(here: Path, base: Path) -> None:
    """Of one right answer, line by line, whose columns have names of their own."""
    rows = [{"q": f"{i}?", "a": f"{i}\n{i * i}", "level": i} for i in range(1, 40)]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = corrections(
        here,
        base,
        task=Replace(fn="data", path="mine.jsonl", prompt="q", answer="a"),
        delete={"tokens": Replace({"<|delete|>": "line"}), "retry": "free", "budget": 40},
        trainer={"max_completion_length": 12},
    )
    assert call("corrections", path, "--count", 12, "--out", "made.jsonl").code == 0
    records, answers = lines(here / "made.jsonl"), {row["q"]: row["a"] for row in rows}
    assert {None, "random", "samples"} <= {record["source"] for record in records}
    for record in records:
        assert record["answer"] == answers[record["prompt"]]
        assert "\n" not in record["typed"]
        if record["source"] != "rollouts":
            assert record["visible"] == record["answer"]
    assert any("↵" in record["typed"] for record in records)
    printed = call("corrections", path, "--count", 12).out.splitlines()
    assert len(printed) == 2 * len(records) + 2  # a line of an answer is no line here


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{config}", "--out", "experiment.yaml"], "experiment.yaml: already there"),
        (["{config}", "--out", "."], ".: already there"),
        (["{config}", "--out", "nowhere/made.jsonl"], "nowhere/made.jsonl: there is no folder nowhere"),
        (["{config}", "--count", "0"], "--count"),
        (["{config}", "--cuont=3"], "cuont: unknown key"),
        (["{config}", "seed=zero"], "seed: expected a valid integer"),
        (["{config}", "warmup.sources={{}}"], "warmup.sources"),
        (["{config}", "warmup.sources.sample=1"], "warmup.sources"),
        (["{config}", "model=./nowhere"], "model: './nowhere' is no folder"),
        (["{config}", "trainer.max_completion_length=2"], "task: the answer"),
        (["nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        ([], "CONFIG"),
    ],
)
def test_corrections_that_cannot_be_made_are_one_clear_line(
    arguments: list[str], said: str, here: Path, base: Path
) -> None:
    path = corrections(here, base)
    (error,) = assert_refused(here, "corrections", *(argument.format(config=path) for argument in arguments))
    assert said in error


# bad input to `train`


def no_rewinding(folder: Path) -> dict[str, Any]:
    config = transformers.MambaConfig(
        vocab_size=CHARACTERS + 2, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=1, pad_token_id=0
    )
    transformers.MambaForCausalLM(config).save_pretrained(folder / "mamba")
    character_tokenizer().save_pretrained(folder / "mamba")
    return {"model": str(folder / "mamba")}


def short_context(folder: Path) -> dict[str, Any]:
    return {"model": str(checkpoint(folder / "short", max_position_embeddings=12))}


def own_data(text: str, **columns: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "mine.jsonl").write_text(text)
        return {"task": Replace({"fn": "data", "path": "mine.jsonl", **columns})}

    return write


def own_task(alive: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "mine.py").write_text(
            "from rl_backspace.tasks import Task\n"
            "rows = [{'prompt': str(i), 'answer': '1'} for i in range(9)]\n"
            f"def make():\n    return Task(rows[1:], rows[:1], alive=lambda row, text: {alive})\n"
        )
        return {"task": Replace(fn="mine.py:make")}

    return write


def own_reward(body: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "mine.py").write_text(f"def reward(completions):\n    {body}\n")
        return {"rewards": {"mine": {"fn": "mine.py:reward"}}}

    return write


def plain(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: changes


BAD_INPUT: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "unknown key": (plain(modle="x"), ["modle: unknown key; did you mean 'model'?"]),
    "unknown trainer field": (plain(trainer={"max_step": 3}), ["trainer.max_step: .*did you mean 'max_steps'"]),
    "wrong type": (plain(seed="zero"), ["seed: expected a valid integer; got 'zero'"]),
    "several": (
        plain(modle="x", seed="zero", trainer={"learning_rate": "fast"}),
        ["seed", "modle", "trainer.learning_rate"],
    ),
    "several, seen later": (
        plain(
            model="./nowhere", task={"cout": 3}, rewards={"a": {"fn": "nowhere.py:f"}}, trainer={"num_generations": 3}
        ),
        ["trainer: .*num_generations", "task.cout", "model: './nowhere' is no folder", "rewards.a.fn"],
    ),
    "no such model": (plain(model="./nowhere"), ["model: './nowhere' is no folder"]),
    "no such task": (plain(task={"fn": "sings"}), ["task.fn: .*did you mean 'signs'"]),
    "missing data": (
        lambda folder: {"task": Replace(fn="data", path="nowhere.jsonl")},
        ["nowhere.jsonl: no such file or folder"],
    ),
    "empty data": (own_data(""), ["mine.jsonl: 0 train and 0 test rows"]),
    "no such column": (own_data('{"q": "p", "answer": "a"}\n', prompt="qq"), ["row 1 of 'train' has no 'qq'"]),
    "prompt longer than the model": (short_context, ["longest prompt has .* the model's limit is 12"]),
    "answer longer than allowed": (plain(trainer={"max_completion_length": 2}), ["task: the answer .* takes 4 tokens"]),
    "no rewinding": (no_rewinding, ["MambaForCausalLM cannot rewind"]),
    "num_generations": (plain(trainer={"num_generations": 3}), ["trainer: .*num_generations"]),
    "one generation": (plain(trainer={"num_generations": 1}), ["trainer: .*"]),
    "optimizer that is not installed": (plain(trainer={"optim": "lomo"}), ["trainer: ImportError: .*lomo"]),
    "optimizer with a wrong setting": (
        plain(trainer={"learning_rate": -1.0}),
        ["trainer: ValueError: .*learning rate"],
    ),
    "schedules that lack a setting": (
        plain(
            trainer={"lr_scheduler_type": "warmup_stable_decay"},
            warmup={"trainer": {"lr_scheduler_type": "cosine_with_min_lr"}},
        ),
        ["trainer: TypeError: .*num_decay_steps", "warmup.trainer: ValueError: .*min_lr"],
    ),
    "task whose function breaks": (own_task("row['nothing']"), ["task: 'alive' of mine.py:make raised KeyError"]),
    "column that hides another": (
        own_data('{"prompt": "1", "answer": "1", "deletes": 3}\n{"prompt": "2", "answer": "2"}\n'),
        ["task: a column is called 'deletes'"],
    ),
    "no such reward": (plain(rewards={"a": {"fn": "correctness:exat"}}), ["rewards.a.fn: .*did you mean 'exact'"]),
    "reward with a wrong argument": (
        plain(rewards={"a": {"fn": "delete_cost:flat", "kwargs": {"cots": 1}}}),
        ["rewards.a.kwargs.cots: .*did you mean 'cost'"],
    ),
    "reward that raises": (own_reward("raise RuntimeError('no\\nluck')"), ["rewards.mine: .*RuntimeError: no luck"]),
    "reward of the wrong length": (own_reward("return [1.0]"), ["rewards.mine: .*returned 1 rewards for"]),
    "reward that is nan": (own_reward("return [float('nan')] * len(completions)"), ["rewards.mine: .*nan for row 0"]),
    "reward that is text": (own_reward("return list(completions)"), ["rewards.mine: .*for row 0"]),
    "lora where it cannot be": (plain(lora={"target_modules": ["nothing"]}), ["lora.target_modules: "]),
    "reference of a whole model": (
        plain(lora=None, trainer={"beta": 0.1}),
        ["trainer.beta: got 0.1 with lora: null, .*set it to 0, or give a lora block"],
    ),
    "nothing to train": (plain(trainer={"max_steps": 0}), ["trainer.max_steps: 0, and warmup.steps is 0 too"]),
    "end as delete": (plain(delete={"tokens": Replace({"<eos>": "token"})}), ["delete.tokens: '<eos>'"]),
}


@pytest.mark.parametrize(("make", "patterns"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    make: Callable[[Path], dict[str, Any]], patterns: list[str], here: Path, base: Path
) -> None:
    errors = assert_refused(here, "train", experiment(here, base, **make(here)))
    assert len(errors) == len(patterns), errors
    for error, pattern in zip(errors, patterns, strict=True):
        assert re.search(pattern, error), error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed"], "override 'seed': expected key=value"),
        (["--trainer.learning_rate", "3"], "override '--trainer.learning_rate': expected key=value"),
        (["--sed=3"], "sed: unknown key; did you mean 'seed'?"),
        (["reward.corect.weight=2"], "did you mean 'correct'"),
        (["trainer.max_steps=many"], "trainer.max_steps: expected a valid integer"),
        (["name.x=1"], "name is 'tiny', which has no keys"),
    ],
)
def test_malformed_overrides(arguments: list[str], said: str, here: Path, base: Path) -> None:
    errors = assert_refused(here, "train", experiment(here, base), *arguments)
    assert said in errors[0]


@pytest.mark.parametrize("arguments", [[], ["nowhere.yaml"], ["."]])
def test_there_is_no_experiment(arguments: list[str], here: Path) -> None:
    (error,) = assert_refused(here, "train", *arguments)
    assert (arguments or ["CONFIG"])[0] in error


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("out", [None, "elsewhere", "file"])
def test_what_is_there_is_never_overwritten(out: str | None, dry: list[str], here: Path, base: Path) -> None:
    if out == "file":
        (here / out).write_text("mine")
    else:
        folder = here / (out or "runs/tiny")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("mine")
    arguments = ["--out", out] if out else []
    (error,) = assert_refused(here, "train", experiment(here, base), *arguments, *dry)
    assert f"{out or 'runs/tiny'}: already there" in error and "--out" in error


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("out", ["x" * 300, f"new/{'x' * 300}", "/".join(["x" * 200] * 30), "experiment.yaml/run/a"])
def test_a_folder_that_cannot_be_made_is_refused_first(out: str, dry: list[str], here: Path, base: Path) -> None:
    (error,) = assert_refused(here, "train", experiment(here, base), "--out", out, *dry)
    assert error.startswith(f"{out}: cannot be a folder: ") and "--out" in error


def test_a_run_that_did_not_finish_is_called_so(here: Path, base: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text("mine")
    (error,) = assert_refused(here, "train", experiment(here, base), "--out", "run", "--dry-run")
    assert "did not finish; its adapter, if any, is in run/adapter" in error
    (here / "run" / "model").mkdir()
    (error,) = assert_refused(here, "train", experiment(here, base), "--out", "run", "--dry-run")
    assert "did not finish; its model, if any, is in run/model" in error
    (here / "run" / "summary.json").write_text("{}")
    (error,) = assert_refused(here, "train", experiment(here, base), "--out", "run", "--dry-run")
    assert "already there and not empty" in error


def test_a_dry_run_checks_prints_and_writes_nothing(here: Path, base: Path) -> None:
    path = experiment(here, base)
    before = tree(here)
    result = call("train", path, "--dry-run", "--reward.correct.weight=0.5", "trainer.learning_rate=3e-4")
    assert result.code == 0
    assert tree(here) == before
    assert "runs/tiny" in result.err
    (here / "resolved.yaml").write_text(result.out)
    config = parse(read_yaml(here / "resolved.yaml"))
    assert config.rewards["correct"].weight == 0.5
    assert config.trainer["learning_rate"] == 3e-4
    assert config.model == str(base)


def test_the_console_script_speaks_in_lines_too(here: Path) -> None:
    """In a process of its own, nothing but the line is on stderr."""
    arguments = [sys.executable, "-m", "rl_backspace", "train", "nowhere.yaml"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: nowhere.yaml: No such file or directory; give the path of an experiment file\n"


# what goes wrong later


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ConnectionError('judge is away')", "raised ConnectionError: judge is away"),
        ("return [1.0]", "returned 1 rewards for 8"),
        ("return ['good'] * len(completions)", "returned 'good' for row 0"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_reward_that_breaks_in_training_is_named_and_the_adapter_kept(
    body: str, said: str, kind: str, here: Path, base: Path
) -> None:
    (here / "mine.py").write_text(
        f"calls = []\n{kind} reward(completions):\n    calls.append(1)\n    if len(calls) > 2:\n        {body}\n"
        "    return [0.0] * len(completions)\n"
    )
    path = experiment(here, base, rewards={"mine": {"fn": "mine.py:reward"}}, evaluation={"rows": 1}, audit="skip")
    result = call("train", path, "--out", "run")
    assert result.code == 2
    assert "Traceback" not in result.err
    assert len(result.errors) == 1 and said in result.errors[0] and "mine.py:reward" in result.errors[0]
    assert load(here / "run" / "adapter").rules.deletes


def test_a_disk_that_is_full_when_the_adapter_is_saved_is_one_line(here: Path, base: Path) -> None:
    path = experiment(here, base, evaluation={"rows": 1})
    with full_disk(8000):  # room for everything else
        result = call("train", path, "--out", "run")
    assert result.code == 2 and len(result.errors) == 1 and "Traceback" not in result.err
    assert result.errors[0].startswith("the adapter could not be saved to run/adapter (")  # and that once
    assert result.errors[0].endswith("mend that, or give --out another folder")
    assert all(lines(here / "run" / "metrics.jsonl")) and not (here / "run" / "adapter").exists()


def test_an_interrupt_does_not_say_that_what_could_not_be_saved_is_there(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rl_backspace.run.evaluate", stopped)
    monkeypatch.setattr("rl_backspace.run.publish", full)
    result = call("train", experiment(here, base, evaluation={"rows": 1}), "--out", "run")
    assert result.code == 130 and "interrupted: the adapter could not be saved to run/adapter (" in result.err
    assert "No space left" in result.err and "as it was" not in result.err


def wandb_records(run: Path) -> list[Any]:
    """What a run's .wandb file holds, once all of it is there: wandb's own process writes on after the run's end."""
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.time() + 60
    while not any(record.HasField("exit") for record in read_wandb(path.read_bytes())):
        assert time.time() < deadline
        time.sleep(0.05)
    return list(read_wandb(path.read_bytes()))


def read_wandb(log: bytes) -> Iterator[Any]:
    """wandb's messages in LevelDB's log format: parts of messages in blocks of 32 KiB."""
    offset, message = 7, b""
    while offset + 7 <= len(log):
        left = 2**15 - offset % 2**15
        if left < 7:
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", log, offset + 4)
        if offset + 7 + length > len(log):
            return
        message += log[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def wandb_history(run: Path) -> list[dict[str, Any]]:
    """The logged lines, nested keys joined by dots."""
    lines = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(run)
        if record.HasField("history")
    ]
    return [{key: value for key, value in line.items() if key[0] != "_"} for line in lines]


def wandb_table(run: Path) -> list[dict[str, Any]]:
    """The table of traces, which is logged last, by its columns."""
    *_, last = wandb_history(run)
    (path,) = (run / "wandb").glob(f"offline-run-*/files/{last['traces.path']}")
    table = json.loads(path.read_text())
    assert last["traces._type"] == "table-file" and last["traces.nrows"] == len(table["data"])
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return out


def test_wandb_gets_the_same_offline(here: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = experiment(
        here,
        base,
        wandb={"mode": "offline", "project": "p"},
        warmup={"steps": 2, "trainer": {"per_device_train_batch_size": 4, "logging_steps": 1}},
        rewards={"none": {"fn": "mine.py:none"}},
    )
    (here / "mine.py").write_text(
        "def none(completions, trainer_state):\n"
        "    return [1.5 if trainer_state.global_step else None for _ in completions]\n"
    )
    assert call("train", path, "--out", "run").code == 0
    *logged, _ = wandb_history(here / "run")
    metrics = lines(here / "run" / "metrics.jsonl")
    for line, record in zip(logged, metrics, strict=True):
        assert line == flat(record, f"{record.pop('phase')}/")
    assert {"rl/reward", "rl/rewards/correct/mean", "rl/deletes_per_answer", "rl/logp_gap_max"} <= set(logged[-3])
    rows, traces = wandb_table(here / "run"), lines(here / "run" / "traces.jsonl")
    assert len(rows) == len(traces) == 16
    for row, trace in zip(rows, traces, strict=True):
        columns = {key: trace[key] for key in ("step", "prompt", "typed", "visible", "end", "deletes")}
        assert row == {**columns, **{f"rewards/{name}": value for name, value in trace["rewards"].items()}}
        assert row["typed"].count("⌫") == row["deletes"] and (row["typed"][-1] == "⏎") == (row["end"] == "eos")
    assert {row["rewards/none"] for row in rows} == {None, 1.5}
    summaries = [record.summary for record in wandb_records(here / "run") if record.HasField("summary")]
    assert any(update.key == "logp_gap_max" for summary in summaries for update in summary.update)
    assert not (here / "wandb").exists()


@pytest.mark.parametrize(("error", "code"), [(None, 0), (KeyboardInterrupt, 1), (UserError, 1)])
def test_wandb_gets_the_traces_whatever_ends_the_run(
    error: type[BaseException] | None, code: int, here: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = parse(read_yaml(experiment(here, base, wandb={"mode": "offline"})))
    folder = RunFolder.create(here / "run", config)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say 3"}]
    trace = {"step": 0, "prompt": chat, "typed": "4⌫3⏎", "visible": "3", "end": "eos", "deletes": 1, "actions": [1]}
    with pytest.raises(error) if error else contextlib.nullcontext(), folder.mirrored(config):
        folder.trace({**trace, "rewards": {"correct": 1.0}})
        if error:
            raise error
    (row,) = wandb_table(here / "run")
    del trace["actions"]
    assert row == {**trace, "prompt": "say 3", "rewards/correct": 1.0}
    (ended,) = [record.exit for record in wandb_records(here / "run") if record.HasField("exit")]
    assert ended.exit_code == code
    folder.trace({**trace, "rewards": {}})  # afterwards too


@given(steps=st.integers(1, 700), each=st.integers(1, 9), missing=st.integers(1, 3))
def test_wandbs_table_spans_the_run_and_is_bounded(steps: int, each: int, missing: int) -> None:
    table = TraceTable()
    given_steps = [step for step in range(0, steps * missing, missing) for _ in range(each)]
    for step in given_steps:
        table.add({"step": step, "prompt": "p", "rewards": {}})
    kept = [record["step"] for record in table.records]
    assert 0 < len(kept) <= TraceTable.MOST_ROWS
    if len(given_steps) <= TraceTable.MOST_ROWS:
        assert kept == given_steps
    else:
        assert len(kept) > TraceTable.MOST_ROWS // 5
        gaps = [after - before for before, after in itertools.pairwise(sorted(set(kept)))]
        assert kept[0] == 0 and max(gaps) == min(gaps)
        assert given_steps[-1] - kept[-1] < gaps[0]  # up to the end
        assert all(kept.count(step) == each for step in set(kept[: -each + 1 or None]))


def test_wandbs_table_of_one_step_is_bounded() -> None:
    table = TraceTable()
    for index in range(1500):
        table.add({"step": 0, "prompt": str(index), "rewards": {}})
    assert [record["prompt"] for record in table.records] == [str(index) for index in range(1000)]


@pytest.fixture
def training(here: Path, base: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a training that would take hours."""
    path = experiment(here, base, trainer={"max_steps": 100_000}, evaluation={"rows": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "rl_backspace", "train", str(path), "--out", "run"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = here / "run" / "metrics.jsonl"
    deadline = time.time() + 300
    try:
        while not (metrics.exists() and '"rl"' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[1]
            assert time.time() < deadline, "no step of RL within five minutes"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_adapter_and_says_where(
    number: signal.Signals, training: subprocess.Popen[str], here: Path
) -> None:
    training.send_signal(number)
    _, err = training.communicate(timeout=60)
    assert training.returncode == 130
    assert "Traceback" not in err
    assert re.search(r"interrupted: .*run/adapter", err)
    assert load(here / "run" / "adapter").rules.deletes
    assert json.loads((here / "run" / "versions.json").read_text())  # every file is whole
    assert all("phase" in record for record in lines(here / "run" / "metrics.jsonl"))
    assert not (here / "run" / "summary.json").exists()
    result = call("eval", "run", "--json")  # what is kept is a run
    assert result.code == 0 and json.loads(result.out)["greedy"]["arms"]


def test_the_first_interrupt_waits_for_the_step_and_the_second_does_not() -> None:
    control = TrainerControl()
    outer = signal.getsignal(signal.SIGINT)
    with StopOnInterrupt() as stop:
        with pytest.raises(KeyboardInterrupt):  # no step to wait for
            signal.raise_signal(signal.SIGINT)
        stop.on_train_begin(None, None, control)  # type: ignore[arg-type]
        stop.on_step_end(None, None, control)  # type: ignore[arg-type]
        assert not control.should_training_stop and not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        stop.on_step_end(None, None, control)  # type: ignore[arg-type]
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is outer


def test_dropout_of_the_base_is_off_in_rl(here: Path) -> None:
    """Rollouts have none; log-probs recomputed with it would be another policy's."""
    base = checkpoint(here / "gpt2", "GPT2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    path = experiment(here, base, lora=None, evaluation={"rows": 1})
    assert call("train", path, "--out", "run").code == 0
    assert json.loads((here / "run" / "summary.json").read_text())["logp_gap_max"] < 1e-4


@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None])
def test_a_run_goes_on_where_another_ended(lora: Any, here: Path, base: Path) -> None:
    """With its weights and its critic, which is saved beside them and is no part of the model."""
    rewards = {"correct": {"fn": "correctness:checked"}, "compute": {"fn": "length:actions", "kwargs": {"cost": 0.1}}}
    path = experiment(here, base, lora=lora, algorithm="ppo", seed=3, rewards=rewards)
    assert call("train", path, "--out", "first-3").code == 0
    first = load(policy_of(here / "first-3"))
    assert first.critic is not None and first.critic.weight.any()
    result = call("train", path, "--out", "second", "model=first-{seed}", "trainer.learning_rate=0.0")
    assert result.code == 0, result.err
    second = load(policy_of(here / "second"))
    assert second.critic is not None and torch.equal(second.critic.weight, first.critic.weight)
    weights = dict(second.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in first.model.named_parameters())
    assert not any("critic" in name for name in weights)
    accuracy = [json.loads((here / name / "summary.json").read_text())["accuracy"] for name in ("first-3", "second")]
    assert accuracy[1]["before"] == accuracy[0]["after"]
    assert call("train", path, "--out", "third", "model=first-{seed}", "algorithm=grpo").code == 0  # no critic needed


def policy_of(run: Path) -> Path:
    return run / ("adapter" if (run / "adapter").exists() else "model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("delete.retry=free", r"model: the run first was trained with delete .*'retry': 'ban'.*'retry': 'free'"),
        ("lora.r=8", r"model: the run first was trained with lora .*'r': 4.*'r': 8"),
        ("lora=null", r"model: the run first was trained with lora .*here it is None"),
        ("model=nowhere-{seed}", r"model: there is no run nowhere-0 to go on from"),
    ],
)
def test_a_run_that_this_is_no_continuation_of_is_refused(change: str, said: str, here: Path, base: Path) -> None:
    path = experiment(here, base, evaluation={"rows": 1})
    assert call("train", path, "--out", "first").code == 0
    (line,) = assert_refused(here, "train", path, "--out", "second", "model=first", change)
    assert re.search(said, line)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trainer.scale_rewards=batch", "trainer.scale_rewards: got 'batch', not with ppo"),
        ("trainer.off_policy_mask_threshold=0.0", "trainer.off_policy_mask_threshold: got 0.0, not with ppo"),
        ("trainer.resume_from_checkpoint=x", "trainer.resume_from_checkpoint: not supported"),
        ("ppo.lam=1.5", "ppo.lam: expected a number less than or equal to 1"),
        ("ppo.lambda=1", "ppo.lambda: unknown key"),
        ("algorithm=a2c", "algorithm: expected 'grpo' or 'ppo'"),
    ],
)
def test_bad_settings_of_ppo_are_refused(change: str, said: str, here: Path, base: Path) -> None:
    path = experiment(here, base, algorithm="ppo")
    (line,) = assert_refused(here, "train", path, change)
    assert line.startswith(said)
