"""What the model itself does on some prompts: the raw material of the corrections that are made from its errors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from rl_backspace.backbone import evaluating
from rl_backspace.config import Warmup
from rl_backspace.corrections import Source
from rl_backspace.engine import Engine, Rollout, Sampling
from rl_backspace.expert import Expert, Teacher
from rl_backspace.policy import Policy
from rl_backspace.scoring import batched, distributions, entropy_of, pack
from rl_backspace.semantics import Budget
from rl_backspace.tasks import Row

CHUNK = 2**26  # numbers at once: each token of an answer takes a distribution over the whole vocabulary
LIKELIEST = 16  # a wrong token that is less likely than so many others tempts nobody


@dataclass(frozen=True)
class Entry:
    """One prompt, the expert of its row, and what the model did: answers that may go wrong, or whole rollouts."""

    prompt: list[int]
    expert: Expert
    attempts: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Asker:
    """Asks the policy as it is now.

    Args:
        config: `temperature` of samples and rollouts, the `entropy` above which a choice is uncertain, `late`.
        group: samples or rollouts of each prompt.
    """

    policy: Policy
    teacher: Teacher
    engine: Engine
    config: Warmup
    group: int
    generator: torch.Generator

    def ask(self, source: Source, rows: Sequence[Row], prompts: Sequence[list[int]]) -> list[Entry]:
        """An entry for each prompt that the source has something for; prompts are token ids."""
        entries = [Entry(prompt, self.teacher.expert(row)) for row, prompt in zip(rows, prompts, strict=True)]
        if source == "rollouts":
            for entry, rollout in self._roll_out(entries, self.teacher.budget):
                entry.attempts.append(rollout.actions)
            return entries
        if source == "samples":
            for entry, rollout in self._roll_out(entries, replace(self.teacher.budget, deletes=0)):
                entry.attempts.append(rollout.visible)
        elif source == "uncertain":
            self._tempt(entries)
        return [entry for entry in entries if any(entry.expert.first_error(a) is not None for a in entry.attempts)]

    def _roll_out(self, entries: list[Entry], budget: Budget) -> Iterator[tuple[Entry, Rollout]]:
        """A group of rollouts of each prompt."""
        asked = [entry for entry in entries for _ in range(self.group)]
        sampling = Sampling(self.config.temperature)
        rollouts = self.engine.run([entry.prompt for entry in asked], budget, sampling, self.generator)
        return zip(asked, rollouts, strict=True)

    def _tempt(self, entries: list[Entry]) -> None:
        """Along each reference answer, the likeliest wrong token where entropy is high, and how it would go on."""
        begun = []
        for chunk in chunks(entries, self.engine.backbone.config.vocab_size, lambda entry: len(entry.expert.gold)):
            for entry, places in zip(chunk, self._uncertain(chunk), strict=True):
                taken = sorted(random.Random(f"{entry.prompt}").sample(places, min(self.group, len(places))))
                begun += [(entry, [*entry.expert.gold[:depth], wrong]) for depth, wrong in taken]
        for entry, attempt in begun:
            entry.attempts.append(attempt)
        late, most = self.config.late, self.engine.backbone.max_length
        if not late:
            return
        going_on = [(e.prompt, a) for e, a in begun if len(e.prompt) + len(a) + late <= most]
        room = replace(self.teacher.budget, answer=late, actions=None, deletes=0)
        asked, sampling = [prompt + attempt for prompt, attempt in going_on], Sampling(self.config.temperature)
        rollouts = self.engine.run(asked, room, sampling, self.generator)
        for (_, attempt), rollout in zip(going_on, rollouts, strict=True):
            attempt += rollout.visible

    @torch.no_grad()
    def distributions(
        self, prompts: Sequence[list[int]], traces: Sequence[list[int]], budget: Budget
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (U, V) at each distinct choice of some traces, and which choice each action was (B, K)."""
        model = self.policy.model
        ids, real = batched(prompts, traces, self.policy.tokenizer.pad_token_id)
        ids = ids.to(self.engine.backbone.device)
        packed = pack(ids, real, max(map(len, traces)), self.policy.rules, budget)
        with evaluating(model):
            logprobs = distributions(model, packed)
        return logprobs, packed.choices

    def _uncertain(self, entries: Sequence[Entry]) -> Iterator[list[tuple[int, int]]]:
        """For each entry, the depths at which the model's choice is uncertain, each with the likeliest wrong token."""
        answers = [entry.expert.gold for entry in entries]
        blocked = replace(self.teacher.budget, deletes=0)
        logprobs, choices = self.distributions([entry.prompt for entry in entries], answers, blocked)
        entropies = entropy_of(logprobs)[choices].tolist()
        likeliest = logprobs.topk(min(LIKELIEST, logprobs.shape[-1])).indices[choices].tolist()
        for entry, answer, found, tokens in zip(entries, answers, entropies, likeliest, strict=True):
            places = []
            for depth in range(len(answer)):
                if found[depth] > self.config.entropy:
                    wrong = (t for t in tokens[depth] if self._is_wrong(entry.expert, answer[:depth], t))
                    places += [(depth, token) for token in wrong][:1]
            yield places

    def _is_wrong(self, expert: Expert, right: list[int], token: int) -> bool:
        """Whether a token can be typed here by mistake: it leaves nothing alive, and a delete can still follow."""
        rules = self.policy.rules
        return token not in rules.eos and token not in rules.deletes and not expert.alive([*right, token])


T = TypeVar("T")


def chunks(items: Sequence[T], vocab_size: int, length: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """The items in order, as many at a time as fit: each takes `length` distributions over `vocab_size` tokens."""
    chunk: list[T] = []
    longest = 0
    for item in items:
        longest = max(longest, length(item))
        if chunk and (len(chunk) + 1) * longest * vocab_size > CHUNK:
            yield chunk
            chunk, longest = [], length(item)
        chunk.append(item)
    if chunk:
        yield chunk
