"""Teachers on letters: one token per character. Without a model its code point, else what a small policy's is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from conftest import tiny

from rl_backspace.expert import Expert, Teacher
from rl_backspace.policy import Policy
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Machine, Memory, Retry, Rules, Unit
from rl_backspace.tasks import Row, Task, arithmetic, countdown, signs

EOS = 1
UNITS: dict[str, dict[int, Unit]] = {
    "token": {900: "token"},
    "2": {900: 2},
    "4": {900: 4},
    "line": {900: "line"},
    "answer": {900: "answer"},
    "token and answer": {900: "token", 901: "answer"},
    "line and 3": {900: "line", 901: 3},
    "2 and 3": {900: 2, 901: 3},
}
BUDGET = Budget(answer=24, actions=96)


def gold(row: Row) -> list[int]:
    return [*map(ord, row["answer"]), EOS]


def text(visible: Sequence[int]) -> str:
    return "".join(chr(token) for token in visible if token != EOS)


def poems(count: int = 40) -> Task:
    """Answers of three lines; only the reference is right."""
    rng = random.Random(0)
    lines = ["".join(rng.choice("abcd") for _ in range(rng.randint(1, 4))) for _ in range(3 * count)]
    rows = [{"prompt": str(i), "answer": "\n".join(lines[3 * i : 3 * i + 3])} for i in range(count)]
    return Task(rows[1:], rows[:1])


TASKS = {
    "signs": signs(count=5, train=40, test=1),
    "sums": arithmetic("*", train=40, test=1),
    "poems": poems(),
    "countdown": countdown(count=3, high=9, train=40, test=1),
}


def rules(units: str = "token", memory: Memory = "erase", retry: Retry = "ban") -> Rules:
    return Rules(UNITS[units], frozenset([EOS]), memory, retry, frozenset(map(ord, "\n,")))


def teacher(task: Task, played: Rules, budget: Budget = BUDGET) -> Teacher:
    alphabet = sorted({token for row in task.train for token in gold(row)} - {EOS})
    return Teacher(task, played, budget, lambda answer: [*map(ord, answer)], text, alphabet, EOS)


def played_by_chance(expert: Expert, rng: random.Random, most: int) -> Machine:
    """A rollout that types right and wrong tokens and deletes as it likes, up to so many actions; it may have ended.

    Some delete nearly all the time, also what is right, and some type what no answer has.
    """
    its = expert.teacher
    machine = Machine(its.rules, its.budget)
    deleting, knowing = rng.choice([0.1, 0.3, 0.6]), rng.choice([0.0, 0.5, 0.9])
    for _ in range(most):
        illegal = machine.illegal()
        right = expert.next(machine.visible, rng, illegal) if expert.alive(machine.visible) else None
        chance = rng.random()
        if chance < deleting and not set(its.rules.deletes) <= set(illegal):
            action = rng.choice(list(its.rules.deletes))
        elif chance < deleting + (1 - deleting) * knowing and right is not None:
            action = right
        else:
            legal = [token for token in (*its.alphabet, ord("x"), EOS) if token not in illegal]
            action = rng.choice(legal)
        machine.step(action)
        if machine.end is not None:
            break
    return machine


def tiny_policy(
    memory: Memory = "erase", retry: Retry = "ban", units: tuple[Unit, ...] = ("token",), **overrides: object
) -> Policy:
    """A random model on characters, with a delete token for each unit."""
    tokenizer = character_tokenizer()
    names = [f"<|delete {unit}|>" for unit in units]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    deletes = dict(zip(tokenizer.convert_tokens_to_ids(names), units, strict=True))
    eos = tokenizer.eos_token_id
    model = tiny(vocab_size=128, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, **overrides)
    return Policy(model, tokenizer, Rules(deletes, frozenset([eos]), memory, retry))


def typed(policy: Policy, trace: str) -> list[int]:
    """A trace from text: < is the first delete token, $ the end."""
    special = {"<": min(policy.rules.deletes), "$": policy.tokenizer.eos_token_id}
    return [special.get(c, policy.tokenizer.convert_tokens_to_ids(c)) for c in trace]


def bigrams(table: Mapping[str, Mapping[str, float]], retry: Retry = "free") -> Policy:
    """A policy whose choice depends on the last visible token alone: characters -> probabilities, < for delete.

    Tokens that the table does not have go on like "?", which may be a prompt.
    """
    policy = tiny_policy("erase", retry, hidden_size=128, tie_word_embeddings=False)
    model = policy.model
    with torch.no_grad():
        for layer in model.model.layers:  # the hidden state is the embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(128))
        head = torch.full((128, 128), -100.0)
        for last in range(128):
            row = table.get(policy.tokenizer.convert_ids_to_tokens(last) or "", table["?"])
            for token, probability in row.items():
                head[typed(policy, token)[0], last] = torch.tensor(max(probability, 1e-30)).log()
        model.lm_head.weight.copy_(head / 128**0.5)  # its RMS norm makes the one of an embedding the root of 128
    return policy
