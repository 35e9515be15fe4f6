from __future__ import annotations

import asyncio
import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.rewards import think_format_reward

from rl_backspace.config import Reward
from rl_backspace.errors import UserError
from rl_backspace.plugins import resolve
from rl_backspace.rewards.correctness import checked, exact, numeric
from rl_backspace.rewards.delete_cost import flat
from rl_backspace.rewards.loop_penalty import repeats
from rl_backspace.semantics import Rules
from rl_backspace.tasks import Row, Task, signs
from rl_backspace.terms import INPUTS, Term, load_terms

EOS, BACK, CLEAR = 1, 90, 91
RULES = Rules({BACK: "token", CLEAR: "answer"}, frozenset([EOS]))
TASK = Task([{"prompt": "p", "answer": "a", "level": 1}] * 3, [{"prompt": "q", "answer": "b", "level": 2}])


def terms(task: Task = TASK, **rewards: Reward) -> tuple[list[Term], list[float]]:
    return load_terms(rewards, task, RULES)


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
    assert numeric(texts, answers, ends, tolerance=1) == [1, 1, 1, 0, 0, None]


def test_checked_takes_any_answer_that_the_task_does() -> None:
    task = signs(count=2, train=5, test=1)
    row = {"prompt": "3 3=0:", "answer": "+-", "numbers": [3, 3], "target": 0}
    got = checked(["+-", "-+", "++", "+-"], task, [row] * 4, ["eos", "eos", "eos", "length"])
    assert got == [1, 1, 0, 0]


@pytest.mark.parametrize("function", [exact, numeric])
def test_chat_completions_are_read_by_their_text(function: Any) -> None:
    chat = [[{"role": "assistant", "content": "7"}], [{"role": "assistant", "content": "8"}]]
    assert function(chat, ["7", "7"], ["eos", "eos"]) == [1, 0]


# delete cost


def state(step: int, steps: int = 100) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=steps)


def test_the_price_rises_from_nothing_and_stays() -> None:
    prices = [-flat([1], state(step), cost=0.2, rise=0.5)[0] for step in range(101)]
    assert prices[0] == 0
    assert prices[25] == pytest.approx(0.1)
    assert all(later >= earlier for earlier, later in itertools.pairwise(prices))
    assert prices[50:] == [pytest.approx(0.2)] * 51


@pytest.mark.parametrize("when", [None, state(0, 0)])
def test_outside_training_the_price_is_full(when: Any) -> None:
    assert flat([0, 1, 3], when, cost=0.2) == [0, pytest.approx(-0.2), pytest.approx(-0.6)]


def test_without_a_rise_the_price_is_full_from_the_start() -> None:
    assert flat([2], state(0), cost=0.5, rise=0) == [-1]


# loops


@pytest.mark.parametrize(
    ("trace", "again"),
    [
        ([], 0),
        ([5, 5, 5, EOS], 0),  # repetition in the text is no loop
        ([5, BACK, 6, EOS], 0),  # a correction
        ([5, BACK, 5, EOS], 1),
        ([5, BACK, 5, BACK, 5, EOS], 2),
        ([5, BACK, 6, BACK, 5, BACK, 6, EOS], 2),  # a longer circle
        ([5, 6, BACK, BACK, 5, 6, EOS], 2),  # each token of it
        ([5, 6, BACK, BACK, 6, 5, EOS], 0),
        ([5, 6, CLEAR, 5, 7, EOS], 1),  # the right start had to be typed again
        ([5, 6, BACK, 7, BACK, BACK, 8, 6, EOS], 0),  # 6 after 8 is another place than 6 after 5
    ],
)
def test_a_loop_pays_for_each_state_typed_again(trace: list[int], again: int) -> None:
    assert repeats([trace, [5]], RULES, penalty=0.5) == [-0.5 * again, 0]


def test_keeping_or_hinting_counts_the_same_loops() -> None:
    trace = [5, 6, BACK, 6, EOS]
    for memory in ("erase", "keep", "hint"):
        assert repeats([trace], Rules({BACK: "token"}, frozenset([EOS]), memory), penalty=1) == [-1]


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
