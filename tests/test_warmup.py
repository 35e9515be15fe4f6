from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import naive
import numpy
import pytest
import torch
from checkpoints import checkpoint
from teachers import bigrams, tiny_policy
from transformers import TrainingArguments

from rl_backspace import warmup
from rl_backspace.config import Delete, Lora, Warmup
from rl_backspace.corrections import FROM_MODEL, SOURCES, Source
from rl_backspace.engine import Rollout
from rl_backspace.evaluate import is_right
from rl_backspace.policy import Policy, create
from rl_backspace.pool import Asker, Entry
from rl_backspace.scoring import pack, packed_logits, typing_divergence
from rl_backspace.semantics import Budget, Memory, replay
from rl_backspace.tasks import Row, Task, signs
from rl_backspace.warmup import Corrections, WarmupTrainer, first_corrections, make_corrections, warm_up

BUDGET = Budget(answer=6, actions=24)
TASK = signs(3, train=40, test=4)
EVERY: dict[Source, float] = dict.fromkeys(SOURCES, 1.0)


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


def config(**fields: Any) -> Warmup:
    """One in which a random model is uncertain somewhere."""
    return Warmup(**{"clean": 0.2, "errors": 2, "late": 3, "group": 3, "entropy": 3.0, **fields})


def refreshed(policy: Policy, size: int = 12, seed: int = 0, **fields: Any) -> tuple[Corrections, Asker]:
    dataset, asker = make_corrections(policy, TASK, BUDGET, config(**fields), size, seed)
    dataset.refresh(asker, 0)
    return dataset, asker


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    plain = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **{**plain, **fields})


def made(dataset: Corrections, indices: Sequence[int]) -> list[Any]:
    return [[(entry.prompt, entry.expert.row, correction) for entry, correction in dataset[i]] for i in indices]


@pytest.mark.parametrize("units", [("token",), ("answer", 2)])
@pytest.mark.parametrize("memory", get_args(Memory))
def test_the_loss_is_the_mean_over_examples_of_what_is_to_be_learned(
    memory: Memory, units: Any, tmp_path: Path
) -> None:
    """Each in its own context, computed one by one, the expert's choice where it is not the policy's own; nothing of
    the wrong tokens."""
    policy = tiny_policy(memory, units=units)
    dataset, _ = refreshed(policy, size=20, sources=EVERY, clean=0.1)
    trainer = WarmupTrainer(policy, BUDGET, arguments(tmp_path), dataset, [])
    examples = [dataset[i] for i in range(20)]
    assert {correction.source for group in examples for _, correction in group} == {None, *SOURCES}
    loss = trainer.compute_loss(policy.model, trainer.collate(examples)).item()
    means, masked, instead = [], 0, 0
    for entry, correction in (example for group in examples for example in group):
        slow, losses = naive.Naive(policy.rules, BUDGET), []
        for action, target, learn in zip(correction.actions, correction.targets, correction.learn, strict=True):
            if learn:
                logprobs = naive.logprobs(policy.model, [*entry.prompt, *slow.context()], slow.forbidden())
                losses.append(-logprobs[target].item())
            masked += not learn
            instead += target != action
            slow.press(action)
        means.append(sum(losses) / len(losses))
    assert masked > 5 and instead > 5
    assert loss == pytest.approx(sum(means) / len(means), abs=1e-4)


def test_the_same_index_and_pool_give_the_same_corrections(policy: Policy) -> None:
    dataset, _ = refreshed(policy, sources=EVERY)
    again, _ = make_corrections(policy, TASK, BUDGET, config(sources=EVERY), 12, 0)
    again.pool = dataset.pool
    random.seed(torch.initial_seed() % 1000)  # whatever the global state is
    assert made(dataset, range(12)) == made(again, range(11, -1, -1))[::-1] == made(dataset, range(12))
    assert made(dataset, [4]) != made(dataset, [5])
    assert made(refreshed(policy, sources=EVERY)[0], range(12)) == made(dataset, range(12))
    assert made(refreshed(policy, seed=1, sources=EVERY)[0], range(12)) != made(dataset, range(12))


@pytest.mark.parametrize("source", FROM_MODEL)
def test_a_group_is_made_of_one_entry_of_the_pool(source: Source, policy: Policy) -> None:
    dataset, _ = refreshed(policy, sources={source: 1.0}, clean=0.0)
    pool = dataset.pool[source]
    used = []
    for group in (dataset[i] for i in range(12)):
        (entry,) = {id(entry): entry for entry, _ in group}.values()
        assert any(entry is other for other in pool)
        used.append(id(entry))
        for _, correction in group:
            assert correction.source == source
            if source == "rollouts":
                assert correction.actions in entry.attempts
            answer = replay(correction.actions, policy.rules, BUDGET).visible
            for mistake in correction.mistakes:
                wrong = [*answer[: mistake.depth], *mistake.tokens]
                assert any(attempt[: len(wrong)] == wrong for attempt in entry.attempts)
    assert len(set(used)) > 3


def test_sources_are_drawn_by_their_weights(policy: Policy) -> None:
    """With a weight of 0 it is as if it were not there."""
    weights: dict[Source, float] = {"random": 3.0, "rollouts": 1.0, "early": 0.0, "samples": 0.0}
    dataset, _ = refreshed(policy, size=400, sources=weights, clean=0.0, group=1)
    assert set(dataset.pool) == {"rollouts"}
    sources = [correction.source for i in range(400) for _, correction in dataset[i]]
    assert set(sources) == {"random", "rollouts"}
    assert sources.count("random") / 400 == pytest.approx(0.75, abs=0.08)


def test_a_refresh_asks_about_other_prompts_and_moves_no_other_dice(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "POOL", 30)
    dataset, asker = refreshed(policy, sources=EVERY)
    assert {source: len(pool) for source, pool in dataset.pool.items()} == dict.fromkeys(FROM_MODEL, 10)
    before, first = dict(dataset.pool), made(dataset, range(12))
    policy.model.train()
    dice = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    dataset.refresh(asker, 100)
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == (dice[0], dice[2])
    assert torch.equal(torch.get_rng_state(), dice[1])
    assert policy.model.training and all(module.training for module in policy.model.modules())
    for source in FROM_MODEL:
        old, new = ([entry.expert.row["prompt"] for entry in pool[source]] for pool in (before, dataset.pool))
        assert set(old) != set(new)
        assert len(set(new)) == len(new)  # each prompt once
    again = made(dataset, range(12))
    planted = [all(c.source in (None, "random", "early") for _, _, c in group) for group in first]
    assert [old == new for old, new in zip(first, again, strict=True)] == planted


@pytest.mark.parametrize(
    "fields", [{"clean": 1.0, "sources": EVERY}, {"sources": {"random": 1.0, "early": 1.0, "rollouts": 0.0}}]
)
def test_the_model_is_not_asked_in_vain(fields: dict[str, Any], policy: Policy) -> None:
    """All examples clean, or no source that needs it."""
    dataset, asker = make_corrections(policy, TASK, BUDGET, config(**fields), 20, 0)

    def refuse(*_: Any) -> list[Entry]:
        raise AssertionError("the model was asked")

    object.__setattr__(asker, "ask", refuse)
    dataset.refresh(asker, 0)
    assert not dataset.pool
    for entry, correction in (example for i in range(20) for example in dataset[i]):
        if fields.get("clean"):
            assert (correction.actions, correction.source) == (entry.expert.gold, None)


def test_a_policy_that_makes_no_errors_gives_clean_examples() -> None:
    """Nothing to sample, nothing to doubt: the rows themselves, all of them."""
    rows = [{"prompt": f"{i}?", "answer": "a"} for i in range(5)]
    dataset, asker = make_corrections(
        bigrams({"?": {"a": 1.0}, "a": {"$": 1.0}}),
        Task(rows, rows[:1]),
        BUDGET,
        config(clean=0.0, sources={"samples": 1.0, "uncertain": 1.0}),
        60,
        0,
    )
    dataset.refresh(asker, 0)
    assert dataset.pool == {"samples": [], "uncertain": []}
    examples = [example for i in range(60) for example in dataset[i]]
    assert all(c.source is None and c.actions == entry.expert.gold for entry, c in examples)
    assert {entry.expert.row["prompt"] for entry, _ in examples} == {row["prompt"] for row in rows}


@pytest.mark.parametrize("labels", ["prefixes", "answers"])
def test_where_answers_alone_are_labels_the_tasks_check_is_not_asked(labels: str, policy: Policy) -> None:
    """Each deletes what cannot come right: by the check a sign that no answer has there, else any but the reference."""
    fields = {"sources": {"random": 1.0}, "clean": 0.0, "errors": 1, "late": 0, "labels": labels}
    dataset, _ = make_corrections(policy, TASK, BUDGET, config(**fields), size=60, seed=0)
    planted = [
        (entry.expert.row, mistake.depth, c.actions[mistake.depth])
        for i in range(60)
        for entry, c in dataset[i]
        for mistake in c.mistakes[:1]
    ]
    alive = [
        TASK.alive(row, row["answer"][:depth] + policy.text([token]))
        for row, depth, token in planted
        if policy.text([token]) in ("+", "-")
    ]
    assert len(alive) > 20 and any(alive) == (labels == "answers")


def test_the_actions_that_were_trained_on_are_counted(policy: Policy, tmp_path: Path) -> None:
    fields = {"sources": {"random": 1.0}, "group": 2, "refresh": 50}
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=2)
    _, actions = warm_up(copy.deepcopy(policy), TASK, BUDGET, config(**fields), args, [])
    dataset, _ = make_corrections(policy, TASK, BUDGET, config(**fields), size=6, seed=args.seed)
    lengths = [len(correction.actions) for i in range(6) for _, correction in dataset[i]]
    assert actions == sum(lengths)


def test_a_source_that_finds_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{i}?", "answer": "a"} for i in range(5)]
    found, _ = warm_up(
        bigrams({"?": {"a": 1.0}, "a": {"$": 1.0}}),
        Task(rows, rows[:1]),
        BUDGET,
        config(sources={"samples": 1.0, "random": 1.0}),
        arguments(tmp_path, max_steps=1),
        [],
    )
    assert found
    said = capsys.readouterr().out
    assert said.count("samples found no error to learn from") == 1 and "random" not in said


def test_the_first_corrections_are_those_that_the_warm_up_begins_with(policy: Policy) -> None:
    fields = {"sources": EVERY}
    found = first_corrections(policy, TASK, BUDGET, config(**fields), seed=7, count=5)
    dataset, _ = refreshed(policy, size=900, seed=7, **fields)
    assert found == [(row, correction) for group in made(dataset, range(5)) for _, row, correction in group]


def run(policy: Policy, folder: Path, **fields: Any) -> tuple[list[tuple[int, Any]], Any]:
    told: list[tuple[int, Any]] = []
    args = arguments(folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, seed=3)
    found, _ = warm_up(policy, TASK, BUDGET, config(**fields), args, [], lambda step, found: told.append((step, found)))
    return told, found


def test_a_warm_up_asks_again_and_measures_as_it_goes(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the beginning, every so many steps, and at the end, where nothing is asked for any more."""
    asked: list[tuple[str, int]] = []
    ask = Asker.ask

    def listening(self: Asker, source: Source, rows: Sequence[Row], prompts: Any) -> list[Entry]:
        asked.append(("train" if rows[0] in TASK.train else "test", self.group))
        return ask(self, source, rows, prompts)

    monkeypatch.setattr(Asker, "ask", listening)
    weights = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    told, found = run(policy, tmp_path, sources={"random": 1.0, "samples": 1.0}, refresh=2, group=3)
    assert [step for step, _ in told] == [0, 2, 4, 6]
    assert told[-1][1] == found and list(found) == list(SOURCES)
    assert asked == ([("train", 3)] + [("test", 2)] * 3) * 3 + [("test", 2)] * 3
    assert not all(torch.equal(weights[name], weight) for name, weight in policy.model.state_dict().items())
    assert told[0][1] != found


def test_what_is_measured_does_not_change_what_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector has dice of its own."""
    finished = []
    for held_out in (4, 1):
        monkeypatch.setattr(warmup, "HELD_OUT", held_out)
        policy = tiny_policy()
        run(policy, tmp_path, refresh=3)
        finished.append(policy.model.state_dict())
    assert all(torch.equal(weight, finished[1][name]) for name, weight in finished[0].items())


@pytest.mark.parametrize("lora", [Lora(r=4, alpha=8), None])
def test_the_base_that_typing_stays_near_does_not_move(lora: Lora | None, tmp_path: Path) -> None:
    """Its logits are those of the base as it was, while the policy moves away; the pull is towards it."""
    base = str(checkpoint(tmp_path / "base", initializer_range=0.3))
    ends = {}
    for beta in (0.0, 10.0):
        policy = create(base, Delete(), lora, seed=0)
        dataset, _ = refreshed(policy, size=60, group=4)
        args = arguments(tmp_path, max_steps=20, per_device_train_batch_size=3, learning_rate=1e-2)
        trainer = WarmupTrainer(policy, BUDGET, args, dataset, [], beta)
        batch = trainer.collate([dataset[i] for i in range(3)])
        packed = pack(batch["input_ids"], batch["attention_mask"], batch["learn"].shape[1], policy.rules, BUDGET)
        start = packed_logits(policy.model, packed).detach()
        trainer.train()
        policy.model.eval()
        end = packed_logits(policy.model, packed).detach()
        ends[beta] = typing_divergence(end, start, packed, sorted(policy.rules.deletes)).item()
        if beta:
            torch.testing.assert_close(trainer._reference(policy.model, packed)[..., :90], start[..., :90])
        assert not torch.allclose(end[..., :90], start[..., :90], atol=1e-2)
    assert ends[10.0] < ends[0.0] / 2


def test_a_warm_up_teaches_to_delete_what_is_wrong(policy: Policy, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2)
    told: list[tuple[int, Any]] = []
    warm_up(policy, TASK, BUDGET, config(refresh=100), args, [], lambda step, found: told.append((step, found)))
    (_, before), (_, after) = told
    assert after["random"]["p_delete_wrong"] > before["random"]["p_delete_wrong"] + 0.1


def test_only_finished_answers_are_right(policy: Policy) -> None:
    row = TASK.train[0]
    ids = policy.tokenizer(row["answer"]).input_ids
    eos = policy.tokenizer.eos_token_id
    assert is_right(policy, TASK, row, Rollout([], [*ids, eos], [*ids, eos], [], "eos", 0, 0))
    assert not is_right(policy, TASK, row, Rollout([], ids, ids, [], "length", 0, 0))


def test_clean_examples_are_all_that_a_policy_without_deletes_learns(policy: Policy) -> None:
    blocked = replace(policy, rules=replace(policy.rules, deletes={}))
    dataset, _ = make_corrections(blocked, TASK, BUDGET, config(clean=0.0), 10, 0)
    assert all(c.actions == entry.expert.gold for i in range(10) for entry, c in dataset[i])
