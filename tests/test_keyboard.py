from __future__ import annotations

import io
import json
import math
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import naive
import pytest
import torch
import yaml
from checkpoints import checkpoint
from conftest import DELETE, EOS, VOCAB, tiny
from rich.console import Console
from trl import GRPOConfig

from rl_backspace.cli import main
from rl_backspace.display import results_table
from rl_backspace.engine import GREEDY, Engine, Rollout, Running, Sampling
from rl_backspace.errors import UserError
from rl_backspace.evaluate import evaluate, measure
from rl_backspace.keyboard import Keyboard, alphabet, keyboard_of
from rl_backspace.policy import Policy
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.scoring import pack, score
from rl_backspace.semantics import Budget, Rules
from rl_backspace.tasks import Task, typos
from rl_backspace.trainer import BackspaceGRPOTrainer

WORDS = {DELETE: "token", DELETE - 1: 3, DELETE - 2: "answer"}
FIXED = frozenset([EOS, *WORDS])
LETTERS = tuple(range(5, 15))


def typed_distribution(chosen: torch.Tensor, legal: set[int], keyboard: Keyboard) -> torch.Tensor:
    """The semantics as a person would tell them: for every intended key, what may come of it."""
    typed = torch.zeros(len(chosen), dtype=torch.double)
    for token in legal:
        probability = chosen[token].item()
        others = [key for key in keyboard.tokens if key in legal and key != token]
        if token in keyboard.fixed or not others:
            typed[token] += probability
            continue
        typed[token] += (1 - keyboard.rate) * probability
        for other in others:
            typed[other] += keyboard.rate * probability / len(others)
    return typed


def some_logprobs(legal: set[int], seed: int, spread: float = 3.0, count: int = VOCAB) -> torch.Tensor:
    """(V,) of a random policy, -inf where illegal."""
    logits = spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(~torch.isin(torch.arange(count), torch.tensor(sorted(legal))), -torch.inf).log_softmax(-1)


EVERY = set(range(VOCAB))
STATES = {
    "everything legal": EVERY,
    "deletes blocked": EVERY - set(WORDS),
    "some letters banned": EVERY - set(range(5, 12)),
    "one letter left": EVERY - set(range(6, 15)),
    "no letter left": EVERY - set(LETTERS),
    "letters only": set(LETTERS),
    "one letter only": {7},
    "end or delete": set(FIXED),
}


@pytest.mark.parametrize("legal", STATES.values(), ids=STATES)
@pytest.mark.parametrize("rate", [0.0, 0.083, 0.6, 0.99])
def test_through_is_the_distribution_of_what_is_typed(legal: set[int], rate: float) -> None:
    keyboard = Keyboard(rate, LETTERS, FIXED)
    chosen = torch.stack([some_logprobs(legal, seed, spread) for seed in range(4) for spread in (0.1, 3.0, 8.0)])
    typed = keyboard.through(chosen)
    for one, other in zip(chosen, typed, strict=True):
        torch.testing.assert_close(
            other.exp().double(), typed_distribution(one.exp(), legal, keyboard), atol=1e-6, rtol=1e-5
        )
    torch.testing.assert_close(typed.exp().sum(-1), torch.ones(len(typed)))
    assert torch.equal(typed.isfinite(), chosen.isfinite())
    untouched = sorted(FIXED & legal)
    assert torch.equal(typed[:, untouched], chosen[:, untouched])


@pytest.mark.parametrize("legal", [state for state in STATES.values() if len(state) > 1], ids=lambda state: len(state))
def test_gradients_are_those_of_the_function(legal: set[int]) -> None:
    keyboard, kept = Keyboard(0.2, LETTERS, FIXED), torch.tensor(sorted(legal))
    logits = torch.randn(3, len(legal), dtype=torch.double, generator=torch.Generator().manual_seed(0))

    def function(logits: torch.Tensor) -> torch.Tensor:
        every = logits.new_full((3, VOCAB), -torch.inf).index_copy(1, kept, logits)
        return keyboard.through(every.log_softmax(-1))[:, kept]

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize("state", ["everything legal", "some letters banned", "one letter left", "no letter left"])
@pytest.mark.parametrize("sure", [EOS, DELETE, 3, 14, 5])
def test_a_policy_that_is_sure_has_finite_logprobs_and_gradients(sure: int, state: str) -> None:
    """Where all else underflows, letters included, each legal action still has a log-probability."""
    legal = torch.isin(torch.arange(VOCAB), torch.tensor(sorted(STATES[state])))
    if not legal[sure]:
        return
    logits = torch.zeros(VOCAB)
    logits[20], logits[sure] = 300.0, 500.0
    logits = logits.masked_fill(~legal, -torch.inf)[None].requires_grad_()
    typed = Keyboard(0.083, LETTERS, FIXED).through(logits.log_softmax(-1))[0]
    assert typed[legal].isfinite().all() and typed[~legal].isneginf().all()
    typed[legal].sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    if sure in LETTERS and state == "everything legal":  # the others can only come of a slip
        assert typed[7].item() == pytest.approx(math.log(0.083 / 9), abs=1e-5)


@pytest.mark.parametrize("legal", STATES.values(), ids=STATES)
def test_swaps_are_as_frequent_as_they_should_be(legal: set[int]) -> None:
    keyboard, count = Keyboard(0.4, LETTERS, FIXED), 40_000
    logprobs = some_logprobs(legal, seed=1, spread=1.0)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.multinomial(logprobs.exp(), count, replacement=True, generator=generator)
    typed = keyboard.swap(chosen, logprobs.expand(count, -1), generator)
    seen = torch.bincount(typed, minlength=VOCAB) / count
    expected = typed_distribution(logprobs.exp(), legal, keyboard)
    assert (seen - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert seen[expected == 0].sum() == 0
    kept = torch.isin(chosen, torch.tensor(sorted(FIXED)))
    assert torch.equal(typed[kept], chosen[kept])  # deletes and the end arrive
    swapped = typed[typed != chosen]
    assert set(swapped.tolist()) <= set(LETTERS) & legal


def rules(memory: str) -> Rules:
    return Rules(WORDS, frozenset([EOS]), memory, "ban")  # type: ignore[arg-type]


def flat(rollouts: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """TRL's layout: prompts padded on the left, raw traces on the right."""
    before, steps = max(len(r.prompt) for r in rollouts), max(len(r.actions) for r in rollouts)
    ids = torch.zeros(len(rollouts), before + steps, dtype=torch.long)
    real = torch.zeros_like(ids)
    for row, r in enumerate(rollouts):
        columns = slice(before - len(r.prompt), before + len(r.actions))
        ids[row, columns], real[row, columns] = torch.tensor(r.prompt + r.actions), 1
    return ids, real, steps


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_rollouts_record_and_scoring_recomputes_what_is_typed(memory: str) -> None:
    """Both against the naive decoder with every swap enumerated; the entropies too."""
    model, played, keyboard = tiny(), rules(memory), Keyboard(0.3, LETTERS, FIXED)
    with torch.no_grad():
        model.get_output_embeddings().weight[DELETE - 2 :] *= 3
    budget, prompts = Budget(answer=8, actions=24, deletes=9), [[3, 4, 5], [6], [7, 8, 20, 3, 4]] * 4
    engine = Engine(model, played, rows=5, keyboard=keyboard)
    rollouts = engine.run(prompts, budget, Sampling(0.7), torch.Generator().manual_seed(0))
    assert sum(r.deletes for r in rollouts) > 15
    ids, real, steps = flat(rollouts)
    packed = pack(ids, real, steps, played, budget)
    scored, entropies = score(model, packed, 0.7, entropy=True, keyboard=keyboard)
    without, _ = score(model, packed, 0.7)
    assert entropies is not None
    for row, rollout in enumerate(rollouts):
        slow = naive.Naive(played, budget)
        for step, action in enumerate(rollout.actions):
            chosen = naive.logprobs(model, [*rollout.prompt, *slow.context()], slow.forbidden(), 0.7)
            typed = typed_distribution(chosen.exp(), EVERY - slow.forbidden(), keyboard)
            assert rollout.logprobs[step] == pytest.approx(typed[action].log().item(), abs=2e-4)
            assert scored[row, step].item() == pytest.approx(rollout.logprobs[step], abs=1e-4)
            assert without[row, step].item() == pytest.approx(chosen[action].item(), abs=2e-4)
            entropy = -torch.special.xlogy(typed, typed).sum().item()
            assert entropies[row, step].item() == pytest.approx(entropy, abs=1e-4)
            slow.press(action)


def test_greedy_decoding_slips_too_by_the_seed() -> None:
    engine = Engine(tiny(), rules("erase"), keyboard=Keyboard(0.3, LETTERS, FIXED))

    def typed(seed: int) -> list[list[int]]:
        rollouts = engine.run([[5, 6]] * 20, Budget(8, 20), GREEDY, torch.Generator().manual_seed(seed))
        return [rollout.actions for rollout in rollouts]

    assert typed(0) == typed(0) != typed(1)
    assert len(set(map(tuple, typed(0)))) > 5


# the task


def policy() -> Policy:
    """A random model of characters with a delete token as likely as a letter, say."""
    tokenizer = character_tokenizer()
    back = len(tokenizer)
    model = tiny(vocab_size=back + 1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        model.get_output_embeddings().weight[back] *= 3
    return Policy(model, tokenizer, Rules({back: "token"}, frozenset([tokenizer.eos_token_id]), retry="ban"))


def test_the_keyboard_has_the_letters_of_the_answers() -> None:
    task, made = typos(train=300, test=4), policy()
    keyboard = keyboard_of(task, made)
    assert keyboard is not None and keyboard.rate == 0.083
    assert made.tokenizer.convert_ids_to_tokens(list(keyboard.tokens)) == list(string.ascii_lowercase)
    assert list(keyboard.tokens) == alphabet(task, made)
    assert keyboard.fixed == {made.tokenizer.eos_token_id, len(made.tokenizer)}
    assert keyboard_of(replace(task, typo_rate=0.0), made) is None


def test_a_keyboard_without_two_keys_is_refused() -> None:
    row = {"prompt": "aa:", "answer": "aa"}
    with pytest.raises(UserError, match=r"typo_rate is 0\.1, but the answers are made of 1 distinct tokens"):
        keyboard_of(Task([row], [row], typo_rate=0.1), policy())
    with pytest.raises(UserError, match="expected 0 <= typo_rate < 1"):
        keyboard_of(Task([row], [row], typo_rate=1.5), policy())


class Typist(Engine):
    """Chooses the right next letter, and delete where anything wrong is visible. Illegal, it presses no matter what."""

    def __init__(self, made: Policy, keyboard: Keyboard | None, answers: list[list[int]]):
        super().__init__(made.model, made.rules, keyboard=keyboard)
        self.answers, self.back = answers, next(iter(made.rules.deletes))

    def _choose(self, batch: Any, *rest: Any) -> list[int]:
        self.asked = {id(row.machine): self.answers[row.index] for row in batch.rows}
        return super()._choose(batch, *rest)

    def _sample(self, logits: Any, rows: list[Running], *rest: Any) -> tuple[list[int], list[float]]:
        choices = [self._choice(self.asked[id(row.machine)], row.machine.visible) for row in rows]
        return super()._sample(50 * torch.eye(self.back + 1)[choices], rows, *rest)

    def _choice(self, answer: list[int], visible: list[int]) -> int:
        return answer[len(visible)] if answer[: len(visible)] == visible and len(visible) < len(answer) else self.back


def test_perfect_typists_meet_the_ceiling_and_pass_it_with_deletes() -> None:
    made, task = policy(), typos(length=6, rate=0.12, train=300, test=1500)
    prompts = made.encode([row["prompt"] for row in task.test])
    answers = made.tokenizer([row["answer"] for row in task.test], add_special_tokens=False).input_ids
    typist = Typist(made, keyboard_of(task, made), [[*ids, made.tokenizer.eos_token_id] for ids in answers])
    results = {}
    for deletes in (0, None):
        rollouts = typist.run(prompts, Budget(7, 60, deletes), GREEDY, torch.Generator().manual_seed(0))
        results[deletes] = measure(made, task, task.test, rollouts)
    assert task.ceiling == pytest.approx(0.88**6)
    assert results[0]["accuracy"] == pytest.approx(task.ceiling, abs=4 * (0.25 / 1500) ** 0.5)
    assert results[None]["accuracy"] == 1.0
    # a slip costs a delete, and one in rate of the letters that are typed slips
    assert results[None]["deletes_per_answer"] == pytest.approx(6 * 0.12 / 0.88, rel=0.15)


def digits(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with a spread: how many of the visible ids are low."""
    return [sum(token < 50 for token in ids) / (1 + len(ids)) for ids in completion_ids]


def test_grpo_on_typos_scores_what_it_sampled(tmp_path: Path) -> None:
    made, task = policy(), typos(length=4, rate=0.3, train=60, test=4)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=16,
        num_generations=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    prompts = [row["prompt"] for row in task.train]
    dataset = datasets.Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})
    seen: list[Rollout] = []
    look = lambda rollouts, *_: seen.extend(rollouts)  # noqa: E731
    trainer = BackspaceGRPOTrainer(made, task, Budget(5, 20), [digits], args, dataset, look)
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    trainer.train()
    assert trainer.deletes > 5
    assert 0 < trainer.logp_gap_max < 1e-4
    assert any(not torch.equal(parameter, before[name]) for name, parameter in made.model.named_parameters())
    letters = set(alphabet(task, made))
    assert sum(token in letters for r in seen for token in r.actions) / sum(len(r.actions) for r in seen) > 0.3


def test_evaluation_types_on_the_tasks_keyboard() -> None:
    """Greedy decoding follows the seed, and only where the keyboard is noisy."""
    made, task = policy(), typos(length=4, rate=0.5, train=60, test=40)

    def greedy(task: Task, seed: int) -> dict[str, Any]:
        return evaluate(made, task, task.test, Budget(5, 12), seed, ("allowed",))["allowed"]["greedy"]

    quiet = replace(task, typo_rate=0.0)
    assert greedy(quiet, 0) == greedy(quiet, 1)
    assert greedy(task, 0) == greedy(task, 0) != greedy(task, 1)


def printed(thing: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120, highlight=False, markup=False).print(thing)
    return stream.getvalue()


def test_the_table_names_the_ceiling() -> None:
    cell = {"accuracy": 0.5, "interval": [0.4, 0.6], "deletes_per_answer": 0.0}
    stages = {"after": {"allowed": {"sampled": cell, "greedy": cell}}}
    assert "ceiling without deletes 49.9 %" in printed(results_table(stages, 0.49935))
    assert "ceiling" not in printed(results_table(stages))


def experiment(folder: Path, **task: Any) -> str:
    """An experiment file that trains for a second, on `task`."""
    content = {
        "name": "typos",
        "model": str(checkpoint(folder / "model")),
        "task": task,
        "warmup": {"steps": 0},
        "rewards": {"correct": {"fn": "correctness:checked"}},
        "trainer": {
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 4,
        },
        "evaluation": {"rows": 8},
    }
    (folder / "typos.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "typos.yaml")


def test_train_eval_and_generate_type_on_the_keyboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    path = experiment(tmp_path, fn="typos", length=3, rate=0.5, train=60, test=8)
    assert main(["train", path, "--out", run]) == 0
    assert "ceiling without deletes 12.5 %" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ceiling"] == 0.125 and summary["logp_gap_max"] < 1e-4

    assert main(["eval", run, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["ceiling"] == 0.125 and results["greedy"]["arms"]["blocked"]["answers"] == 8
    assert main(["eval", run]) == 0
    assert "ceiling without deletes 12.5 %" in capsys.readouterr().out

    said = []
    for seed in ("0", "0", "1", "2", "3"):
        assert main(["generate", run, "abc:", "--temperature", "0", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(set(said)) > 1


def test_a_task_without_two_letters_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from rl_backspace.tasks import Task\n"
        "def make():\n"
        "    rows = [{'prompt': f'{i}:', 'answer': 'aa'} for i in range(40)]\n"
        "    return Task(rows[:30], rows[30:], typo_rate=0.1)\n"
    )
    path = experiment(tmp_path, fn=f"{tmp_path / 'mine.py'}:make")
    assert main(["train", path, "--out", str(tmp_path / "run")]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: task: typo_rate is 0.1, but the answers are made of 1 distinct tokens")
    assert not (tmp_path / "run").exists()
