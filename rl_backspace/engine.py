"""Batched rollouts with deletes: rows of different lengths, refilled as they finish.

Each row is one rollout: a `semantics.Machine`, a row of the KV cache and the last hidden state of every
context position. A delete moves the row back and samples again from a hidden state it already has, so
forward passes are spent on tokens that enter the context and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rl_backspace.backbone import NOT_NUMBERS, Backbone, PointerCache, are_numbers, check, evaluating, lengthened
from rl_backspace.errors import UserError
from rl_backspace.semantics import ACTIONS_PER_TOKEN, Budget, End, Machine, Rules, replay

AHEAD = 8  # actions drawn at once where deletes may come back to a context: another pass costs more than drawing more
MOST_GONE = 0.95  # of the probability: then what is left is too little to be told exactly from what is gone
LARGE, SPAN = 1024, 256  # tokens: a vocabulary from which on it is drawn in two stages, and the first one's
COLDEST = 1e-6  # below it, logits that are divided by the temperature overflow


@dataclass(frozen=True)
class Sampling:
    """How actions are drawn.

    Args:
        temperature: logits are divided by it before anything else; 0 is greedy.
        top_k, top_p, min_p: truncation as in Hugging Face's `generate`, among the legal actions.
        delete_bias: is added to the logits of delete tokens; -inf: none is chosen.

    Raises:
        UserError: one of them is out of range.
    """

    by_logits: ClassVar[bool] = False  # whether `choose` has no use for log-probabilities

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    delete_bias: float = 0.0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature == 0 or COLDEST <= self.temperature < math.inf, f"0 or from {COLDEST} up"),
            ("top_k", self.top_k >= 0, "0, which is off, or more"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("delete_bias", self.delete_bias < math.inf, "a number, or -inf to block deletes"),
        ):
            if not fits:
                raise UserError(f"{name}: got {getattr(self, name)}; expected {expected}")

    def choose(
        self, logits: Tensor, logprobs: Tensor, rows: Sequence[Running], generator: torch.Generator | None
    ) -> Tensor:
        """One action (n,) per row of logits (n, V), -inf where illegal, or of their log-softmax at the temperature.

        It may be -1, or any, where a row has no legal one.
        """
        return draw(logprobs, self, generator)[:, 0]

    def stopped(self, rows: Sequence[Running]) -> Sequence[bool]:
        """Which rows end now, although their actions do not say so; empty for none."""
        return ()


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Rollout:
    """One finished rollout.

    Attributes:
        prompt, actions, visible: token ids.
        logprobs: log-probability of each action among the legal ones, at the sampling temperature
            (1 when greedy, and always from `generate`) and before bias, processors and truncation: what `scoring`
            recomputes. On a keyboard, of what was typed.
        end: why it ended.
        deletes: how many actions were deletes.
        forward_passes: positions the network was evaluated at to choose the actions, the prompt's last one
            included: under `erase` the number of non-delete actions (plus one when the end is "stuck").
        values: what the critic, if there is one, says of the state before each action.
    """

    prompt: list[int]
    actions: list[int]
    visible: list[int]
    logprobs: list[float]
    end: End
    deletes: int
    forward_passes: int
    values: list[float] = field(default_factory=list)


class Keyboard(Protocol):
    """What a policy types on, where not every token that is chosen arrives: see `keyboard`."""

    def swap(self, chosen: Tensor, logprobs: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def through(self, logprobs: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Ahead:
    """Actions that one step drew ahead in the contexts of its rows, for when deletes come back to them.

    They are independent draws from one distribution, so to pass over those that have become illegal leaves draws from
    what is legal. By greedy decoding they are the likeliest ones, and the first legal one is the choice each time.

    Attributes:
        tokens: (n, count + deletes), the drawn ones in order, and behind them the deletes.
        logprobs: theirs, among what was legal then.
        illegal: for each row, what was not.
        count: how many of them were drawn.
        greedy: whether none is ever spent.
        values: for each row the critic's, if there is one.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    illegal: list[list[int]]
    count: int
    greedy: bool
    values: list[float]

    def next(self, row: int, used: int, illegal: list[int]) -> tuple[int, float] | None:
        """The place of the first one from `used` on that is legal now, and its log-probability among what is; None
        where it has to be drawn anew."""
        gone, before = 0.0, self.illegal[row]
        if illegal != before:
            tokens = self.tokens[row].tolist()
            for token in illegal:
                if token not in before:
                    if token not in tokens:
                        return None
                    gone += math.exp(self.logprobs.item(row, tokens.index(token)))
            if gone > MOST_GONE or any(token not in illegal for token in before):
                return None
        for place in range(used, self.count):
            if self.tokens.item(row, place) not in illegal:
                return place, self.logprobs.item(row, place) - math.log1p(-gone)
        return None


@dataclass
class Running:
    """A rollout that goes on.

    Attributes:
        index: its prompt's, in the caller's order.
        drawn: what was drawn ahead, by the length of the context after the prompt: the step, the row in it, and how
            many are spent.
    """

    index: int
    prompt: list[int]
    machine: Machine
    logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    forward_passes: int = 1
    drawn: dict[int, tuple[Ahead, int, int]] = field(default_factory=dict)

    def recall(self) -> tuple[int, float, Sequence[float]] | None:
        """An action that was drawn ahead in the present context, its log-probability and the critic's value; None where
        it has to be drawn anew."""
        here = len(self.machine.path)
        if (found := self.drawn.get(here)) is None:
            return None
        step, row, used = found
        if (chosen := step.next(row, used, self.machine.illegal())) is None:
            return None
        place, logprob = chosen
        if not step.greedy:
            self.drawn[here] = step, row, place + 1
        return step.tokens.item(row, place), logprob, step.values[row : row + 1]

    @property
    def pointer(self) -> int:
        return len(self.prompt) + len(self.machine.path)

    @property
    def context(self) -> list[int]:
        return [*self.prompt, *self.machine.context]

    def finish(self) -> Rollout:
        machine = self.machine
        assert machine.end is not None
        return Rollout(
            self.prompt,
            machine.trace,
            machine.visible,
            self.logprobs,
            machine.end,
            machine.deleted,
            self.forward_passes,
            self.values,
        )


class Engine:
    """Rolls out a policy.

    Args:
        model: a causal LM of transformers, plain or wrapped by PEFT.
        rules: the delete semantics.
        rows: how many rollouts run side by side; memory grows with it.
        keyboard: what the policy types on; it may swap what was chosen, also by greedy decoding.
        critic: hidden states (n, H) -> values (n, 1), which rollouts record.
        ahead: how many actions to draw at once where deletes may come back.

    Raises:
        UserError: the model's cache cannot rewind, with the reason; it has no such delete token; or `rows` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        rows: int = 128,
        keyboard: Keyboard | None = None,
        critic: nn.Module | None = None,
        ahead: int = AHEAD,
    ):
        self.backbone, self.ahead = Backbone(model), ahead
        self.rules = rules
        self.rows = rows
        self.keyboard = keyboard
        self.critic = critic
        self._deletes = torch.tensor([list(rules.deletes)])
        self._vocabulary = len(self.backbone.causal.get_output_embeddings().weight)
        if rows < 1:
            raise UserError(f"rows: got {rows}; expected at least 1")
        self._refuse_unknown([rules.deletes], "a delete token")
        check(self.backbone)

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        budget: Budget,
        sampling: Sampling = Sampling(),
        generator: torch.Generator | None = None,
        on_action: Callable[[int, int], None] | None = None,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[Rollout]:
        """Roll out every prompt (token ids, not empty) once; results in the prompts' order. The model must not change
        until then.

        Args:
            on_action: (prompt index, action) is told of each action as it is chosen.
            begun: for each prompt the actions that were taken already, to go on from; their log-probs are nan.

        Raises:
            UserError: a prompt is empty, has tokens that the model does not, or does not fit its context together with
                the budget; `begun` is of another length or has such tokens; or the model's logits are not numbers.
            IllegalAction: the rules or the budget forbid an action of `begun`.
        """
        done: list[Rollout | None] = [None] * len(prompts)
        with evaluating(self.backbone.causal):
            for index, rollout in self._roll(self._begin(prompts, budget, begun), sampling, generator, on_action):
                done[index] = rollout
        return [rollout for rollout in done if rollout is not None]

    def _begin(
        self, prompts: Sequence[Sequence[int]], budget: Budget, begun: Sequence[Sequence[int]] | None
    ) -> tuple[_Batch, list[Running]]:
        """An empty batch, and the rows that wait for a place in it, the first one last."""
        if begun is not None and len(begun) != len(prompts):
            raise UserError(f"begun: got actions of {len(begun)} rollouts for {len(prompts)} prompts")
        self._refuse_unknown(begun or [], "begun")
        batch = _Batch(self.backbone, min(self.rows, len(prompts)), self.capacity(prompts, budget))
        rows = []
        for index, (prompt, actions) in enumerate(zip(prompts, begun or [()] * len(prompts), strict=True)):
            machine = replay(actions, self.rules, budget)
            rows.append(Running(index, list(prompt), machine, [math.nan] * len(actions)))
        return batch, rows[::-1]

    def _roll(
        self,
        begun: tuple[_Batch, list[Running]],
        sampling: Sampling,
        generator: torch.Generator | None,
        on_action: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[int, Rollout]]:
        batch, waiting = begun
        while waiting or batch.rows:
            batch.admit(waiting)
            feed = self._choose(batch, sampling, generator, on_action)
            for index, row in batch.retire():
                feed[index] = feed[len(batch.rows)]  # the last row took the finished one's place
                yield row.index, row.finish()
            batch.feed(feed[: len(batch.rows)])

    def _choose(
        self,
        batch: _Batch,
        sampling: Sampling,
        generator: torch.Generator | None,
        on_action: Callable[[int, int], None] | None,
    ) -> list[int]:
        """Let every row act until it has a token to feed or has ended; the tokens, 0 for ended rows."""
        feed = [0] * len(batch.rows)
        acting = [i for i, row in enumerate(batch.rows) if row.machine.end is None]  # some ended before they began
        while acting:
            hidden = batch.anchors(acting)
            values = self.critic(hidden)[:, 0].tolist() if self.critic is not None else []
            logits = batch.backbone.logits(hidden)
            actions, logprobs = self._sample(logits, [batch.rows[i] for i in acting], values, sampling, generator)
            again, going = [], []
            for n, (i, action, logprob) in enumerate(zip(acting, actions, logprobs, strict=True)):
                row, value = batch.rows[i], values[n : n + 1]
                if action < 0:
                    row.machine.stop("stuck")
                    continue
                enters = self._act(row, action, logprob, value, on_action)
                while enters is None and row.machine.end is None:
                    found = row.recall()
                    if found is None:
                        again.append(i)
                        break
                    enters = self._act(row, *found, on_action)
                if row.machine.end is None:
                    going.append(row)
                    feed[i] = enters or 0
            for row, stopped in zip(going, sampling.stopped(going), strict=False):
                if stopped:
                    row.machine.stop("stop")
            acting = [i for i in again if batch.rows[i].machine.end is None]
        return feed

    def _act(
        self,
        row: Running,
        action: int,
        logprob: float,
        value: Sequence[float],
        on_action: Callable[[int, int], None] | None,
    ) -> int | None:
        """Take an action; the token that has to be fed for it."""
        enters = row.machine.step(action)
        row.logprobs.append(logprob)
        row.values += value
        if on_action:
            on_action(row.index, action)
        return enters

    def _sample(
        self,
        logits: Tensor,
        rows: list[Running],
        values: list[float],
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> tuple[list[int], list[float]]:
        """One action and its log-probability per row of logits (n, V); action -1 where none is legal.

        Args:
            logits: what is illegal is ruled out in place.
            values: the critic's of each row, if there is one.
        """
        forbidden = [row.machine.illegal() for row in rows]
        if any(forbidden):
            places = [n for n, illegal in enumerate(forbidden) for _ in illegal]
            logits[places, [token for illegal in forbidden for token in illegal]] = -torch.inf
        logprobs = wanted = _log_softmax(logits, sampling)
        if sampling.delete_bias:
            logits[:, list(self.rules.deletes)] += sampling.delete_bias
            if not sampling.by_logits:
                wanted = _log_softmax(logits, sampling)
        if self._may_come_back(sampling, rows):
            chosen, known = self._draw_ahead(logprobs, values, rows, forbidden, sampling, generator)
        else:
            actions = sampling.choose(logits, wanted, rows, generator)
            if wanted is not logprobs:  # what is legal may all be ruled out by the bias
                actions = torch.where(wanted.gather(1, actions.clamp(min=0)[:, None])[:, 0].isfinite(), actions, -1)
            if self.keyboard is not None:
                typed = self.keyboard.swap(actions.clamp(min=0), logprobs, generator)
                actions = torch.where(actions < 0, actions, typed)
                logprobs = self.keyboard.through(logprobs)
            chosen, known = actions.tolist(), logprobs.gather(1, actions.clamp(min=0)[:, None])[:, 0].tolist()
        if not all(map(math.isfinite, known)):  # a row of -inf is nan after the softmax
            if not are_numbers(logits):
                raise UserError(NOT_NUMBERS)
            chosen = [action if math.isfinite(logprob) else -1 for action, logprob in zip(chosen, known, strict=True)]
        return chosen, known

    def _may_come_back(self, sampling: Sampling, rows: list[Running]) -> bool:
        """Whether deletes may bring rows back to a context, where the next action is another draw from the same
        distribution: nothing but what is legal has changed."""
        plain = type(sampling) is Sampling and self.keyboard is None and not sampling.delete_bias
        whole = (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0)
        deletes = bool(self.rules.deletes) and self.rules.memory != "keep" and rows[0].machine.budget.deletes != 0
        return self.ahead > 1 and plain and whole and deletes

    def _draw_ahead(
        self,
        logprobs: Tensor,
        values: list[float],
        rows: list[Running],
        forbidden: list[list[int]],
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> tuple[list[int], list[float]]:
        """One action and its log-probability per row, and some more for when it comes back, which the row keeps."""
        count, greedy = min(self.ahead, logprobs.shape[1]), not sampling.temperature
        drawn = draw(logprobs, sampling, generator, count)
        tokens = torch.cat((drawn, self._deletes.to(drawn.device).expand(len(rows), -1)), 1)
        known = logprobs.gather(1, tokens).cpu().numpy()
        step = Ahead(tokens.cpu().numpy(), known, forbidden, count, greedy, values)
        for n, row in enumerate(rows):
            row.drawn[len(row.machine.path)] = step, n, 0 if greedy else 1
        return step.tokens[:, 0].tolist(), known[:, 0].tolist()

    def capacity(self, prompts: Sequence[Sequence[int]], budget: Budget) -> int:
        """Longest context in tokens that these prompts can grow to; raises UserError if the model has no room."""
        longest = max(map(len, prompts), default=1)
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError("a prompt has no tokens; expected at least one: add a beginning-of-sequence token")
        self._refuse_unknown(prompts, "a prompt")
        answer = budget.most_actions if self.rules.memory == "keep" else min(budget.answer, budget.most_actions)
        if self.rules.memory == "hint":
            answer = min(2 * answer + 1, budget.most_actions)
        capacity = longest + answer
        if capacity > self.backbone.max_length:
            raise UserError(
                f"the longest prompt has {longest} tokens and its context may grow by {answer}, but the model's limit "
                f"is {self.backbone.max_length}; shorten the prompts or the answer "
                "(max_new_tokens, --tokens, trainer.max_completion_length)"
            )
        return capacity

    def _refuse_unknown(self, lists: Sequence[Collection[int]], where: str) -> None:
        """On a GPU an id that is not there would end the process."""
        lists = [tokens for tokens in lists if len(tokens)]
        for token in (min(map(min, lists), default=0), max(map(max, lists), default=0)):
            if not 0 <= token < self._vocabulary:
                raise UserError(f"{where}: got token {token}; the model has tokens 0 to {self._vocabulary - 1}")

    def room(self, prompts: Sequence[Sequence[int]]) -> int:
        """Most visible tokens that the model's context has room for behind these prompts, by the default budget of
        actions; less than 1 for none."""
        left = self.backbone.max_length - max(map(len, prompts), default=1)
        return {"erase": left, "hint": (left - 1) // 2, "keep": left // ACTIONS_PER_TOKEN}[self.rules.memory]


def _log_softmax(logits: Tensor, sampling: Sampling) -> Tensor:
    """At the sampling temperature, greedy decoding's being 1."""
    return torch.log_softmax(logits if sampling.temperature in (0, 1) else logits / sampling.temperature, dim=-1)


def draw(logprobs: Tensor, sampling: Sampling, generator: torch.Generator | None = None, count: int = 1) -> Tensor:
    """Draw `count` actions per row of log-probabilities (n, V), independently of each other, or take the likeliest ones
    in order; token ids (n, count)."""
    if sampling.temperature == 0 and count == 1:
        return logprobs.argmax(-1, keepdim=True)
    if sampling.temperature == 0:  # of equally likely ones the first, as argmax has it
        order = torch.arange(logprobs.shape[-1], dtype=torch.double, device=logprobs.device)
        return (logprobs.double() - 1e-13 * order).topk(count).indices
    logprobs = _truncate(logprobs, sampling)
    # one random number per draw, where a noise per token would cost more
    uniform = torch.rand(len(logprobs), count, device=logprobs.device, dtype=torch.double, generator=generator)
    chosen = _invert(logprobs, uniform)
    on_cpu = logprobs.device.type == "cpu"
    if logprobs.shape[-1] <= LARGE and on_cpu:
        return chosen  # of a row with any mass: u * total < total for u below 1, and no sum is below the one before
    possible = logprobs.gather(1, chosen) > -torch.inf  # a parallel sum need not be monotone to the last digit
    if on_cpu and possible.all():  # a GPU would be waited for, which takes longer than to go on
        return chosen
    return torch.where(possible, chosen, logprobs.argmax(-1, keepdim=True))


def _invert(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """The tokens (n, count) at which the cumulative distributions of log-probabilities (n, V) pass numbers (n, count)
    of [0, 1); in double, so that rounding adds no mass."""
    vocabulary = logprobs.shape[-1]
    if vocabulary <= LARGE:
        cumulative = logprobs.double().exp().cumsum(-1)
        found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return found.clamp(max=vocabulary - 1)
    # first the span of tokens, then the token in it: to sum up all of them takes several times as long
    probabilities, whole = logprobs.exp(), vocabulary // SPAN * SPAN
    masses = probabilities[:, :whole].unflatten(1, (-1, SPAN)).sum(-1)
    ends = torch.cat((masses, probabilities[:, whole:].sum(-1, keepdim=True)), 1).double().cumsum(-1)
    wanted = uniform * ends[:, -1:]
    span = torch.searchsorted(ends, wanted, right=True).clamp(max=ends.shape[1] - 1)
    before, after = nn.functional.pad(ends, (1, 0)).gather(1, span), ends.gather(1, span)
    places = span[:, :, None] * SPAN + torch.arange(SPAN, device=span.device)
    inside = probabilities.gather(1, places.clamp(max=vocabulary - 1).flatten(1)).view(places.shape).double()
    inside = inside.masked_fill(places >= vocabulary, 0.0).cumsum(-1)
    share = ((wanted - before) / (after - before))[:, :, None] * inside[:, :, -1:]
    found = torch.searchsorted(inside, share, right=True)[:, :, 0]
    return (span * SPAN + found).clamp(max=vocabulary - 1)


def _truncate(logprobs: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k > 0:
        kth = logprobs.topk(min(sampling.top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logprobs.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        beyond[:, 0] = False  # the likeliest stays
        logprobs = logprobs.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    if sampling.min_p > 0:
        floor = logprobs.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log().item()
        logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf)
    return logprobs


class _Batch:
    """The rows that run now: always the first `len(rows)` rows of every buffer."""

    def __init__(self, backbone: Backbone, size: int, capacity: int):
        self.backbone, self.size, self.capacity = backbone.for_a_run(), size, capacity
        self.network = self.backbone.fastest(capacity, size)
        self.rows: list[Running] = []
        self.cache: PointerCache | None = None
        self.hidden: Tensor | None = None  # (size, the cache's length, H): the hidden state at every context position
        self.fed: Tensor | None = None  # (n, H): of the tokens that were fed last, if no row has moved since

    def admit(self, waiting: list[Running]) -> None:
        """Move waiting rows into free places; each distinct context is computed once."""
        room = self.size - len(self.rows)
        if not waiting or room < min(len(waiting), max(1, self.size // 8)):
            return
        new = [waiting.pop() for _ in range(min(room, len(waiting)))]
        distinct: dict[tuple[int, ...], int] = {}
        source = torch.tensor([distinct.setdefault(tuple(row.context), len(distinct)) for row in new])
        source = source.to(self.backbone.device)
        longest = max(map(len, distinct))
        ids = torch.tensor([[*context, *[context[-1]] * (longest - len(context))] for context in distinct])
        anchor = min(len(row.prompt) for row in new) - 1  # nothing goes back before a prompt's end
        hidden, prefilled = self.network.prefill(ids.to(self.backbone.device), anchor)
        if self.cache is None or self.hidden is None:
            self.cache = PointerCache(prefilled, self.size, self.capacity)
            self.hidden = hidden.new_zeros(self.size, 0, hidden.shape[-1])
        first = len(self.rows)
        self.cache.fill(first, prefilled, source)
        self._grow()
        self.hidden[first : first + len(new), anchor:longest] = hidden[source]
        self.rows += new
        self.fed = None

    def anchors(self, indices: list[int]) -> Tensor:
        """The hidden states (n, H) that choose the next action of these rows."""
        assert self.hidden is not None
        fed, self.fed = self.fed, None
        if fed is not None and len(indices) == len(fed):
            return fed
        length = self.hidden.shape[1]
        places = torch.tensor([i * length + self.rows[i].pointer - 1 for i in indices], device=self.hidden.device)
        return self.hidden.flatten(0, 1)[places]

    def retire(self) -> Iterator[tuple[int, Running]]:
        """Take the finished rows out, from the last to the first; the last row moves into each gap."""
        assert self.cache is not None and self.hidden is not None
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            if row.machine.end is None:
                continue
            last = self.rows.pop()
            if last is not row:
                self.rows[index] = last
                self.cache.move(len(self.rows), index, last.pointer)
                self.hidden[index, : last.pointer] = self.hidden[len(self.rows), : last.pointer]
            yield index, row

    def feed(self, tokens: list[int]) -> None:
        """One forward pass: the token that each row's last action put into its context."""
        if not tokens:
            return
        assert self.cache is not None and self.hidden is not None
        device = self.hidden.device
        places = [row.pointer - 1 for row in self.rows]
        self.cache.reserve(max(places) + 1)
        ids, pointers = torch.tensor([tokens, places], device=device)
        hidden = self.network.decode(ids, pointers, self.cache)
        self.fed = hidden.to(self.hidden.dtype)  # under autocast they differ
        self._grow()
        firsts = torch.arange(len(tokens), device=device) * self.hidden.shape[1]
        self.hidden.flatten(0, 1).index_copy_(0, firsts + pointers, self.fed)
        for row in self.rows:
            row.forward_passes += 1

    def _grow(self) -> None:
        """Room for as many hidden states as the cache has for keys."""
        assert self.cache is not None and self.hidden is not None
        if self.cache.length > self.hidden.shape[1]:
            self.hidden = lengthened(self.hidden, self.cache.length)
