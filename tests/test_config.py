from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl import GRPOConfig

from rl_backspace.config import Config, Lora, dump, override, parse, parse_pretrain, read_yaml, trainer_problems
from rl_backspace.errors import UserError

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
MINIMAL: dict[str, Any] = {
    "name": "t",
    "model": "somewhere",
    "task": {"fn": "signs"},
    "rewards": {"correct": {"fn": "correctness:checked"}},
}


def content(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(MINIMAL), **changes}


def problems(**changes: Any) -> list[str]:
    """What `parse` finds wrong, line by line."""
    with pytest.raises(UserError) as caught:
        parse(content(**changes))
    return str(caught.value).splitlines()


def test_the_shipped_experiments_parse() -> None:
    found = sorted([*EXPERIMENTS.glob("*.yaml"), *EXPERIMENTS.glob("bases/*.yaml")])
    assert found
    for path in found:
        raw = read_yaml(path)
        parse_pretrain(raw) if "tasks" in raw else parse(raw)


def test_four_keys_are_enough() -> None:
    assert parse(content()).rewards["correct"].weight == 1
    for key in MINIMAL:
        lacking = content()
        del lacking[key]
        with pytest.raises(UserError, match=f"^{key}: missing"):
            parse(lacking)


@pytest.mark.parametrize(
    ("changes", "key", "meant"),
    [
        ({"modle": "x"}, "modle", "model"),
        ({"delete": {"memry": "erase"}}, "delete.memry", "memory"),
        ({"lora": {"rank": 3, "alhpa": 2}}, "lora.alhpa", "alpha"),
        ({"warmup": {"stpes": 3}}, "warmup.stpes", "steps"),
        ({"rewards": {"correct": {"fn": "a:b", "wieght": 1}}}, "rewards.correct.wieght", "weight"),
        ({"rewards": {"rewards": {"fn": "a:b", "kwarg": {}}}}, "rewards.rewards.kwarg", "kwargs"),
        ({"wandb": {"projct": "x"}}, "wandb.projct", "project"),
        ({"evaluation": {"row": 3}}, "evaluation.row", "rows"),
        ({"trainer": {"learning_rat": 1e-3}}, "trainer.learning_rat", "learning_rate"),
        ({"trainer": {"num_generation": 4}}, "trainer.num_generation", "num_generations"),
        ({"warmup": {"trainer": {"weight_deca": 0.1}}}, "warmup.trainer.weight_deca", "weight_decay"),
    ],
)
def test_an_unknown_key_at_any_level_gets_the_nearest_right_name(changes: dict[str, Any], key: str, meant: str) -> None:
    line = next(line for line in problems(**changes) if line.startswith(f"{key}: "))
    assert f"did you mean {meant!r}?" in line


@settings(deadline=None)
@given(st.sampled_from(sorted(set(Config.model_fields) - {"name"})), st.data())
def test_a_letter_too_few_is_recognised(key: str, data: st.DataObject) -> None:
    dropped = data.draw(st.integers(0, len(key) - 1))
    typo = key[:dropped] + key[dropped + 1 :]
    assume(typo not in Config.model_fields)
    assert any(line.startswith(f"{typo}: ") and repr(key) in line for line in problems(**{typo: 1}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": "zero"}, "seed: expected a valid integer; got 'zero' (str)"),
        ({"seed": True}, "seed: expected a valid integer; got True (bool)"),
        ({"seed": -1}, "seed: expected a number greater than or equal to 0; got -1 (int)"),
        ({"seed": 2**32}, "seed: expected a number less than 4294967296; got 4294967296 (int)"),
        ({"task": "signs"}, "task: expected a block of keys; got 'signs' (str)"),
        ({"trainer": None}, "trainer: expected a block of keys; got None (NoneType)"),
        ({"lora": False}, "lora: expected a block of keys; got False (bool)"),
        ({"wandb": True}, "wandb: expected a block of keys; got True (bool)"),
        ({"rewards": {}}, "rewards: expected at least one entry; got {} (dict)"),
        ({"warmup": {"clean": 1.5}}, "warmup.clean: expected a number less than or equal to 1; got 1.5 (float)"),
        (
            {"warmup": {"sources": {"samples": -1}}},
            "warmup.sources.samples: expected a number greater than or equal to 0; got -1 (int)",
        ),
        (
            {"warmup": {"sources": {"randm": 1}}},
            "warmup.sources.randm: expected 'random', 'early', 'samples', 'uncertain' or 'rollouts'; got 'randm' (str)",
        ),
        (
            {"warmup": {"sources": {"random": 0, "early": 0}}},
            "warmup.sources: the weights {'random': 0.0, 'early': 0.0} sum to nothing; give one of random, early, "
            "samples, uncertain, rollouts a weight above 0",
        ),
        (
            {"warmup": {"temperature": 0}},
            "warmup.temperature: expected a number greater than or equal to 0.01; got 0 (int)",
        ),
        ({"delete": {"memory": "forget"}}, "delete.memory: expected 'erase', 'keep' or 'hint'; got 'forget' (str)"),
        ({"lora": {"target_modules": ["q", 3]}}, "lora.target_modules.1: expected a valid string; got 3 (int)"),
        ({"trainer": {"learning_rate": "fast"}}, "trainer.learning_rate: expected a valid number; got 'fast' (str)"),
        ({"trainer": {"max_steps": 1.5}}, "trainer.max_steps: expected a valid integer; got 1.5 (float)"),
        (
            {"trainer": {"max_steps": -2}},
            "trainer.max_steps: expected a number of steps, 0 to stop after the warm-up, or -1 to train for "
            "trainer.num_train_epochs; got -2 (int)",
        ),
        (
            {"trainer": {"num_train_epochs": 0}},
            "trainer.num_train_epochs: expected a number greater than 0; got 0 (int)",
        ),
        ({"trainer": {"temperature": 0}}, "trainer.temperature: expected a number greater than 0; got 0 (int)"),
        (
            {"trainer": {"scale_rewards": "nope"}},
            "trainer.scale_rewards: expected a valid boolean, or 'group', 'batch' or 'none'; got 'nope' (str)",
        ),
        ({"warmup": {"trainer": {"bf16": "no"}}}, "warmup.trainer.bf16: expected a valid boolean; got 'no' (str)"),
    ],
)
def test_a_wrong_type_says_what_came_and_what_was_expected(changes: dict[str, Any], line: str) -> None:
    assert problems(**changes) == [line]


@pytest.mark.parametrize("unit", ["word", 0, -1, 1.5, True, None, [1]])
def test_one_line_for_a_value_that_fits_no_member_of_a_union(unit: Any) -> None:
    (line,) = problems(delete={"tokens": {"<x.y>": unit}})
    assert line.startswith("delete.tokens.<x.y>: expected 'token', 'line' or 'answer', or ")


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_is_finite(weight: float) -> None:
    assert "finite" in problems(rewards={"a": {"fn": "a:b", "weight": weight}})[0]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../x", "-x", "a b"])
def test_a_name_stays_inside_the_runs_folder(name: str) -> None:
    assert problems(name=name)[0].startswith("name: ")


def test_every_mistake_is_reported_at_once() -> None:
    lines = problems(
        modle=1,
        seed="x",
        delete={"memory": "x", "budget": 2},
        rewards={"a": {"fn": "a:b", "weight": 0}, "b": {"weight": 0, "fn": "a:b"}},
        trainer={"learning_rat": 1, "max_steps": "many", "max_completion_length": 8},
        warmup={"trainer": {"adam_beta1": "x"}},
    )
    keys = [line.split(": ")[0] for line in lines]
    assert sorted(keys) == [
        *("delete.memory", "modle", "rewards", "seed"),
        *("trainer.learning_rat", "trainer.max_steps", "warmup.trainer.adam_beta1"),
    ]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"delete": {"budget": 7}, "trainer": {"max_completion_length": 8}}, "delete.budget"),
        ({"delete": {"tokens": {"x": "line"}, "boundary": ""}}, "delete.boundary"),
        ({"rewards": {"a": {"fn": "a:b", "weight": 0}}}, "rewards"),
        ({"warmup": {"steps": 0}, "trainer": {"max_steps": 0}}, "trainer.max_steps"),
    ],
)
def test_settings_that_cannot_work_together(changes: dict[str, Any], key: str) -> None:
    (line,) = problems(**changes, evaluation={"rows": 3})
    assert line.startswith(f"{key}: ")
    # and it is found beside an unrelated mistake, which hides nothing
    assert line in problems(**changes, evaluation={"row": 3})


def test_a_missing_fn_points_at_the_slip() -> None:
    assert problems(task={"fun": "signs"}) == ["task.fn: missing; add it; did you mean 'fun'?"]
    typo = {**MINIMAL["rewards"], "corect": {"weight": 2.0}}
    assert problems(rewards=typo) == ["rewards.corect.fn: missing; add it; did you mean 'correct'?"]


@pytest.mark.parametrize(("cls", "kind"), [(GRPOConfig, "GRPOConfig"), (TrainingArguments, "TrainingArguments")])
def test_the_trainers_own_defaults_pass(cls: Any, kind: Any) -> None:
    """A field's default is a right value, so only what this project sets elsewhere may be refused."""
    refused = {
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is not dataclasses.MISSING
        and trainer_problems({field.name: field.default}, "trainer", kind)
    }
    elsewhere = {"output_dir", "seed", "report_to"}
    more = {"reward_weights"} if kind == "GRPOConfig" else {"max_steps", "remove_unused_columns"}
    assert refused == elsewhere | more


@pytest.mark.parametrize("field", ["loss_type", "importance_sampling_level", "multi_objective_aggregation"])
def test_choices_that_trl_refuses_late_are_refused_early(field: str) -> None:
    assert problems(trainer={field: "nope"})[0].startswith(f"trainer.{field}: expected '")


@pytest.mark.parametrize(
    "fields",
    [
        *({"use_vllm": True}, {"repetition_penalty": 1.2}, {"eval_strategy": "steps"}, {"push_to_hub": True}),
        *({"chat_template_kwargs": {"a": 1}}, {"model_init_kwargs": {"a": 1}}),
        *({"eval_on_start": True}, {"sync_ref_model": True}),
    ],
)
def test_what_rollouts_with_deletes_cannot_honour_is_refused(fields: dict[str, Any]) -> None:
    (line,) = problems(trainer=fields)
    assert line.startswith(f"trainer.{next(iter(fields))}: not supported; ")


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "+3e-4", "0.0003", "3.e-4", ".3e-3", "300e-6"])
def test_a_number_is_a_number_in_files_and_in_overrides(text: str, tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(f"rate: {text}\n")
    overridden: dict[str, Any] = {}
    override(overridden, [f"rate={text}"])
    assert read_yaml(file) == overridden == {"rate": pytest.approx(3e-4)}


@pytest.mark.parametrize("text", ["e4", "1e", "3e-4x", "a1e5", "'3e-4'"])
def test_what_only_looks_like_a_number_is_text(text: str) -> None:
    overridden: dict[str, Any] = {}
    override(overridden, [f"x={text}"])
    assert overridden["x"] == text.strip("'")


def test_overrides_in_both_forms() -> None:
    outcomes = []
    for dashes in ("", "--"):
        changed = content(rewards={"delete_cost": {"fn": "delete_cost:flat", "weight": 1.0}})
        arguments = [
            "reward.delete_cost.weight=0.1",
            "rewards.delete_cost.kwargs.cost=3e-2",
            "trainer.learning_rate=1e-4",
            "delete.tokens={<|undo|>: line, <|back|>: 3}",
            "seed=7",
        ]
        override(changed, [dashes + argument for argument in arguments])
        outcomes.append(parse(changed))
    assert outcomes[0] == outcomes[1]
    config = outcomes[0]
    assert config.rewards["delete_cost"].weight == 0.1
    assert config.rewards["delete_cost"].kwargs == {"cost": 0.03}
    assert config.trainer == {"learning_rate": 1e-4}
    assert config.delete.tokens == {"<|undo|>": "line", "<|back|>": 3}
    assert config.seed == 7


def test_an_override_may_open_an_empty_block() -> None:
    changed = content(trainer=None)
    override(changed, ["trainer.max_steps=3"])
    assert parse(changed).trainer == {"max_steps": 3}


def test_malformed_overrides_are_all_reported() -> None:
    with pytest.raises(UserError) as caught:
        override(content(), ["seed", "=3", "a..b=1", "name.x=1", "trainer.x=[1", "--reward.correct.weight", "seed=1"])
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == [
        *("seed", "=3", "a..b=1", "name.x=1", "trainer.x=[1", "--reward.correct.weight"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "expected keys and values, got list"),
        ("", "expected keys and values, got NoneType"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "key 'a' is given twice"),
        ("rewards:\n  correct: {fn: x, fn: y}\n", "key 'fn' is given twice"),
        ("a: \xff\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_experiment(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    assert said in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_merges_are_no_repetition(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(file)["b"] == {"x": 3, "y": 2}


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,6}", fullmatch=True) | st.sampled_from(
    ["1e5", "12e3", "0x1f", "yes", "null", "1_000", "2024-01-01", "3.", "010", ".5e3x", "1e5.0"]
)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**40), 2**40)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | words, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    name=words.filter(lambda text: text[0] != "."),
    tokens=st.dictionaries(
        texts | words, st.sampled_from(["token", "line", "answer"]) | st.integers(1, 9), min_size=1, max_size=3
    ),
    kwargs=st.dictionaries(texts | words, values, max_size=3),
    weight=numbers.filter(bool),
    extra=st.dictionaries(st.sampled_from(["size", "path", "note"]), values),
    rate=st.floats(1e-9, 1.0),
)
def test_a_dumped_config_parses_to_itself(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    tokens: dict[str, Any],
    kwargs: dict[str, Any],
    weight: float,
    extra: dict[str, Any],
    rate: float,
) -> None:
    config = parse(
        content(
            name=name,
            task={"fn": "signs", **extra},
            delete={"tokens": tokens},
            rewards={name: {"fn": "a.py:b", "weight": weight, "kwargs": kwargs}},
            trainer={"learning_rate": rate},
            wandb={"group": name, "tags": [name]},
        )
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert parse(read_yaml(file)) == config
    assert yaml.safe_load(dump(config))["delete"]["tokens"] == tokens  # other YAML readers read it alike


def test_steps_may_be_left_to_the_epochs() -> None:
    assert parse(content(trainer={"max_steps": -1, "num_train_epochs": 2})).trainer["max_steps"] == -1


def test_no_steps_of_rl_need_no_reward_with_a_weight() -> None:
    changed = content(trainer={"max_steps": 0}, rewards={"a": {"fn": "a:b", "weight": 0}})
    assert parse(changed).trainer["max_steps"] == 0
    assert parse(content(warmup={"steps": 0}, trainer={"max_steps": -1})).warmup.steps == 0


def test_lora_can_be_turned_off_and_on() -> None:
    changed = content(lora={"r": 4})
    override(changed, ["lora=null"])
    config = parse(changed)
    assert config.lora is None and parse(yaml.safe_load(dump(config))) == config
    override(changed, ["lora.r=8"])
    assert parse(changed).lora == Lora(r=8)
    assert parse(content()).lora == Lora()


def test_pretrain_files_are_checked_alike() -> None:
    good = {"tasks": [{"fn": "signs", "count": 5}]}
    (task,) = parse_pretrain(good).tasks
    assert task.model_dump() == {"fn": "signs", "count": 5, "weight": 1.0}
    for wrong, key in (
        ({"widht": 3}, "widht"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"count": 5}]}, "tasks.0.fn"),
        ({"tasks": [{"fn": "signs", "weight": 0}]}, "tasks.0.weight"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"vocab_size": 64}, "vocab_size"),
        ({"vocab_size": 99}, "vocab_size"),
        ({"width": 30, "heads": 4}, "width"),
        ({"width": 12, "heads": 4}, "width"),  # rotary embeddings turn pairs
    ):
        with pytest.raises(UserError, match=f"^{key}: "):
            parse_pretrain({**good, **wrong})
    assert parse_pretrain({**good, "vocab_size": 100, "width": 16, "heads": 8}).width == 16
    with pytest.raises(UserError) as caught:
        parse_pretrain({**good, "vocab_size": 3, "width": 9, "layers": 0})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["layers", "vocab_size", "width"]
