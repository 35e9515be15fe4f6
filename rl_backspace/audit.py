"""Would a reward teach what is wanted? Known traces through the configured total, before anything is trained on it.

Each prompt's traces are made by the task and the delete semantics of the experiment: right at once, right after
corrections, wrong, given up, going round in circles. Some must never earn more than others, at no point of any
schedule; where one does, a policy that maximises the reward learns to play it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rl_backspace.corrections import Corrector
from rl_backspace.engine import Rollout
from rl_backspace.errors import UserError
from rl_backspace.experiment import Experiment
from rl_backspace.expert import Expert
from rl_backspace.semantics import IllegalAction, Machine, replay
from rl_backspace.terms import call, per_action
from rl_backspace.warmup import make_corrector

ROWS, POINTS = 16, 11  # prompts that are played, and steps of training at which
TRIES = 8  # tokens that are tried at a place, where some are right or banned
MANY = 3  # corrections that are still honest work
NOMINAL = 1000  # steps, where the config counts epochs
ROUNDING = 1e-6

RIGHT, ONE, SOME, MOST = "right", "right, 1 correction", f"right, {MANY} corrections", "right, errors on purpose"
LATE, AGAIN = "right, a late correction", "right, deleted and typed again"
WRONG, SORRY, SPOILED = "wrong", "wrong, 1 correction", "right, deleted, then wrong"
EMPTIED, LOOP, FARM = "all deleted, stopped", "loop to the budget", "errors to the budget"
EMPTY, CUT = "empty", "never ended"
TRACES = (RIGHT, ONE, LATE, SOME, MOST, AGAIN, WRONG, SORRY, SPOILED, EMPTIED, LOOP, FARM, EMPTY, CUT)


@dataclass(frozen=True)
class Ordering:
    """`above` must earn at least what `below` does.

    Args:
        strict: `never`: they may be equal; `at the end`: not when all schedules have run; `always`: at no point.
        mend: what to do where it does not hold.
    """

    above: str
    below: str
    strict: str
    mend: str

    def __str__(self) -> str:
        return f"{self.below!r} below {self.above!r}"


_ERRING = "what pays for mending pays for erring: score the final answer only, and let a delete cost something"
_FREE = "a correction that was not needed must cost something in the end: add a delete cost"
_EXTRA = "a delete more must never pay: let each cost at least what comes back for it"
_DEAR = "right answers must be worth their corrections: lower what deleting costs"
_RIGHT = "being right must earn something: add a correctness reward, or raise its weight"
_GIVE_UP = "an answer that is given up must not earn more than one that is tried: add ending:unfinished or ending:empty"
_CIRCLES = "going round in circles must not earn more than a wrong answer: add a delete cost or a loop_penalty"
ORDERINGS = (
    Ordering(RIGHT, WRONG, "always", _RIGHT),
    Ordering(RIGHT, ONE, "at the end", _ERRING),
    Ordering(RIGHT, LATE, "at the end", _ERRING),
    Ordering(RIGHT, AGAIN, "at the end", _ERRING),
    Ordering(ONE, SOME, "never", _EXTRA),
    Ordering(SOME, MOST, "never", _EXTRA),
    Ordering(ONE, WRONG, "always", _DEAR),
    Ordering(SOME, WRONG, "always", _DEAR),
    Ordering(WRONG, SORRY, "never", _EXTRA),
    Ordering(WRONG, SPOILED, "never", _EXTRA),
    Ordering(WRONG, LOOP, "never", _CIRCLES),
    Ordering(WRONG, FARM, "never", _CIRCLES),
    Ordering(WRONG, EMPTIED, "never", _GIVE_UP),
    Ordering(WRONG, EMPTY, "never", _GIVE_UP),
    Ordering(WRONG, CUT, "never", _GIVE_UP),
)


@dataclass(frozen=True)
class Violation:
    """An ordering that does not hold.

    Attributes:
        margin: by how much `below` earns more, at worst; 0: they earn the same.
        shares: of training, 0 to 1, the first and the last point at which it does not hold.
        prompts: in how many of `of` prompts.
        blame: the term that pays most for it, and how much, weighted; None where they earn the same.
    """

    ordering: Ordering
    margin: float
    shares: tuple[float, float]
    prompts: int
    of: int
    blame: tuple[str, float] | None

    def __str__(self) -> str:
        first, last = (f"{100 * share:.0f}" for share in self.shares)
        when = f"at {last} % of training" if first == last else f"from {first} to {last} % of training"
        how = f"earns up to {self.margin:.3g} more than" if self.margin > ROUNDING else "earns as much as"
        paid = f"; reward {self.blame[0]!r} makes {self.blame[1]:.3g} of the difference" if self.blame else ""
        mend = _FREE if self.ordering.strict == "at the end" and not self.blame else self.ordering.mend
        return (
            f"{self.ordering.below!r} {how} {self.ordering.above!r}, {when}, in {self.prompts} of {self.of} "
            f"prompts{paid}; {mend}"
        )


@dataclass(frozen=True)
class Audit:
    """What the traces earn.

    Attributes:
        terms: names of the rewards.
        shares: points of training, 0 to 1.
        earned: trace name -> for each prompt that it can be played on -> for each point, each term's weighted value.
        examples: trace name -> one rollout.
        violations: of `ORDERINGS`.
        unchecked: those of `ORDERINGS` that no prompt has both traces of.
    """

    terms: list[str]
    shares: list[float]
    earned: dict[str, dict[int, list[list[float]]]]
    examples: dict[str, Rollout]
    violations: list[Violation]
    unchecked: list[Ordering]

    def mean(self, trace: str, point: int) -> list[float]:
        """Each term's weighted value at a point of training, over the prompts."""
        played = [points[point] for points in self.earned[trace].values()]
        return [sum(values) / len(played) for values in zip(*played, strict=True)]


def audit(experiment: Experiment, rows: int = ROWS, points: int = POINTS) -> Audit:
    """Play the traces of some train prompts through the reward as it is at some points of training.

    With PPO what counts is the discounted return. Terms are added up by their weights, whatever the trainer's
    `multi_objective_aggregation` makes of them.
    """
    names, weights = list(experiment.config.rewards), experiment.args.reward_weights or []
    steps = experiment.args.max_steps if experiment.args.max_steps > 0 else NOMINAL
    schedule = sorted({round(steps * point / (points - 1)) for point in range(points)})
    corrector = make_corrector(experiment.policy, experiment.task, experiment.budget, experiment.config.warmup)
    chosen, vocabulary = experiment.task.train[:rows], len(experiment.policy.tokenizer)
    gamma = experiment.config.ppo.gamma if experiment.config.algorithm == "ppo" else 1.0
    prompts = experiment.policy.encode([row["prompt"] for row in chosen])
    played = [
        (name, index, Rollout(prompt, m.trace, m.visible, [0.0] * len(m.trace), m.end or "budget", m.deleted, 0))
        for index, (row, prompt) in enumerate(zip(chosen, prompts, strict=True))
        for name, m in traces(corrector, corrector.teacher.expert(row), random.Random(index), vocabulary).items()
    ]
    rollouts, played_rows = [rollout for *_, rollout in played], [chosen[index] for _, index, _ in played]
    earned: dict[str, dict[int, list[list[float]]]] = {name: {} for name in TRACES}
    for step in schedule:
        values = call(experiment.terms, rollouts, played_rows, experiment.policy, step, steps)
        for n, (name, index, rollout) in enumerate(played):
            placed = (per_action(term[n], len(rollout.actions)) for term in values)
            given = [weight * _return(rewards, gamma) for rewards, weight in zip(placed, weights, strict=True)]
            earned[name].setdefault(index, []).append(given)
    found = {name: by_prompt for name, by_prompt in earned.items() if by_prompt}
    shares = [step / steps for step in schedule]
    examples = {name: rollout for name, _, rollout in reversed(played)}
    violations = [v for ordering in ORDERINGS if (v := _violation(ordering, found, shares, names)) is not None]
    unchecked = [o for o in ORDERINGS if not found.get(o.above, {}).keys() & found.get(o.below, {}).keys()]
    return Audit(names, shares, found, examples, violations, unchecked)


def heed(experiment: Experiment) -> list[str]:
    """What `train` has to say of the reward before it trains on it: a warning a line.

    Raises:
        UserError: the same lines, where the config is `audit: strict`.
    """
    if experiment.config.audit == "skip" or not experiment.args.max_steps:
        return []
    found = [f"rewards: {violation}" for violation in audit(experiment, 4, 5).violations]
    if found and experiment.config.audit == "strict":
        raise UserError("\n".join(found))
    return found


def _return(rewards: Sequence[float], gamma: float) -> float:
    """The discounted sum of one rollout's rewards, action by action."""
    return sum((gamma**step * reward for step, reward in enumerate(rewards)), 0.0)


def _violation(
    ordering: Ordering, earned: dict[str, dict[int, list[list[float]]]], shares: list[float], names: list[str]
) -> Violation | None:
    above, below = earned.get(ordering.above, {}), earned.get(ordering.below, {})
    both = sorted(above.keys() & below.keys())
    broken: dict[tuple[int, int], list[float]] = {}  # (prompt, point) -> by how much each term is for `below`
    for prompt in both:
        for point in range(len(shares)):
            gaps = [b - a for a, b in zip(above[prompt][point], below[prompt][point], strict=True)]
            strict = ordering.strict == "always" or (ordering.strict == "at the end" and point == len(shares) - 1)
            if sum(gaps) > (-ROUNDING if strict else ROUNDING):
                broken[prompt, point] = gaps
    if not broken:
        return None
    worst = max(broken.values(), key=sum)
    blame = max(zip(names, worst, strict=True), key=lambda pair: pair[1])
    points = [point for _, point in broken]
    return Violation(
        ordering,
        max(0.0, sum(worst)),
        (shares[min(points)], shares[max(points)]),
        len({prompt for prompt, _ in broken}),
        len(both),
        blame if blame[1] > ROUNDING else None,
    )


def traces(corrector: Corrector, expert: Expert, rng: random.Random, vocabulary: int) -> dict[str, Machine]:
    """The traces that can be played on one prompt under the experiment's rules and budget, each played to its end."""
    player = _Player(corrector, expert, vocabulary)
    found: dict[str, Machine | None] = {RIGHT: player.play(expert.gold)}
    most = corrector.teacher.budget.most_actions
    for name, least, count in ((ONE, 1, 1), (SOME, MANY, MANY), (MOST, MANY + 1, most)):
        planted = Corrector(corrector.teacher, clean=0.0, late=0).plant(expert, "random", count, rng)
        found[name] = player.play(planted.actions) if len(planted.mistakes) >= least else None
    found[LATE] = player.late()
    found[AGAIN] = player.again()
    found[WRONG], found[SORRY], found[SPOILED] = player.wrongly()
    found[EMPTIED] = player.emptied()
    found[LOOP] = player.loop()
    found[FARM] = player.farm()
    found[EMPTY] = player.play([corrector.teacher.eos])
    found[CUT] = player.cut()
    return {name: m for name in TRACES if (m := found[name]) is not None and m.end}


class _Player:
    """Plays what is no plain right answer on one prompt; None where the rules leave no way to."""

    def __init__(self, corrector: Corrector, expert: Expert, vocabulary: int):
        self.teacher, self.expert, self.vocabulary = corrector.teacher, expert, vocabulary
        self.presses = sorted(self.teacher.rules.deletes, key=lambda token: str(self.teacher.rules.deletes[token]))

    def play(self, actions: Sequence[int]) -> Machine | None:
        """The machine after these actions; None where one is illegal."""
        try:
            return replay(actions, self.teacher.rules, self.teacher.budget)
        except IllegalAction:
            return None

    def late(self) -> Machine | None:
        """Several wrong tokens before the deletes, as many as fit, on the way to the right answer."""
        for length in (MANY, 2):
            for depth in range(len(self.expert.gold)):
                if (machine := self._mended(self.expert.gold, depth, length)) is not None:
                    return machine
        return None

    def _mended(self, path: Sequence[int], depth: int, length: int) -> Machine | None:
        """The trace that types `path`, with `length` other tokens at a depth, taken back."""
        for token in self.teacher.alphabet if self.presses else ():
            if token == path[depth] or self.expert.alive([*path[:depth], token]):
                continue
            wrong = [token, *itertools.islice(itertools.cycle(self.teacher.alphabet), length - 1)]
            presses, left = self.expert.take_back(path[:depth], wrong)
            machine = self.play([*path[:depth], *wrong, *presses, *path[left:]])
            if machine is not None and machine.end == "eos":
                return machine
        return None

    def again(self) -> Machine | None:
        """A right answer, one press, and the same again."""
        whole = self.expert.gold
        for press in self.presses:
            machine = self.play([*whole[:-1], press])
            again = machine and self.play([*whole[:-1], press, *whole[len(machine.visible) :]])
            if again:
                return again
        return None

    def wrongly(self) -> tuple[Machine | None, Machine | None, Machine | None]:
        """A wrong answer typed at once, with a correction on the way, and in the place of a right one: the same text
        in all three where some text allows that, so that nothing but the way to it differs."""
        best: tuple[Machine | None, Machine | None, Machine | None] = (None, None, None)
        for path in self._wrong_paths():
            plain = self.play(path)
            if plain is None or plain.end != "eos" or self._is_right(plain):
                continue
            mended = (self._mended(path, depth, 1) for depth in range(len(path)))
            found = (plain, next((m for m in mended if m is not None), None), self._spoiled(path))
            if best[0] is None or (best.count(None) > found.count(None)):
                best = found
            if None not in best:
                break
        return best

    def _wrong_paths(self) -> Iterator[list[int]]:
        """The right answer with one other token, the last places first, or with one more; some of them are right."""
        gold = self.expert.gold
        for depth in reversed(range(len(gold) - 1)):
            for token in self.teacher.alphabet[:TRIES]:
                if token != gold[depth]:
                    yield [*gold[:depth], token, *gold[depth + 1 :]]
        for token in self.teacher.alphabet[:TRIES]:
            yield [*gold[:-1], token, gold[-1]]

    def _spoiled(self, path: list[int]) -> Machine | None:
        """A right answer, deletes, and the rest of another one."""
        for press in self.presses:
            for count in range(1, len(self.expert.gold)):
                begun = [*self.expert.gold[:-1], *[press] * count]
                machine = self.play(begun)
                if machine is None:
                    break
                if machine.visible == path[: len(machine.visible)]:
                    spoiled = self.play([*begun, *path[len(machine.visible) :]])
                    if spoiled is not None and spoiled.end == "eos":
                        return spoiled
        return None

    def farm(self) -> Machine | None:
        """Err, delete, err, delete, with ever new errors where the old ones are banned, until the budget ends."""
        machine = Machine(self.teacher.rules, self.teacher.budget)
        fixed = {*self.teacher.rules.eos, *self.teacher.rules.deletes}
        while machine.end is None:
            illegal = set(machine.illegal())
            move = next((press for press in self.presses if press not in illegal), None)
            if move is None:
                tokens = itertools.chain(self.teacher.alphabet, range(self.vocabulary))
                wrong = (t for t in tokens if t not in illegal and t not in fixed and not self.expert.alive([t]))
                move = next(wrong, None)
            if move is None:
                return None
            machine.step(move)
        return machine if machine.deleted > 1 else None

    def _is_right(self, machine: Machine) -> bool:
        return self.teacher.task.correct(self.expert.row, self.teacher.text(machine.answer))

    def emptied(self) -> Machine | None:
        """As much of a right answer as can be taken back, all of it deleted, and the end."""
        most = self.teacher.budget.most_actions
        for typed in range(min(len(self.expert.gold) - 1, (most - 1) // 2), 0, -1):
            for press in self.presses:
                machine = self.play(self.expert.gold[:typed])
                while machine is not None and machine.visible and not machine.end and press not in machine.illegal():
                    machine.step(press)
                if machine is not None and not machine.visible and not machine.end:
                    machine.step(self.teacher.eos)
                    return machine
        return None

    def loop(self) -> Machine | None:
        """Type and delete the same in turns until the budget ends it; where that is banned, search without an end."""
        rules, budget, alphabet = self.teacher.rules, self.teacher.budget, self.teacher.alphabet
        machine = Machine(rules, budget)
        while machine.end is None:
            illegal = set(machine.illegal())
            again = [*self.expert.gold[len(machine.visible) : -1][:1], *alphabet]
            types = [token for token in again if token not in illegal and len(machine.visible) + 1 < budget.answer]
            presses = [press for press in self.presses if press not in illegal]
            turn = rules.retry == "free" and bool(machine.visible) and machine.trace[-1] not in rules.deletes
            moves = [*presses, *types] if turn else [*types, *presses]
            if not moves:  # the budget's last action, which may end the answer's room too
                moves = [token for token in again if token not in illegal]
            if not moves:
                return None
            machine.step(moves[0])
        return machine if machine.deleted else None

    def cut(self) -> Machine | None:
        """On and on after a right answer, until it is as long as it may be."""
        machine = self.play(self.expert.gold[:-1])
        while machine is not None and machine.end is None:
            token = next((token for token in self.teacher.alphabet if token not in machine.illegal()), None)
            if token is None:
                return None
            machine.step(token)
        return machine
