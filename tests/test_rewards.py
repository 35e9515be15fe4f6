from __future__ import annotations

import asyncio
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import Naive
from trl.rewards import think_format_reward

from rl_backspace import rewards as bundled
from rl_backspace.config import Reward
from rl_backspace.errors import UserError
from rl_backspace.plugins import resolve
from rl_backspace.rewards.correctness import checked, exact, numeric
from rl_backspace.rewards.delete_cost import flat, per_token, progressive
from rl_backspace.rewards.ending import empty, unfinished
from rl_backspace.rewards.improvement import bonus
from rl_backspace.rewards.length import actions as per_action
from rl_backspace.rewards.length import over
from rl_backspace.rewards.loop_penalty import oscillations, repeats, states
from rl_backspace.rewards.shaping import progress
from rl_backspace.semantics import Budget, Rules
from rl_backspace.tasks import Row, Task, signs
from rl_backspace.terms import INPUTS, Term, load_terms

EOS, BACK, CLEAR = 1, 90, 91
RULES = Rules({BACK: "token", CLEAR: "answer"}, frozenset([EOS]))
TASK = Task([{"prompt": "p", "answer": "a", "level": 1}] * 3, [{"prompt": "q", "answer": "b", "level": 2}])


def terms(task: Task = TASK, **rewards: Reward) -> tuple[list[Term], list[float]]:
    policy: Any = SimpleNamespace(rules=RULES, text=letters)
    return load_terms(rewards, task, policy)


def term(fn: str, task: Task = TASK, **kwargs: Any) -> Term:
    """One loaded function, called `it` in the experiment file."""
    return terms(task, it=Reward(fn=fn, kwargs=kwargs))[0][0]


def call(term: Term, completions: list[Any], **columns: Any) -> Any:
    """As TRL calls it; a coroutine is awaited."""
    result = term(
        prompts=["p"] * len(completions), completions=completions, completion_ids=[[5]] * len(completions), **columns
    )
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(value: Any) -> Any:
    return await value


def plugin(folder: Path, body: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(body)
    return path


# correctness


def test_exact_wants_a_finished_answer_that_equals_the_reference() -> None:
    texts = ["12", " 12\n", "12", "1 2", "", "12"]
    ends = ["eos", "eos", "length", "eos", "eos", "budget"]
    assert exact(texts, ["12"] * 6, ends) == [1, 1, 0, 0, 0, 0]


def test_numeric_compares_numbers() -> None:
    texts = ["1,234", "1234.0", "1235", "x", "1234", "1234"]
    ends = ["eos"] * 4 + ["length", "eos"]
    answers = ["1234"] * 5 + ["no number"]
    assert numeric(texts, answers, ends) == [1, 1, 0, 0, 0, None]
    assert numeric(["1.3", "1.6"], ["1", "1"], ["eos"] * 2, tolerance=0.3) == [1, 0]
    assert numeric(texts, answers, ends, tolerance=1) == [1, 1, 1, 0, 0, None]


def test_numeric_is_exact_and_survives_any_number() -> None:
    long = "9" * 400
    texts = [long, f"{long[:-1]}8", "0.30", "1e999999", "-9e999999", "nan", "inf", "1" * 5000, "7"]
    answers = [long, long, ".3", "1e999999", "9e999999", "1", "1", "1", "inf"]
    assert numeric(texts, answers, ["eos"] * 9) == [1, 0, 1, 1, 0, 0, 0, 0, None]
    assert numeric(["1.1"], ["1"], ["eos"], tolerance=0.1) == [1]


def test_checked_takes_any_answer_that_the_task_does() -> None:
    task = signs(count=2, train=5, test=1)
    row = {"prompt": "3 3=0:", "answer": "+-", "numbers": [3, 3], "target": 0}
    got = checked(["+-", "-+", "++", "+-"], task, [row] * 4, ["eos", "eos", "eos", "length"])
    assert got == [1, 1, 0, 0]


@pytest.mark.parametrize("function", [exact, numeric])
def test_chat_completions_are_read_by_their_text(function: Any) -> None:
    chat = [[{"role": "assistant", "content": "7"}], [{"role": "assistant", "content": "8"}]]
    assert function(chat, ["7", "7"], ["eos", "eos"]) == [1, 0]


# what rewards see of a trace

A, B, LINE = 5, 6, 7
MEMORIES: tuple[Any, ...] = ("erase", "keep", "hint")


def letters(ids: Sequence[int]) -> str:
    """A reads as `a`, B as `b`, the end as nothing."""
    return "".join(chr(92 + index) for index in ids if index > EOS)


@st.composite
def traces(draw: st.DrawFn, retry: Any = None, rules: Rules | None = None) -> tuple[list[int], Rules]:
    """Few tokens and many deletes, so that the trace comes back to where it was."""
    if rules is None:
        units: list[Any] = draw(
            st.lists(st.sampled_from(["token", "token", "line", "answer", 2]), min_size=1, max_size=2)
        )
        rules = Rules(
            dict(enumerate(units, BACK)),
            frozenset([EOS]),
            draw(st.sampled_from(MEMORIES)),
            retry or draw(st.sampled_from(["free", "ban"])),
            frozenset([LINE]),
        )
    naive = Naive(rules, Budget(99, 99))
    for choice in draw(st.lists(st.integers(0, 59), max_size=25)):
        legal = [a for a in (A, B, LINE, *rules.deletes, *rules.deletes) if a not in naive.forbidden()]
        if legal:
            naive.press(legal[choice % len(legal)])
    if draw(st.booleans()):
        naive.press(EOS)
    return naive.history, rules


def told(trace: Sequence[int], rules: Rules) -> list[list[int]]:
    """What is visible at the start and after each action, as the naive machine tells it."""
    naive, out = Naive(rules, Budget(99, 99)), [[]]
    for action in trace:
        naive.press(action)
        out.append(list(naive.cells))
    return out


# delete cost


def state(step: int, steps: int = 100) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=steps)


@pytest.mark.parametrize("function", [flat, per_token, progressive])
def test_every_price_rises_from_nothing_and_stays(function: Any) -> None:
    def price(when: Any, **settings: Any) -> float:
        (values,) = function([[A, BACK, B, EOS]], RULES, when, cost=0.08, **settings)
        assert values[0] == values[2] == values[3] == 0
        return -values[1]

    prices = [price(state(step), rise=0.5) for step in range(101)]
    assert prices[0] == 0
    assert prices[25] == pytest.approx(0.04)
    assert all(later >= earlier for earlier, later in itertools.pairwise(prices))
    assert prices[50:] == [pytest.approx(0.08)] * 51
    assert price(state(0), rise=0) == 0.08  # from the start
    assert price(None) == price(state(0, 0)) == 0.08  # outside training


def test_a_flat_price_stands_at_each_press() -> None:
    traces = [[A, BACK, B, B, CLEAR, EOS], [A, EOS], []]
    assert flat(traces, RULES, cost=0.2) == [[0, -0.2, 0, 0, -0.2, 0], [0, 0], []]


@settings(max_examples=150, deadline=None)
@given(traces())
def test_a_price_per_token_is_paid_for_all_that_is_gone_in_the_end(game: tuple[list[int], Rules]) -> None:
    trace, rules = game
    (values,), (presses,) = per_token([trace], rules, cost=1), flat([trace], rules, cost=1)
    typed = sum(action not in rules.deletes for action in trace)
    assert sum(values) == len(told(trace, rules)[-1]) - typed
    assert all(one <= press and (one < 0) == (press < 0) for one, press in zip(values, presses, strict=True))


@settings(max_examples=100, deadline=None)
@given(traces(), st.floats(1, 3), st.floats(0.01, 5))
def test_a_progressive_price_grows_with_the_presses_up_to_the_most(
    game: tuple[list[int], Rules], growth: float, most: float
) -> None:
    trace, rules = game
    (values,) = progressive([trace], rules, cost=0.01, growth=growth, most=most)
    paid = [value for value, action in zip(values, trace, strict=True) if action in rules.deletes]
    assert paid == [pytest.approx(-min(most, 0.01 * growth**k)) for k in range(len(paid))]
    assert sum(paid) == sum(values)
    assert progressive([trace], rules, cost=0.01, growth=1, most=most) == flat([trace], rules, cost=0.01)


def test_the_price_of_a_search_without_end_is_a_number() -> None:
    (values,) = progressive([[A, BACK] * 5000], RULES, cost=0.01, growth=2, most=0.5)
    assert values[-1] == -0.5


# loops

LOOPS = [  # trace, then how often repeats, oscillations and states pay
    ([], 0, 0, 0),
    ([5, 5, 5, EOS], 0, 0, 0),  # repetition in the text is no loop
    ([5, BACK, 6, EOS], 0, 0, 0),  # a correction
    ([5, BACK, 5, EOS], 1, 0, 0),
    ([5, BACK, 5, BACK, 5, EOS], 2, 0, 2),
    ([5, BACK, 6, BACK, 7, EOS], 0, 0, 1),  # the third try at a place
    ([5, BACK, 6, BACK, 5, BACK, 6, EOS], 2, 1, 2),  # a longer circle
    ([5, 6, BACK, BACK, 5, 6, EOS], 2, 0, 1),  # each token of it; 6 after 5 was not come back to
    ([5, 6, BACK, BACK, 6, 5, EOS], 0, 0, 0),
    ([5, 6, CLEAR, 5, 7, EOS], 1, 0, 0),  # the right start had to be typed again
    ([5, 6, BACK, 7, BACK, BACK, 8, 6, EOS], 0, 0, 1),  # 6 after 8 is another place than 6 after 5
    ([5, 6, BACK, 7, 8, BACK, 9, 5, BACK, EOS], 0, 1, 0),
]


@pytest.mark.parametrize(("trace", "again", "turns", "loops"), LOOPS)
def test_loops_and_what_they_pay(trace: list[int], again: int, turns: int, loops: int) -> None:
    for function, count in ((repeats, again), (oscillations, turns), (states, loops)):
        assert [sum(values) for values in function([trace, [5]], RULES, penalty=0.5)] == [-0.5 * count, 0]


@settings(max_examples=300, deadline=None)
@given(traces(), st.integers(0, 4))
def test_loop_penalties_stand_where_their_definitions_say(game: tuple[list[int], Rules], free: int) -> None:
    trace, rules = game
    seen = told(trace, rules)
    typed = [action not in rules.deletes for action in trace]
    again = [typed[t] and seen[t + 1] in seen[: t + 1] for t in range(len(trace))]
    often = [seen[: t + 1].count(seen[t + 1]) >= free for t in range(len(trace))]
    runs = [list(run) for press, run in itertools.groupby(range(len(trace)), lambda t: not typed[t]) if press]
    turns = [t in [run[0] for run in runs[free:]] for t in range(len(trace))]
    assert repeats([trace], rules, penalty=1) == [[-due for due in again]]
    assert states([trace], rules, penalty=1, free=free) == [[-due for due in often]]
    assert oscillations([trace], rules, penalty=1, free=free) == [[-due for due in turns]]


@settings(max_examples=300, deadline=None)
@given(traces())
def test_how_loop_penalties_relate(game: tuple[list[int], Rules]) -> None:
    trace, rules = game

    def count(function: Any, **settings: Any) -> float:
        return -sum(function([trace], rules, **settings)[0])

    presses, gone = count(flat, cost=1), count(per_token, cost=1)
    again, loops = count(repeats, penalty=1), count(states, penalty=1)
    assert again <= gone
    assert count(oscillations, penalty=1) <= max(0, presses - 2)
    assert loops <= again + presses == count(states, penalty=1, free=1)
    if rules.retry == "ban":
        came_back = [tuple(v) for a, v in zip(trace, told(trace, rules)[1:], strict=True) if a in rules.deletes]
        assert again == 0
        assert loops == presses - len(set(came_back))


@settings(max_examples=50, deadline=None)
@given(traces(retry="ban"))  # legal under free as well
def test_memory_and_retry_do_not_matter_to_a_trace(game: tuple[list[int], Rules]) -> None:
    trace, rules = game
    for memory, retry, function in itertools.product(MEMORIES, ("free", "ban"), (repeats, oscillations, states)):
        other = Rules(rules.deletes, rules.eos, memory, retry, rules.boundaries)
        assert function([trace], other) == function([trace], rules)


# ending and length


def test_only_an_answer_that_ends_itself_is_finished() -> None:
    assert unfinished(["eos", "length", "budget", "stuck"], penalty=0.5) == [0, -0.5, -0.5, -0.5]


def test_an_answer_is_empty_where_nothing_but_its_end_is_visible() -> None:
    assert empty([[], [EOS], [A], [A, EOS]], RULES, penalty=0.5) == [-0.5, -0.5, 0, 0]


def test_length_counts_visible_tokens_beyond_the_limit_but_not_the_end() -> None:
    visible = [[], [EOS], [A, A], [A, A, EOS], [A, A, A], [A, A, A, A, EOS]]
    assert over(visible, RULES, limit=2, cost=0.5) == [0, 0, 0, 0, -0.5, -1]


def test_each_action_has_its_price() -> None:
    assert per_action([[A, BACK, B, EOS], []], cost=0.5) == [[-0.5] * 4, []]


# shaping and improvement


def dice(row: Row, text: str) -> bool:
    """Alive or not by no rule at all."""
    return (len(text) * 7 + sum(map(ord, text)) * row["salt"]) % 3 > 0


@settings(max_examples=200, deadline=None)
@given(traces(), st.integers(0, 5), st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from([0.1, 2.0]))
def test_shaping_sums_to_what_the_prompt_says(
    game: tuple[list[int], Rules], salt: int, gamma: float, scale: float
) -> None:
    trace, rules = game
    for alive in (dice, lambda row, text: not dice(row, text)):
        task = Task(TASK.train, TASK.test, alive=alive)
        row = {"salt": salt}
        (values,) = progress([trace], rules, [row], task, letters, scale=scale, gamma=gamma)
        total = sum(gamma**step * value for step, value in enumerate(values))
        assert total == pytest.approx(-scale * alive(row, "") if trace else 0)
        assert all(-scale <= value <= gamma * scale for value in values)


AB = Task(TASK.train, TASK.test, correct=lambda row, text: text == "ab", alive=lambda row, text: "ab".startswith(text))


def test_shaping_stands_at_the_error_and_at_the_delete_that_leads_out_of_it() -> None:
    trace = [A, A, B, BACK, BACK, B, EOS]
    assert progress([trace], RULES, [{}], AB, letters, scale=0.5) == [[0, -0.5, 0, 0, 0.5, 0, -0.5]]
    assert progress([[], [B]], RULES, [{}, {}], AB, letters, scale=0.5) == [[], [-0.5]]


@pytest.mark.parametrize("function", [progress, bonus])
def test_the_task_is_asked_once_for_each_prompt_and_visible_sequence(function: Any) -> None:
    asked = []

    def alive(row: Row, text: str) -> bool:
        asked.append((row["name"], text))
        return "ab".startswith(text)

    rows = [{"name": name} for name in "xy"]
    trace = [A, A, BACK, A, BACK, B, EOS]
    task = Task(TASK.train, TASK.test, alive=alive)
    got = function([trace] * 4, RULES, [rows[0], rows[1]] * 2, task, letters)
    assert got[0] == got[1] == got[2] == got[3]
    assert len(asked) == len(set(asked)) and {name for name, _ in asked} == {"x", "y"}


def whole_traces(rules: Rules, budget: Budget, start: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Every trace from A, B, the delete token and the end that the budget lets come to one; whether it ended itself."""
    naive = Naive(rules, budget)
    for action in start:
        naive.press(action)
    if naive.over():
        yield start, start[-1] == EOS
        return
    for action in {A, B, BACK, EOS} - naive.forbidden():
        yield from whole_traces(rules, budget, (*start, action))


def best_actions(
    traces: Sequence[tuple[int, ...]], rewards: Sequence[Sequence[float]], gamma: float
) -> dict[tuple[int, ...], set[int]]:
    """In each state that one can get into, the actions that the best trace from there on may begin with."""
    values: dict[tuple[int, ...], dict[int, float]] = {}
    for trace, paid in zip(traces, rewards, strict=True):
        rest = 0.0
        for step in reversed(range(len(trace))):
            rest = paid[step] + gamma * rest
            here = values.setdefault(trace[:step], {})
            here[trace[step]] = max(rest, here.get(trace[step], rest))
    return {
        state: {action for action, value in of.items() if value > max(of.values()) - 1e-9}
        for state, of in values.items()
    }


@pytest.mark.parametrize("retry", ["free", "ban"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_changes_no_best_action_in_any_state_and_the_bonus_does(gamma: float, retry: Any) -> None:
    rules = Rules({BACK: "token"}, frozenset([EOS]), retry=retry)
    traces, ended = zip(*whole_traces(rules, Budget(answer=3, actions=6)), strict=True)
    rows = [{"prompt": "p"}] * len(traces)
    right = checked(
        [letters(told(trace, rules)[-1]) for trace in traces], AB, rows, ["eos" if end else "length" for end in ended]
    )
    costs = flat(traces, rules, cost=0.05)
    plain = [[*cost[:-1], cost[-1] + last] for cost, last in zip(costs, right, strict=True)]

    def plus(other: list[list[float]]) -> dict[tuple[int, ...], set[int]]:
        added = [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(plain, other, strict=True)]
        return best_actions(traces, added, gamma)

    best = best_actions(traces, plain, gamma)
    assert best[()] == {A} and best[(A,)] == {B} and best[(A, B)] == {EOS} and best[(B,)] == {BACK}
    assert plus(progress(traces, rules, rows, AB, letters, scale=10, gamma=gamma)) == best
    assert plus(bonus(traces, rules, rows, AB, letters, bonus=1))[(A,)] == {A}  # an error, to take it back


def test_the_bonus_is_paid_for_errors_made_on_purpose() -> None:
    honest, mended, farming = [A, B, EOS], [A, A, A, BACK, BACK, B, EOS], [*[B, BACK] * 3, A, B, EOS]
    paid = bonus([honest, mended, farming], RULES, [{}] * 3, AB, letters, bonus=0.5)
    assert paid == [[0] * 3, [0, 0, 0, 0, 0.5, 0, 0], [0, 0.5] * 3 + [0] * 3]


@settings(max_examples=200, deadline=None)
@given(traces(rules=RULES), st.integers(0, 30), st.sampled_from([A, B, LINE]), st.integers(0, 5))
def test_nothing_else_pays_for_an_error_that_is_taken_back(
    game: tuple[list[int], Rules], place: int, error: int, salt: int
) -> None:
    """What is visible in the end is the same, so only what is paid on the way can differ."""
    trace, rules = game
    place = min(place, len(trace) - (EOS in trace))
    longer = [*trace[:place], error, BACK, *trace[place:]]
    assert told(longer, rules)[-1] == told(trace, rules)[-1]
    on_the_way: list[Callable[..., Any]] = [flat, per_token, progressive, repeats, oscillations, states]
    for function in on_the_way:
        without, with_it = map(sum, function([trace, longer], rules))
        assert with_it <= without + 1e-12, function
    without, with_it = map(sum, per_action([trace, longer]))
    assert with_it < without
    if trace:
        task = Task(TASK.train, TASK.test, alive=dice)
        without, with_it = map(sum, progress([trace, longer], rules, [{"salt": salt}] * 2, task, letters))
        assert with_it == pytest.approx(without)


# the bundled ones, all of them


def bundled_rewards() -> dict[str, Any]:
    """Every public function of the package, by the name that YAML gives it."""
    names = [module.name for module in pkgutil.iter_modules(bundled.__path__) if not module.name.startswith("_")]
    modules = {name: import_module(f"{bundled.__name__}.{name}") for name in names}
    return {
        f"{name}:{function}": value
        for name, module in modules.items()
        for function, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not function.startswith("_")
    }


@pytest.mark.parametrize("fn", bundled_rewards())
def test_what_bundled_rewards_take_can_be_written_in_yaml(fn: str) -> None:
    function = bundled_rewards()[fn]
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty and name != "trainer_state":
            assert hints[name] in (int, float)
            with pytest.raises(UserError, match=f"^rewards.it.kwargs.{name}: expected"):
                term(fn, **{name: "much"})


@pytest.mark.parametrize("fn", bundled_rewards())
def test_bundled_rewards_give_each_row_a_number_or_each_action_one(fn: str) -> None:
    traces = [[A, BACK, A, B, EOS], [B, CLEAR, B, B], []]
    rows = [{**TASK.train[0], "answer": "ab"}] * 3
    inputs: dict[str, Any] = {
        "prompts": ["p"] * 3,
        "completions": [letters(told(trace, RULES)[-1]) for trace in traces],
        "completion_ids": [told(trace, RULES)[-1] for trace in traces],
        "trainer_state": state(100),
        "actions": traces,
        "deletes": [1, 1, 0],
        "ends": ["eos", "length", "stuck"],
        "rows": rows,
        "answer": ["ab"] * 3,
        "level": [1] * 3,
    }
    task = Task(TASK.train, TASK.test, AB.correct, AB.alive)
    values = bundled_rewards()[fn](**inputs, rules=RULES, task=task, decode=letters)
    wide = [value for value in values if isinstance(value, list)]
    assert not wide or [len(value) for value in wide] == [5, 4, 0]
    sums = [sum(value) if isinstance(value, list) else value for value in values]
    assert term(fn, task)(**inputs) == sums  # as a trainer calls it


# the protocol


def test_a_function_gets_what_it_asks_for_by_name(tmp_path: Path) -> None:
    path = plugin(
        tmp_path,
        "def reward(completions, level, deletes, rules, task, size, base=0):\n"
        "    assert rules.retry == 'free' and task.train\n"
        "    return [base + size * len(c) + l - d for c, l, d in zip(completions, level, deletes)]\n",
    )
    loaded = term(f"{path}:reward", size=10)
    assert loaded.__name__ == "it"
    assert call(loaded, ["a", "bb"], level=[1, 2], deletes=[0, 5], ends=["eos"] * 2, rows=[{}] * 2) == [11, 17]


def test_one_that_takes_everything_gets_everything(tmp_path: Path) -> None:
    path = plugin(tmp_path, "def reward(**seen):\n    reward.seen = seen\n    return [0.0]\n")
    call(term(f"{path}:reward"), ["a"], level=[1], actions=[[5]], trainer_state=None)
    seen = resolve(f"{path}:reward", "here").seen  # type: ignore[attr-defined]
    assert {"prompts", "completions", "completion_ids", "level", "actions", "task", "rules"} <= set(seen)


def test_async_functions_and_callable_objects(tmp_path: Path) -> None:
    path = plugin(
        tmp_path,
        "import asyncio\n"
        "async def later(completions, **_):\n    await asyncio.sleep(0)\n    return [2.0 for _ in completions]\n"
        "class Judge:\n"
        "    def __call__(self, completions, scale=1):\n        return [scale] * len(completions)\n"
        "class Slow(Judge):\n"
        "    async def __call__(self, completions):\n        return [None] * len(completions)\n"
        "judge, slow = Judge(), Slow()\n",
    )
    assert call(term(f"{path}:later"), ["a", "b"]) == [2, 2]
    assert call(term(f"{path}:judge", scale=3), ["a", "b"]) == [3, 3]
    assert call(term(f"{path}:slow"), ["a", "b"]) == [None, None]
    # TRL runs coroutine functions side by side, so it must see which terms are
    assert inspect.iscoroutinefunction(term(f"{path}:later")) and inspect.iscoroutinefunction(term(f"{path}:slow"))
    assert not inspect.iscoroutinefunction(term(f"{path}:judge"))


def test_an_async_reward_has_one_event_loop_wherever_it_is_called(tmp_path: Path) -> None:
    """What is bound to a loop at its first use, such as a semaphore, works in the checks and in training."""
    path = plugin(
        tmp_path,
        "import asyncio\ngate = asyncio.Semaphore(1)\n"
        "async def one():\n    async with gate:\n        await asyncio.sleep(0.001)\n        return 1.0\n"
        "async def judge(completions):\n    return await asyncio.gather(*(one() for _ in completions))\n",
    )
    judge = term(f"{path}:judge")
    for _ in range(3):
        assert call(judge, ["a", "b", "c"]) == [1, 1, 1]


def test_a_reward_that_leaves_is_named(tmp_path: Path) -> None:
    path = plugin(tmp_path, "import sys\ndef leave(completions):\n    sys.exit(3)\n")
    with pytest.raises(UserError, match=r"rewards\.it: .*mine\.py:leave raised SystemExit: 3"):
        call(term(f"{path}:leave"), ["a"])
    path = plugin(tmp_path, "import sys\nsys.exit()\n", "script.py")
    with pytest.raises(UserError, match=r"script\.py:main' cannot be imported: SystemExit"):
        term(f"{path}:main")


def test_a_setting_cannot_take_the_place_of_what_the_run_gives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewards\.it\.kwargs\.task: every reward gets that from the run"):
        terms(it=Reward(fn="correctness:checked", kwargs={"task": 3}))


def test_arrays_are_rewards_per_action_too(tmp_path: Path) -> None:
    path = plugin(tmp_path, "import numpy\ndef each(actions):\n    return [numpy.ones(len(a)) / 2 for a in actions]\n")
    assert call(term(f"{path}:each"), ["a", "b"], actions=[[5, 6], [7]]) == [1.0, 0.5]


def test_trls_own_rewards_work_unchanged() -> None:
    loaded = term("trl.rewards:think_format_reward")
    texts = ["<think>so</think>7", "7", "<think>7", "<think>\na\n</think>\nb", "<think></think></think>"]
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    got = call(loaded, chat, deletes=[0] * 5, ends=["eos"] * 5, trainer_state=None)
    assert got == think_format_reward(chat)
    assert set(got) == {0.0, 1.0}


@pytest.mark.parametrize("values", [torch.tensor([1.0, 0.5]), (1, 0.5), [True, 0.5], iter([1.0, 0.5])])
def test_numbers_of_any_kind_become_floats(values: Any, tmp_path: Path) -> None:
    path = plugin(tmp_path, "def reward(completions, level):\n    return level\n")
    got = call(term(f"{path}:reward"), ["a", "b"], level=values)
    assert got == [1.0, 0.5] and all(type(value) is float for value in got)


def test_weights_come_in_the_files_order_and_zero_is_a_metric() -> None:
    loaded, weights = terms(
        right=Reward(fn="correctness:exact", weight=2), shape=Reward(fn="trl.rewards:think_format_reward", weight=0)
    )
    assert [term.__name__ for term in loaded] == ["right", "shape"] and weights == [2, 0]


def test_a_list_per_action_counts_as_its_sum(tmp_path: Path) -> None:
    path = plugin(tmp_path, "def reward(actions):\n    return [[0.5] * len(actions[0]), 2, None]\n")
    assert call(term(f"{path}:reward"), ["a"] * 3, actions=[[5, 6, EOS], [5], [5]]) == [1.5, 2, None]


# what is wrong is named


BROKEN = {
    "raise ValueError('no\\n  model')": "raised ValueError: no model",
    "raise KeyError": "raised KeyError",
    "return completions[9]": "raised IndexError",
    "return [1.0]": "returned 1 rewards for 2 completions",
    "return []": "returned 0 rewards for 2 completions",
    "return None": "returned a NoneType; expected a list of numbers",
    "return 1.0": "returned a float; expected a list of numbers",
    "return [1.0, float('nan')]": "returned nan for row 1",
    "return [float('-inf'), 1.0]": "returned -inf for row 0",
    "return ['1.0', 1.0]": "returned '1.0' for row 0",
    "return 'ab'": "returned 'a' for row 0",
    "return [1.0, [2.0]]": "returned [2.0] for row 1",
    "return [1.0, 1j]": "returned 1j for row 1",
}


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(("body", "said"), BROKEN.items())
def test_a_bad_result_names_reward_file_and_value(body: str, said: str, kind: str, tmp_path: Path) -> None:
    path = plugin(tmp_path, f"{kind} reward(completions):\n    {body}\n")
    loaded = term(f"{path}:reward")
    with pytest.raises(UserError) as caught:
        call(loaded, ["a", "b"])
    text = str(caught.value)
    assert text.startswith(f"rewards.it: {path}:reward ") and said in text and "\n" not in text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[1.0]", "returned 1 numbers for the 2 actions of row 0"),
        ("[]", "returned 0 numbers for the 2 actions of row 0"),
        ("[1.0, None]", "returned [1.0, None] for row 0"),
        ("[float('nan'), 1.0]", "returned [nan, 1.0] for row 0"),
    ],
)
def test_a_list_must_have_a_number_for_each_action(row: str, said: str, tmp_path: Path) -> None:
    path = plugin(tmp_path, f"def reward(actions):\n    return [{row}]\n")
    with pytest.raises(UserError) as caught:
        call(term(f"{path}:reward"), ["a"], actions=[[5, EOS]])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fn", "kwargs", "said"),
    [
        ("correctness:exat", {}, "rewards.it.fn: 'correctness:exat': correctness has no 'exat'; did you mean 'exact'?"),
        ("correctnes:exact", {}, "rewards.it.fn: 'correctnes:exact' cannot be imported"),
        ("exact", {}, "rewards.it.fn: got 'exact'; expected 'file.py:function'"),
        ("nowhere.py:f", {}, "rewards.it.fn: 'nowhere.py:f': no file nowhere.py"),
        ("delete_cost:flat", {"costs": 1}, "rewards.it.kwargs.costs: unknown;"),
        ("delete_cost:flat", {"cost": "much"}, "rewards.it.kwargs.cost: expected a valid number; got 'much'"),
        ("rl_backspace.semantics:__doc__", {}, "is a str; expected a function"),
        ("builtins:dict", {}, "rewards.it"),
    ],
)
def test_a_function_that_cannot_be_loaded(fn: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        term(fn, **kwargs)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_that_breaks_inside_a_reward_names_itself() -> None:
    def broken(row: Row, text: str) -> bool:
        raise UserError("task: 'correct' of mine.py:make raised KeyError: 'x'")

    with pytest.raises(UserError) as caught:
        call(term("correctness:checked", Task(TASK.train, TASK.test, broken)), ["a"], rows=TASK.train[:1], ends=["eos"])
    assert str(caught.value) == "task: 'correct' of mine.py:make raised KeyError: 'x'"


def test_an_input_that_nobody_gives_is_missed_before_training(tmp_path: Path) -> None:
    path = plugin(tmp_path, "def reward(completions, levle):\n    return [0.0] * len(completions)\n")
    with pytest.raises(UserError, match=r"asks for 'levle', .*did you mean 'level'"):
        term(f"{path}:reward")
    assert call(term(f"{path}:reward", levle=3), ["a"]) == [0]  # unless the file gives it


def test_every_bad_reward_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        terms(
            a=Reward(fn="nowhere.py:f"),
            good=Reward(fn="correctness:exact"),
            b=Reward(fn="delete_cost:flat", kwargs={"cots": 1, "rise": "x"}),
        )
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        *("rewards.a.fn", "rewards.b.kwargs.cots", "rewards.b.kwargs.rise"),
    ]


@pytest.mark.parametrize("column", [*INPUTS, "completion"])
def test_a_column_that_would_hide_what_rewards_get_is_refused(column: str) -> None:
    task = Task([{"prompt": "p", "answer": "a", column: 1}], TASK.test)
    with pytest.raises(UserError, match=f"^task: a column is called '{column}', .*; rename it in your data$"):
        term("correctness:exact", task)


# files


def test_a_file_is_run_once_and_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    body = "loads = []\nloads.append(1)\ndef one(**_): return loads\ndef two(**_): return loads\n"
    path = plugin(tmp_path, body)
    one, two = resolve(f"{path}:one", "here"), resolve(f"{path}:two", "here")
    assert one() is two() and one() == [1]
    (tmp_path / "other").mkdir()
    other = plugin(tmp_path / "other", "def one(**_): return 'other'\n")
    assert resolve(f"{other}:one", "here")() == "other" and resolve(f"{path}:one", "here")() == [1]


def test_a_file_that_failed_is_tried_again(tmp_path: Path) -> None:
    path = plugin(tmp_path, "raise OSError('not yet')\n")
    with pytest.raises(UserError, match="not yet"):
        resolve(f"{path}:f", "here")
    plugin(tmp_path, "def f(): return 1\n")
    assert resolve(f"{path}:f", "here")() == 1


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, "def f(): return 1\n")
    monkeypatch.chdir(tmp_path)
    assert resolve("mine.py:f", "here")() == 1
    assert resolve("./mine.py:f", "here")() == 1
