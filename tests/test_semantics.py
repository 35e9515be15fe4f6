from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import Naive

from rl_backspace.errors import UserError
from rl_backspace.semantics import Budget, IllegalAction, Machine, Rules, contexts, layout, replay

EOS, NEWLINE, TOKENS = 0, 1, range(6)  # 6.. are delete tokens
UNITS = st.one_of(st.sampled_from(["token", "line", "answer"]), st.integers(1, 4))


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    units = draw(st.lists(UNITS, min_size=1, max_size=3))
    return Rules(
        deletes={6 + i: unit for i, unit in enumerate(units)},
        eos=frozenset([EOS]),
        memory=draw(st.sampled_from(["erase", "keep", "hint"])),
        retry=draw(st.sampled_from(["free", "ban"])),
        boundaries=frozenset([NEWLINE]),
    )


budgets = st.builds(
    Budget,
    answer=st.integers(1, 12),
    actions=st.integers(1, 40),
    deletes=st.none() | st.integers(0, 10),
    window=st.none() | st.integers(0, 4),
)


@st.composite
def games(draw: st.DrawFn) -> tuple[Rules, Budget, list[int]]:
    """Rules, a budget and a legal trace, grown action by action by the naive machine; deletes are likely."""
    played, budget = draw(rules()), draw(budgets)
    naive = Naive(played, budget)
    likely = draw(st.sampled_from([1, 2, 4]))
    for _ in range(draw(st.integers(0, 40))):
        legal = sorted(set(TOKENS) | set(played.deletes) - naive.forbidden())
        legal = [a for a in legal if a not in naive.forbidden()]
        if naive.over() or not legal:
            break
        options = legal + [a for a in legal if a in played.deletes] * likely
        naive.press(draw(st.sampled_from(options)))
    return played, budget, naive.history


@settings(max_examples=400, deadline=None)
@given(games())
def test_replay_equals_a_naive_machine_at_every_step(game: tuple[Rules, Budget, list[int]]) -> None:
    played, budget, trace = game
    naive, machine = Naive(played, budget), Machine(played, budget)
    for action, context in zip(trace, contexts(trace, played, budget), strict=True):
        assert context == naive.context()
        assert set(machine.illegal()) == naive.forbidden()
        before = naive.context()
        naive.press(action)
        enters = machine.step(action)
        assert machine.visible == naive.cells
        assert (machine.end is not None) == naive.over()
        assert (enters is None) == (naive.context() == before[: len(naive.context())])
        if enters is not None:
            assert naive.context()[-1] == enters
    assert replay(trace, played, budget) == machine


@settings(max_examples=300, deadline=None)
@given(games())
def test_layout_finds_every_action_in_its_context(game: tuple[Rules, Budget, list[int]]) -> None:
    played, budget, trace = game
    out = layout(trace, played, budget)
    naive, entered = Naive(played, budget), 0
    for step, action in enumerate(trace):
        assert set(out.illegal[step]) == naive.forbidden()
        chain, node = [], out.anchors[step]
        while node != -1:
            chain.append(out.tokens[node])
            assert out.parents[node] < node
            node = out.parents[node]
        assert chain[::-1] == naive.context()
        before = naive.context()
        naive.press(action)
        entered += naive.context() != before[: len(naive.context())] and step + 1 < len(trace)
    assert len(out.tokens) == len(out.parents) == entered


@settings(max_examples=200, deadline=None)
@given(games())
def test_illegal_actions_are_refused(game: tuple[Rules, Budget, list[int]]) -> None:
    played, budget, trace = game
    machine = replay(trace, played, budget)
    for action in machine.illegal() if machine.end is None else [2]:
        with pytest.raises(IllegalAction):
            replay([*trace, action], played, budget)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ban_ends_any_policy_that_depends_on_the_context_alone(data: st.DataObject) -> None:
    """A fixed preference per context, with no budget of actions to speak of: a search that must run out."""
    played = Rules({6: "token"}, frozenset([EOS]), retry="ban")
    machine = Machine(played, Budget(answer=3, actions=10_000))
    preferences: dict[tuple[int, ...], list[int]] = {}
    while machine.end is None:
        here = tuple(machine.visible)
        if here not in preferences:
            preferences[here] = data.draw(st.permutations([0, 2, 3, 6]))
        legal = [a for a in preferences[here] if a not in machine.illegal()]
        if not legal:
            machine.stop("stuck")
        else:
            machine.step(legal[0])
    assert machine.end in ("eos", "length", "stuck")


def test_free_greedy_loops_where_ban_does_not() -> None:
    """The reason for `ban`: with erase, a delete returns to the very state that made the mistake."""

    def policy(visible: list[int], illegal: list[int]) -> int:
        wish = [6, 4] if visible == [2] else [2, 3] if not visible else [EOS]
        return next(a for a in wish if a not in illegal)

    ends = {}
    for retry in ("free", "ban"):
        machine = Machine(Rules({6: "token"}, frozenset([EOS]), retry=retry), Budget(5, 30))
        while machine.end is None:
            machine.step(policy(machine.visible, machine.illegal()))
        ends[retry] = (machine.end, len(machine.trace))
    assert ends == {"free": ("budget", 30), "ban": ("eos", 4)}


def test_a_line_goes_back_to_its_start_and_a_finished_line_goes_whole() -> None:
    played = Rules({6: "line"}, frozenset([EOS]), boundaries=frozenset([NEWLINE]))
    assert replay([2, 3, NEWLINE, 4, 5, 6], played).visible == [2, 3, NEWLINE]
    assert replay([2, 3, NEWLINE, 4, NEWLINE, 6], played).visible == [2, 3, NEWLINE]
    assert replay([2, 3, NEWLINE, 6], played).visible == []


def test_a_hint_is_one_marker_per_depth_and_goes_with_the_token_before_it() -> None:
    played = Rules({6: "token"}, frozenset([EOS]), memory="hint")

    def context_after(trace: list[int]) -> list[int]:
        return list(contexts([*trace, 5], played))[-1]

    assert context_after([2, 3, 6]) == [2, 6]
    assert context_after([2, 3, 6, 4, 6]) == [2, 6]
    assert context_after([2, 3, 6, 4, 5]) == [2, 6, 4, 5]
    assert context_after([2, 3, 6, 6]) == [6]
    assert context_after([2, 3, 6, 6, 4]) == [6, 4]


def test_answer_leaves_out_the_end_of_sequence_token() -> None:
    played = Rules({6: "token"}, frozenset([EOS]))
    assert replay([2, 3, EOS], played).answer == [2, 3]
    assert replay([2, 3], played).answer == [2, 3]


def test_imports_without_torch() -> None:
    code = "import sys; import rl_backspace.semantics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SAVED: dict[str, Any] = {
    "tokens": {"a": "token", "b": 3},
    "ids": {"a": 5, "b": 6},
    "memory": "erase",
    "retry": "ban",
    "boundaries": [],
    "eos": [1],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": "forget"}, "memory: got 'forget'"),
        ({"retry": "bann"}, "retry: got 'bann'"),
        ({"tokens": {"a": "word"}}, "tokens: got 'word' for 'a'"),
        ({"tokens": {"a": 0}}, "tokens: got 0"),
        ({"tokens": {"a": True}}, "tokens: got True"),
        ({"tokens": {"c": "token"}}, "got None for a token's id"),
        ({"ids": {"a": -1, "b": 6}}, "got -1 for a token's id"),
        ({"eos": 1}, "eos: got 1"),
        ({"eos": ["1"]}, "got '1' for a token's id"),
        ({"boundaries": None}, "boundaries: got None"),
    ],
)
def test_saved_rules_are_checked(change: dict[str, Any], said: str) -> None:
    assert Rules.of(SAVED) == Rules({5: "token", 6: 3}, frozenset([1]), "erase", "ban")
    with pytest.raises(UserError) as caught:
        Rules.of({**SAVED, **change})
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("saved", [5, None, {}, [], *({k: v for k, v in SAVED.items() if k != key} for key in SAVED)])
def test_what_is_no_saved_rules_is_refused(saved: Any) -> None:
    with pytest.raises(UserError, match="rules of a delete token"):
        Rules.of(saved)


@pytest.mark.parametrize("given", [{"answer": 0}, {"actions": 0}, {"deletes": -1}, {"window": -1}])
def test_a_budget_without_room_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"budget: got {next(iter(given))}="):
        Budget(**{"answer": 3, **given})
