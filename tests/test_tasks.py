from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pytest

from rl_backspace.errors import UserError
from rl_backspace.plugins import load_task
from rl_backspace.tasks import Row, Task, arithmetic, countdown, data, games, graph, signs, split_of, sudoku, typos
from rl_backspace.tasks.countdown import reachable

MAKERS: dict[str, Callable[..., Task]] = {
    "signs": lambda **kwargs: signs(count=4, train=300, test=60, **kwargs),
    "arithmetic": lambda **kwargs: arithmetic(digits=2, train=300, test=60, **kwargs),
    "countdown": lambda **kwargs: countdown(count=3, train=300, test=60, **kwargs),
    "sudoku": lambda **kwargs: sudoku(givens=5, train=300, test=60, **kwargs),
    "games": lambda **kwargs: games(count=3, train=300, test=60, **kwargs),
    "graph": lambda **kwargs: graph(arms=3, length=3, train=300, test=60, **kwargs),
    "typos": lambda **kwargs: typos(length=5, train=300, test=60, **kwargs),
}


def prompts(rows: list[Row]) -> list[str]:
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_splits_are_full_distinct_and_disjoint_for_all_seeds_together(make: Callable[..., Task]) -> None:
    tasks = [make(seed=seed) for seed in range(3)]
    for task in tasks:
        assert (len(task.train), len(task.test)) == (300, 60)
        assert len({*prompts(task.train), *prompts(task.test)}) == 360
    # a base model trained with one seed must not have seen what another seed tests on
    everything = {split: {p for t in tasks for p in prompts(getattr(t, split))} for split in ("train", "test")}
    assert not everything["train"] & everything["test"]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_seed_gives_the_same_rows_and_another_gives_others(make: Callable[..., Task]) -> None:
    assert make(seed=5).train == make(seed=5).train and make(seed=5).test == make(seed=5).test
    assert make(seed=5).train != make(seed=6).train


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_reference_is_right_and_each_of_its_prefixes_alive(make: Callable[..., Task]) -> None:
    task = make()
    for row in task.train[:100]:
        assert task.correct(row, row["answer"])
        assert all(task.alive(row, row["answer"][:n]) for n in range(len(row["answer"]) + 1))


def test_about_one_prompt_in_ten_is_for_testing() -> None:
    share = sum(split_of(f"prompt {i}") == "test" for i in range(20_000)) / 20_000
    assert 0.09 < share < 0.115


@pytest.mark.parametrize("low", [0, 1])
def test_signs_agree_with_trying_everything(low: int) -> None:
    task = signs(count=4, low=low, high=5, train=40, test=4)
    for row in task.train:
        numbers, target = (part for part in row["prompt"].rstrip(":").split("="))
        values = [int(number) for number in numbers.split()]
        right = {
            "".join(choice)
            for choice in itertools.product("+-", repeat=4)
            if sum(v if s == "+" else -v for s, v in zip(choice, values, strict=True)) == int(target)
        }
        for length in range(6):
            for choice in itertools.product("+-x", repeat=length):
                text = "".join(choice)
                assert task.correct(row, text) == (text in right)
                assert task.alive(row, text) == any(answer.startswith(text) for answer in right)


def test_some_signs_have_several_right_answers() -> None:
    task = signs(count=5, train=200, test=4)
    found = [
        sum(task.correct(row, "".join(choice)) for choice in itertools.product("+-", repeat=5)) for row in task.train
    ]
    assert min(found) == 1 and max(found) > 1


@pytest.mark.parametrize("operations", ["+", "*", "+*"])
def test_arithmetic_is_right(operations: str) -> None:
    task = arithmetic(operations, digits=3, train=400, test=10)
    asked = set()
    for row in task.train:
        sign = "*" if "*" in row["prompt"] else "+"
        left, right = (int(number) for number in row["prompt"].rstrip("=").split(sign))
        value = left + right if sign == "+" else left * right
        assert row["answer"] == str(value)
        assert task.correct(row, f" {value} ") and not task.correct(row, str(value + 1))
        assert not task.alive(row, str(value) + "0") and not task.alive(row, "x")
        asked |= {sign, len(str(left))}
    assert asked == {*operations, 1, 2, 3}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: signs(count=0), "count=0"),
        (lambda: signs(low=5, high=4), "low=5, high=4"),
        (lambda: arithmetic(operations="-"), "operations='-'"),
        (lambda: arithmetic(digits=0), "digits=0"),
        (lambda: arithmetic("+", digits=1, train=200, test=5), "too few distinct prompts"),
        (lambda: countdown(count=2, high=3, train=20, test=1), "too few distinct prompts"),
        (lambda: sudoku(givens=1, train=70, test=1), "too few distinct prompts"),
        (lambda: typos(length=1, train=30, test=1), "too few distinct prompts"),
    ],
)
def test_impossible_arguments_are_refused(call: Callable[[], Task], said: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)


# the puzzles, against versions that spell everything out


def beginnings(texts: set[str]) -> set[str]:
    return {text[:n] for text in texts for n in range(len(text) + 1)}


def slips(text: str, characters: str, rng: random.Random) -> list[str]:
    """Texts that are wrong or nearly so: one character deleted, doubled, put in or put in another's place."""
    at, other = rng.randint(0, len(text)), rng.choice(characters)
    before, after = text[:at], text[at:]
    return [before, before + after[1:], before + other + after, before + other + after[1:], before + other]


def agrees(task: Task, row: Row, right: set[str], texts: set[str]) -> None:
    """The task says of these texts what the list of all right ones says."""
    begun = beginnings(right)
    for text in texts:
        assert task.correct(row, text) == (text in right), (row, text)
        assert task.alive(row, text) == (text in begun), (row, text)


def endings(numbers: list[int], limit: int) -> dict[int, set[str]]:
    """Target -> all texts that lead there: any two numbers, in either order, give way to what they make."""
    if len(numbers) == 1:
        return {numbers[0]: {""}}
    texts: dict[int, set[str]] = defaultdict(set)
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i == j:
                continue
            a, b = numbers[i], numbers[j]
            for sign, made in (
                ("+", Fraction(a + b)),
                ("-", Fraction(a - b)),
                ("*", Fraction(a * b)),
                ("/", Fraction(a, b)),
            ):
                if made in range(1, limit + 1):  # so a fraction of a whole number is no result
                    left = [number for k, number in enumerate(numbers) if k not in (i, j)]
                    for target, rests in endings([*left, int(made)], limit).items():
                        texts[target] |= {f"{a}{sign}{b}={made}," + rest for rest in rests}
    return {target: {text.rstrip(",") for text in found} for target, found in texts.items()}


def asked(prompt: str) -> tuple[list[int], int]:
    numbers, target = prompt.removesuffix(":").split("=")
    return [int(number) for number in numbers.split()], int(target)


@pytest.mark.parametrize(
    ("limit", "numbers"),
    [
        (99, [3, 7]),
        (9, [4, 4]),
        (1, [1, 1, 1]),
        (12, [2, 3, 12]),
        (99, [2, 4, 8]),
        (40, [5, 5, 10]),
        (20, [1, 2, 3, 4]),
    ],
)
def test_countdown_reaches_what_spelling_everything_out_reaches(limit: int, numbers: list[int]) -> None:
    assert reachable(tuple(numbers), limit) == sorted(endings(numbers, limit))


@pytest.mark.parametrize(
    ("count", "high", "limit", "train"), [(2, 12, 50, 40), (3, 10, 10, 40), (3, 12, 99, 40), (4, 6, 24, 10)]
)
def test_countdown_agrees_with_spelling_everything_out(count: int, high: int, limit: int, train: int) -> None:
    rng = random.Random(0)
    task = countdown(count, high=high, limit=limit, train=train, test=1)
    for row in task.train:
        numbers, target = asked(row["prompt"])
        assert len(numbers) == count and 1 <= min(numbers) <= max(numbers) <= high and 1 <= target <= limit
        found = endings(numbers, limit)
        right = found[target]
        assert row["answer"] in right
        elsewhere = [text for other, texts in found.items() if other != target for text in sorted(texts)]
        near = rng.sample(sorted(right), min(len(right), 20)) + rng.sample(elsewhere, min(len(elsewhere), 20))
        wrong = {slip for text in near for slip in slips(text, "0123456789+-*/=, x", rng)}
        zeros = {re.sub(r"\b(\d)", r"0\1", text, count=1) for text in near}
        spaces = {text.replace(",", ", ") for text in near} | {f" {near[0]}", f"{near[0]}\n"}
        commas = {f"{text}," for text in near} | {",", f",{near[0]}", near[0].replace(",", ",,")}
        agrees(task, row, right, {"", "x", *near, *beginnings({near[0]}), *wrong, *zeros, *spaces, *commas})
        hopeless = {**row, "target": min(set(range(1, limit + 2)) - set(found))}
        agrees(task, hopeless, set(), {"", near[0]})


def test_games_are_by_the_rules_and_miss_the_target_where_the_first_step_does() -> None:
    rows = games(train=300, test=1).train
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in countdown(train=300, test=1).train]
    task, hit = countdown(train=1, test=1), 0
    for row in rows:
        first, last = row["answer"].split(",")
        left = Counter(map(str, row["numbers"]))
        for step in (first, last):
            sum_, result = step.split("=")
            a, sign, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", sum_).groups()  # type: ignore[union-attr]
            assert Fraction(eval(f"{a}{sign}{b}")) == int(result)
            left.subtract([a, b])
            assert min(left.values()) >= 0
            left[result] += 1
        assert task.correct(row, row["answer"]) == task.alive(row, first + ",") == (int(result) == row["target"])
        hit += int(result) == row["target"]
    game = games(train=1, test=1)
    assert all(game.alive(row, row["answer"][:length]) for length in range(len(row["answer"]) + 1))
    assert not game.alive(row, row["answer"] + ",") and not game.alive(row, ",") and not game.correct(row, first)
    assert 30 < hit < 200  # most first steps cannot reach it


def test_countdown_asks_for_every_target_that_can_be_reached() -> None:
    pairs = itertools.combinations_with_replacement(range(1, 4), 2)
    expected = {f"{a} {b}={target}:" for a, b in pairs for target in endings([a, b], limit=6)}
    sizes = Counter(split_of(prompt) for prompt in expected)
    task = countdown(2, high=3, limit=6, train=sizes["train"], test=sizes["test"])
    assert {*prompts(task.train), *prompts(task.test)} == expected


@pytest.mark.parametrize(
    ("text", "correct", "alive"),
    [
        ("4+8=12,12*2=24", True, True),
        ("8+4=12,2*12=24", True, True),  # either order
        ("8/4=2,2+2=4", False, False),  # another target, all numbers used
        ("8-2=6,4*6=24", True, True),
        ("8-2=6,", False, True),
        ("8-2=6,4", False, True),
        ("8-2=6,8", False, False),
        ("8-2=6", False, True),
        ("8/2=4,4", False, False),  # 4 and 4 do not make 24
        ("4/8=0", False, False),
        ("8*4=32,32-2=30", False, False),  # 32 is over the limit
        ("8+4=12,12*2=24,", False, False),
        ("8+4=12,8*2=16", False, False),  # 8 is gone
        ("8+8=16,16+4=20", False, False),  # there is one 8
        ("4*4=16,16+8=24", False, False),  # there is one 4
        ("4-4=0", False, False),
        ("8+4=13", False, False),
        ("08+4=12,12*2=24", False, False),
        ("2*12=24", False, False),  # 12 is not there yet
        ("2*4=8,8+8=16", False, False),
    ],
)
def test_countdown_by_hand(text: str, correct: bool, alive: bool) -> None:
    task = countdown(train=1, test=1)
    row = {"numbers": [2, 4, 8], "target": 24, "limit": 30}
    assert (task.correct(row, text), task.alive(row, text)) == (correct, alive)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_countdown_has_an_answer_that_lives(count: int) -> None:
    task = countdown(count, low=3, high=12, limit=30, train=20, test=2)
    for row in task.train + task.test:
        assert task.correct(row, row["answer"]) and row["answer"].count("=") == count - 1
        assert all(task.alive(row, text) for text in beginnings({row["answer"]}))
        assert not task.alive(row, row["answer"] + ",")


def full_grids() -> list[str]:
    """Cell after cell, every digit that no cell before it in the row, the column or the quarter holds."""

    def sees(a: int, b: int) -> bool:
        quarters = [(cell // 8, cell % 4 // 2) for cell in (a, b)]
        return a // 4 == b // 4 or a % 4 == b % 4 or quarters[0] == quarters[1]

    found = [""]
    for cell in range(16):
        taken = [(grid, {grid[other] for other in range(cell) if sees(cell, other)}) for grid in found]
        found = [grid + digit for grid, digits in taken for digit in "1234" if digit not in digits]
    return found


def test_sudoku_accepts_all_grids_that_fit_and_no_others() -> None:
    every = ["/".join((grid[:4], grid[4:8], grid[8:12], grid[12:])) for grid in full_grids()]
    assert len(set(every)) == 288
    rng = random.Random(0)
    several = set()
    for givens in range(1, 16):
        task = sudoku(givens, train=10, test=1)
        for row in task.train:
            puzzle = row["prompt"].removesuffix(":")
            assert sum(character in "1234" for character in puzzle) == givens
            right = {
                text for text in every if all(shown in (".", cell) for shown, cell in zip(puzzle, text, strict=True))
            }
            assert row["answer"] in right
            some = [row["answer"], min(right), max(right), rng.choice(every), puzzle]
            wrong = {slip for text in some for slip in slips(text, "01234./: x", rng)}
            slashes = {change(text) for text in some for change in SLASHES}
            agrees(task, row, right, {*every, *beginnings(set(some)), *wrong, *slashes})
            several.add(len(right) > 1)
    assert several == {True, False}


def test_graph_asks_for_the_one_way_that_its_edges_allow() -> None:
    task, places = graph(arms=3, length=3, train=200, test=10), set()
    for row in [*task.train, *task.test]:
        *edges, query = row["prompt"].removesuffix(":").split(" ")
        middle, goal = query.split(">")
        after: dict[str, list[str]] = defaultdict(list)
        for start, end in edges:
            after[start].append(end)
        assert len(edges) == 9 and len(after[middle]) == 3
        ways = [""]
        for _ in range(3):
            ways = [way + node for way in ways for node in after[way[-1:] or middle]]
        right = {way for way in ways if way.endswith(goal)}
        assert right == {row["answer"]}
        agrees(task, row, right, {*ways, *beginnings(set(ways)), goal, middle + row["answer"]})
        places.add(edges.index(middle + row["answer"][0]))
    assert places == set(range(9))  # nothing in the order of the edges tells the way


SLASHES: list[Callable[[str], str]] = [
    lambda text: text.replace("/", ""),
    lambda text: text.replace("/", "", 1),
    lambda text: text.replace("/", "//", 1),
    lambda text: text.replace("/", "\n"),
    lambda text: text[:3] + "/" + text[3] + text[5:],
    lambda text: f"/{text}",
    lambda text: f"{text}/",
    lambda text: f"{text}:",
]


def best_chance(task: Task, row: Row, letters: str, most: int, text: str = "") -> float:
    """The chance of a right answer for whoever types as well as can be, up to `most` characters, and never deletes.

    The keyboard swaps whatever is typed, a space too, for one of the other letters.
    """
    stop = float(task.correct(row, text))
    if len(text) == most:
        return stop
    then = {typed: best_chance(task, row, letters, most, text + typed) for typed in letters + " "}
    chances = []
    for typed in then:
        others = [then[letter] for letter in letters if letter != typed]
        chances.append((1 - task.typo_rate) * then[typed] + task.typo_rate * sum(others) / len(others))
    return max(stop, *chances)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rate", [0.0, 0.083, 0.5])
def test_the_ceiling_of_typos_is_the_best_chance_without_deleting(length: int, rate: float) -> None:
    task = typos(length, rate, train=5, test=1)
    assert task.typo_rate == rate and task.ceiling == pytest.approx((1 - rate) ** length)
    for row in task.train[:2]:
        letters = "".join(sorted({*row["answer"], *"xyz"}))
        assert best_chance(task, row, letters, most=length + 2) == pytest.approx(task.ceiling)


def test_typos_asks_for_the_letters_of_the_prompt() -> None:
    task = load_task({"fn": "typos", "length": 3, "rate": 0, "train": 300, "test": 30}, seed=0)
    assert (task.typo_rate, task.ceiling) == (0, 1)
    assert all(re.fullmatch("[a-z]{3}:", row["prompt"]) and row["prompt"] == row["answer"] + ":" for row in task.train)
    assert {letter for row in task.train for letter in row["answer"]} == set("abcdefghijklmnopqrstuvwxyz")
    row = {"prompt": "abc:", "answer": "abc"}
    agrees(task, row, {"abc"}, {"", "a", "ab", "abc", "abcd", "abd", "b", "ABC", "abc:", "a bc", "aabc", "bc"})
    assert typos(train=5, test=1).ceiling == pytest.approx(0.5, abs=0.001)  # half of them by default


def test_tasks_without_a_bad_keyboard_have_no_ceiling() -> None:
    for task in (countdown(train=5, test=1), sudoku(train=5, test=1), signs(train=5, test=1)):
        assert (task.typo_rate, task.ceiling) == (0, None)


# your own data


def rows(count: int = 50) -> list[dict[str, Any]]:
    return [{"question": f"{i} + 1?", "result": i + 1, "level": i % 3} for i in range(count)]


def jsonl(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def saved(folder: Path, name: str) -> Path:
    """The same rows in each format that `data` takes."""
    path = folder / name
    if name.endswith(".jsonl"):
        return jsonl(path, rows())
    if name.endswith(".json"):
        path.write_text(json.dumps(rows(), indent=1))
    elif name == "saved":
        datasets.Dataset.from_list(rows()).save_to_disk(path)
    elif name == "saved_dict":
        splits = {"train": datasets.Dataset.from_list(rows()[:40]), "test": datasets.Dataset.from_list(rows()[40:])}
        datasets.DatasetDict(splits).save_to_disk(path)
    elif name == "plain":
        path.mkdir()
        jsonl(path / "train.jsonl", rows()[:40])
        jsonl(path / "test.jsonl", rows()[40:])
    return path


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "saved", "saved_dict", "plain"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    task = data(str(saved(tmp_path, name)), prompt="question", answer="result")
    found = sorted(task.train + task.test, key=lambda row: int(row["answer"]))
    assert found == [{"prompt": f"{i} + 1?", "answer": str(i + 1), "level": i % 3} for i in range(50)]
    assert not set(prompts(task.train)) & set(prompts(task.test))
    if name in ("saved_dict", "plain"):  # splits named train and test are taken as they are
        assert {row["answer"] for row in task.test} == {str(i + 1) for i in range(40, 50)}
    assert task.correct(task.train[0], task.train[0]["answer"])


def test_train_and_test_limit_the_rows_and_the_seed_picks_them(tmp_path: Path) -> None:
    path = str(saved(tmp_path, "saved_dict"))
    columns = {"prompt": "question", "answer": "result"}
    small = data(path, **columns, train=5, test=3, seed=1)
    assert (len(small.train), len(small.test)) == (5, 3)
    assert data(path, **columns, train=5, seed=1).train == small.train
    assert data(path, **columns, train=5, seed=2).train != small.train
    assert {r["prompt"] for r in data(path, **columns, seed=2).train} == {f"{i} + 1?" for i in range(40)}


def test_the_same_file_splits_the_same_way_whatever_the_order(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(rows(), 50)
    split = [
        {row["prompt"] for row in data(str(jsonl(tmp_path / "a.jsonl", entries)), "question", "result").test}
        for entries in (rows(), shuffled)
    ]
    assert split[0] == split[1]


@pytest.mark.parametrize("count", range(2, 12))
def test_few_rows_still_make_two_splits(count: int, tmp_path: Path) -> None:
    for start in range(20):
        entries = [{"prompt": f"p{start + i}", "answer": "a"} for i in range(count)]
        task = data(str(jsonl(tmp_path / "a.jsonl", entries)))
        assert task.train and task.test and len(task.train) + len(task.test) == count


def test_a_prompt_that_is_tested_on_is_not_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    jsonl(folder / "test.jsonl", [{"prompt": "a", "answer": "1"}])
    task = data(str(folder))
    assert prompts(task.train) == ["b"] and prompts(task.test) == ["a"]
    jsonl(folder / "train.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(UserError, match="every train prompt is also a test prompt"):
        data(str(folder))


def test_prompts_may_be_chat_messages(tmp_path: Path) -> None:
    chats = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(30)]
    task = data(str(jsonl(tmp_path / "chat.jsonl", chats)))
    assert all(row["prompt"] == [{"role": "user", "content": f"say {row['answer']}"}] for row in task.train + task.test)
    assert len(task.train) + len(task.test) == 30


def test_a_column_that_some_rows_lack_is_none_there(tmp_path: Path) -> None:
    entries = [{"prompt": f"p{i}", "answer": "a", **({"hint": "h"} if i == 7 else {})} for i in range(30)]
    task = data(str(jsonl(tmp_path / "a.jsonl", entries)))
    hints = {row["prompt"]: row["hint"] for row in task.train + task.test}
    assert hints.pop("p7") == "h" and set(hints.values()) == {None}


GOOD = '{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 train and 0 test rows"),
        ("\n\n", "0 train and 0 test rows"),
        ("[]", "0 train and 0 test rows"),
        (GOOD, "1 train and 0 test rows"),
        (GOOD * 3, "every train prompt is also a test prompt"),
        (GOOD + '{"prompt": "p", "answ', "line 2: not JSON"),
        (GOOD + "[1, 2]\n", "entry 2 is a list"),
        ("hello\n", "line 1: not JSON"),
        ('{"question": "p", "answer": "a"}\n', "row 1 of 'train' has no 'prompt'; its columns are question, answer"),
        (GOOD + '{"prompt": "p", "answer": null}\n', "row 2 of 'train' has no 'answer'"),
        (GOOD + '{"prompt": "", "answer": "a"}\n', "row 2 of 'train' has no 'prompt'"),
        (GOOD + '{"prompt": 5, "answer": "a"}\n', "row 2 of 'train': the prompt is '5'"),
        (GOOD + '{"prompt": ["x"], "answer": "a"}\n', "row 2 of 'train': the prompt is"),
        (GOOD + '{"prompt": "p", "answer": ["a"]}\n', "row 2 of 'train': the answer is"),
    ],
)
def test_files_that_are_of_no_use_say_where(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        data(str(path))
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_column_name_gets_the_nearest(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows())
    with pytest.raises(UserError, match="did you mean 'question'"):
        data(str(path), prompt="qestion", answer="result")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff\xfe\x00"), None])
def test_paths_that_hold_nothing(make: Callable[[Path], Any] | None, tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    if make:
        make(path)
    with pytest.raises(UserError) as caught:
        data(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_negative_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train=-1"):
        data(str(jsonl(tmp_path / "a.jsonl", rows())), "question", "result", train=-1)


# tasks by name


def plugin(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text("from rl_backspace.tasks import Task\n" + body)
    return f"{path}:make"


ROWS = "[{'prompt': f'p{i}', 'answer': 'a' * size} for i in range(4)]"


def test_a_task_from_a_file_with_and_without_a_seed(tmp_path: Path) -> None:
    plain = plugin(tmp_path, f"def make(size):\n    rows = {ROWS}\n    return Task(rows[1:], rows[:1])\n")
    assert load_task({"fn": plain, "size": 3}, seed=9).train[0]["answer"] == "aaa"
    (tmp_path / "other").mkdir()
    seeded = plugin(
        tmp_path / "other",
        f"def make(seed, size=1):\n    rows = {ROWS}\n    rows[0]['seed'] = seed\n    return Task(rows[1:], rows[:1])",
    )
    assert load_task({"fn": seeded}, seed=9).test[0]["seed"] == 9
    assert load_task({"fn": seeded, "seed": 4}, seed=9).test[0]["seed"] == 4


@pytest.mark.parametrize(
    ("spec", "lines"),
    [
        ({"fn": "sings"}, ["task.fn: got 'sings'.*did you mean 'signs'"]),
        ({"fn": "signs", "cout": 5}, ["task.cout: unknown.*did you mean 'count'"]),
        ({"fn": "signs", "count": "five"}, ["task.count: expected a valid integer; got 'five'"]),
        ({"fn": "signs", "count": True}, ["task.count: expected a valid integer; got True"]),
        ({"fn": "signs", "cout": 5, "high": "x"}, ["task.cout", "task.high"]),
        ({"fn": "countdown", "count": 1}, ["countdown: got count=1.*expected count from 2 to 5"]),
        ({"fn": "countdown", "count": 6}, ["countdown: got count=6.*expected count from 2 to 5"]),
        ({"fn": "countdown", "low": 5, "high": 4}, ["low=5, high=4.*low <= high"]),
        ({"fn": "countdown", "low": 0}, ["low=0.*1 <= low"]),
        ({"fn": "countdown", "limit": 29}, ["high=30, limit=29.*high <= limit"]),
        ({"fn": "countdown", "count": "3"}, ["task.count: expected a valid integer; got '3'"]),
        ({"fn": "countdown", "limit": 99.5}, ["task.limit: expected a valid integer; got 99.5"]),
        ({"fn": "sudoku", "givens": 16}, ["sudoku: got givens=16; expected 1 to 15"]),
        ({"fn": "sudoku", "givens": 0}, ["sudoku: got givens=0; expected 1 to 15"]),
        ({"fn": "sudoku", "givens": "5"}, ["task.givens: expected a valid integer; got '5'"]),
        ({"fn": "typos", "rate": 1.0}, [r"typos: got length=8, rate=1\.0; .*0 <= rate <= 0\.9"]),
        ({"fn": "typos", "rate": -0.1}, [r"rate=-0\.1; .*0 <= rate <= 0\.9"]),
        ({"fn": "typos", "rate": float("nan")}, ["rate=nan; .*0 <= rate <= 0\.9"]),
        ({"fn": "typos", "rate": "0.1"}, ["task.rate: expected a valid number; got '0.1'"]),
        ({"fn": "typos", "length": 0}, ["typos: got length=0.*length >= 1"]),
        ({"fn": "data"}, ["task: data raised TypeError.*path"]),
        ({"fn": "data", "path": "/nowhere/x.jsonl"}, ["/nowhere/x.jsonl: no such file or folder"]),
        ({"fn": "/nowhere/x.py:make"}, ["task.fn.*no file /nowhere/x.py"]),
        ({"fn": "rl_backspace.tasks:signz"}, ["task.fn.*no 'signz'; did you mean 'signs'"]),
        ({"fn": "no_such_package.x:make"}, ["task.fn.*cannot be imported: ModuleNotFoundError"]),
        ({"fn": "rl_backspace.tasks:BUNDLED"}, ["task.fn.*is a dict; expected a function"]),
    ],
)
def test_a_task_that_cannot_be_made_says_why(spec: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_task(spec, seed=0)
    got = str(caught.value).splitlines()
    assert len(got) == len(lines)
    for line, pattern in zip(got, lines, strict=True):
        assert re.search(pattern, line), line


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def make():\n    return 3\n", "returned int; expected rl_backspace.tasks.Task"),
        ("def make():\n    return Task([], [])\n", "0 train and 0 test rows"),
        ("def make():\n    raise RuntimeError('two\\nlines')\n", "raised RuntimeError: two lines"),
        ("def make():\n    return Task([{'prompt': 1, 'answer': 'a'}], [{'prompt': 'p', 'answer': 'a'}])\n", "the row"),
        ("def make():\n    return Task([{'prompt': 'p'}], [{'prompt': 'p', 'answer': 'a'}])\n", "the row"),
        ("def make():\n    return Task([{'prompt': 'p', 'answer': 3}], [{'prompt': 'p', 'answer': 'a'}])\n", "the row"),
        ("def make():\n    return Task([{'prompt': ['p'], 'answer': 'a'}], [])\n", "the row {'prompt': ['p']"),
        ("def make():\n    return Task(['two\\nlines'], [])\n", "the row two lines"),
        ("def make():\n    return Task([{'prompt': 'p', 'answer': 'a', 3: 1}], [])\n", "the column 3"),
        ("def make():\n    return Task(7, [])\n", "gave a int for rows"),
        ("def make(:\n", "SyntaxError"),
        ("1/0\n", "ZeroDivisionError"),
    ],
)
def test_a_broken_plugin_is_named(body: str, said: str, tmp_path: Path) -> None:
    fn = plugin(tmp_path, body)
    with pytest.raises(UserError) as caught:
        load_task({"fn": fn}, seed=0)
    assert said in str(caught.value) and "mine.py" in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_that_some_rows_of_a_plugin_lack_is_none_there(tmp_path: Path) -> None:
    body = (
        "row = {'prompt': 'p', 'answer': 'a'}\n"
        "def make():\n    return Task([row, {**row, 'x': 1}], [{**row, 'y': 2}])\n"
    )
    task = load_task({"fn": plugin(tmp_path, body)}, seed=0)
    assert [(row["x"], row["y"]) for row in task.train + task.test] == [(None, None), (1, None), (None, 2)]


@pytest.mark.parametrize("name", ["correct", "alive"])
def test_a_plugins_function_that_breaks_is_named(name: str, tmp_path: Path) -> None:
    body = (
        "rows = [{'prompt': 'p', 'answer': 'a'}]\n"
        "def bad(row, text):\n    return row['nothing']\n"
        f"def make():\n    return Task(rows, rows, {name}=bad)\n"
    )
    fn = plugin(tmp_path, body)
    task = load_task({"fn": fn}, seed=0)
    with pytest.raises(UserError) as caught:
        getattr(task, name)(task.train[0], "a")
    assert str(caught.value) == f"task: {name!r} of {fn} raised KeyError: 'nothing'"


@pytest.mark.parametrize("fn", ["signs", "countdown", "sudoku"])
def test_what_a_task_completes_is_right_and_starts_as_asked(fn: str) -> None:
    task, rng, found = load_task({"fn": fn, "train": 60, "test": 1}, seed=0), random.Random(0), set()
    assert task.complete is not None
    for row in task.train:
        other = rng.choice(task.train)["answer"]
        for text in (row["answer"][: rng.randint(0, 20)], other[: rng.randint(0, 4)], "?", row["answer"] + "1"):
            whole = task.complete(row, text, rng)
            assert (whole is not None) == task.alive(row, text), (row, text)
            assert whole is None or (whole.startswith(text) and task.correct(row, whole))
            found.add(whole == row["answer"])
    assert found == {True, False}


def test_completions_of_signs_are_all_as_likely() -> None:
    row = {"prompt": "", "answer": "", "numbers": [1, 1, 2, 3, 1], "target": 2}
    task, rng = load_task({"fn": "signs", "train": 1, "test": 1}, seed=0), random.Random(0)
    right = {"".join(s) for s in itertools.product("+-", repeat=5) if task.correct(row, "".join(s))}
    assert task.complete is not None
    drawn = Counter(task.complete(row, "", rng) for _ in range(3000))
    assert set(drawn) == right and len(right) > 3
    assert all(abs(count - 3000 / len(right)) < 5 * (3000 / len(right)) ** 0.5 for count in drawn.values())
