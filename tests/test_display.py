from __future__ import annotations

import io
import random
import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl_backspace.corrections import Correction, Mistake
from rl_backspace.detector import State, summarise
from rl_backspace.display import (
    TypingStreamer,
    console,
    correction_lines,
    correction_record,
    detector_table,
    results_table,
    strike,
    token_text,
)
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Machine, Memory, Retry, Rules, Unit

TOKENIZER = character_tokenizer()
EOS = TOKENIZER.eos_token_id
BACK, CLEAR = 200, 201


def rules(memory: Memory = "erase", retry: Retry = "free") -> Rules:
    deletes: dict[int, Unit] = {BACK: "token", CLEAR: "answer"}
    return Rules(deletes, frozenset([EOS]), memory, retry)


def typed(text: str) -> list[int]:
    """A trace from text: < is one token back, ! clears the answer, $ ends it."""
    special = {"<": BACK, "!": CLEAR, "$": EOS}
    return [special[c] if c in special else TOKENIZER.convert_tokens_to_ids(c) for c in text]


def spans(line: Text) -> list[tuple[str, bool]]:
    """Text and whether it is struck through, run by run."""
    return [(line.plain[span.start : span.end], "strike" in str(span.style)) for span in line.spans]


def visible_text(machine: Machine) -> str:
    return "".join("⏎" if token == EOS else TOKENIZER.decode([token]) for token in machine.visible)


@pytest.mark.parametrize(
    ("trace", "marked"),
    [
        ("12$", "12⏎"),
        ("1<2$", "~~1~~2⏎"),
        ("12<<3$", "~~12~~3⏎"),
        ("12<3<4$", "1~~23~~4⏎"),
        ("12!3", "~~12~~3"),
        ("12!", "~~12~~"),
        ("1<1<", "~~11~~"),
        ("", ""),
    ],
)
def test_deleted_text_is_struck_through(trace: str, marked: str) -> None:
    assert strike(typed(trace), TOKENIZER, rules(), marks=True).plain == marked
    plain = strike(typed(trace), TOKENIZER, rules(), before="q: ")
    assert plain.plain == "q: " + marked.replace("~~", "")


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(get_args(Memory)), st.sampled_from(get_args(Retry)))
def test_what_is_not_struck_is_what_is_visible(seed: int, memory: Memory, retry: Retry) -> None:
    """And everything that was typed is shown, in the order it was typed in."""
    rng = random.Random(seed)
    machine = Machine(rules(memory, retry), Budget(answer=8, actions=24))
    while machine.end is None:
        legal = [a for a in (*range(10, 16), EOS, BACK, BACK, CLEAR) if a not in machine.illegal()]
        if not legal:
            break
        machine.step(rng.choice(legal))
    runs = spans(strike(machine.trace, TOKENIZER, machine.rules))
    assert "".join(text for text, struck in runs if not struck) == visible_text(machine)
    everything = [token for token in machine.trace if token not in machine.rules.deletes]
    shown = "".join("⏎" if token == EOS else TOKENIZER.decode([token]) for token in everything)
    assert "".join(text for text, _ in runs) == shown


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: the space belongs to the word, and decoding drops the first one."""
    words = ["<unk>", "<eos>", "▁the", "▁cat", "▁dog", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def test_spaces_between_tokens_stay() -> None:
    the, cat, dog, s = 2, 3, 4, 5
    line = strike([the, cat, s, BACK, BACK, dog, 1], spaced_tokenizer(), rules(), marks=True)
    assert line.plain == "the~~ cats~~ dog⏎"


def test_a_character_of_several_tokens_is_whole() -> None:
    """Byte-level tokenizers split a character over tokens; half of one has no text of its own."""
    alphabet = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    ids = fast("é").input_ids
    assert len(ids) == 2
    x = fast("x").input_ids[0]
    plain = Rules({900: "token"}, frozenset([fast.eos_token_id]))
    assert strike([x, *ids], fast, plain, marks=True).plain == "xé"
    assert strike([x, *ids, 900, 900, *ids], fast, plain, marks=True).plain == "x~~é~~é"


def printed(thing: Any, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, markup=False).print(thing)
    return stream.getvalue()


def test_the_consoles_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("[red]x", "[/x]", "a[b]c[0]"):
        console.print(f"{prompt} ", strike(typed("1<2$"), TOKENIZER, rules(), prompt))
        assert capsys.readouterr().out.count(prompt) == 2


def result(accuracy: float, deletes: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1], "deletes_per_answer": deletes}


def test_the_table_has_a_row_for_each_stage_and_token() -> None:
    stages = {
        "before": {"allowed": {"sampled": result(0.123, 0.456), "greedy": result(0.7, 1.5)}},
        "after": {
            "allowed": {"sampled": result(0.8, 0.25), "greedy": result(0.9, 2.0)},
            "blocked": {"sampled": result(0.5, 0.0), "greedy": result(0.6, 0.0)},
        },
    }
    rows = [re.findall(r"[\w.–-]+", line) for line in printed(results_table(stages)).splitlines() if "–" in line]
    assert rows == [
        ["before", "allowed", "12.3", "2.3–22.3", "70.0", "60.0–80.0", "0.46", "1.50"],
        ["after", "allowed", "80.0", "70.0–90.0", "90.0", "80.0–100.0", "0.25", "2.00"],
        ["after", "blocked", "50.0", "40.0–60.0", "60.0", "50.0–70.0", "0.00", "0.00"],
    ]


def correction(trace: str, learned: str, *mistakes: Mistake) -> Correction:
    """A correction from text: in `learned`, ^ is as typed, . is not learned, anything else is learned instead."""
    actions = typed(trace)
    targets = [action if mark in "^." else typed(mark)[0] for action, mark in zip(actions, learned, strict=True)]
    return Correction(actions, targets, [mark != "." for mark in learned], "random", list(mistakes))


ONE = Rules({BACK: "token"}, frozenset([EOS]))


@pytest.mark.parametrize(
    ("trace", "learned", "lines"),
    [
        ("12$", "^^^", ("12⏎", "^^^")),
        ("13<2$", "^.^^^", ("13⌫2⏎", "^.^^^")),
        ("132$", "^2<^", ("132⏎", "^2⌫^")),  # as of a rollout
        ("1\n<2", "^.^$", ("1↵⌫2", "^.^⏎")),
        ("", "", ("", "")),
    ],
)
def test_a_correction_is_two_lines(trace: str, learned: str, lines: tuple[str, str]) -> None:
    first, second = correction_lines("q:", correction(trace, learned), TOKENIZER, ONE)
    assert (first, second) == (f"q: {lines[0]}", f"   {lines[1]}")
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q:"}]
    assert correction_lines(chat, correction(trace, learned), TOKENIZER, ONE) == (first, second)


def test_what_is_learned_stands_below_what_was_typed() -> None:
    """Where several delete tokens have names, the cells are as wide as the wider of the two."""
    made = correction("12!3<4$", ".^^!<.^")
    first, second = correction_lines("q:", made, TOKENIZER, rules())
    assert first == f"q: 12⌫answer 3{' ' * 7}⌫token 4⏎"
    assert second == f"   .^{'^' * 8}⌫answer {'^' * 7}.^"
    assert len(first) == len(second)
    assert first.index("3") == second.index("⌫answer")


def test_a_correction_is_recorded_in_text_and_in_tokens() -> None:
    made = correction(
        "1x\n<<23<$", "^..^^^.^^", Mistake(1, typed("x\n"), [BACK, BACK], 4), Mistake(2, typed("3"), [BACK], 2)
    )
    row = {"prompt": "q:", "answer": "12", "numbers": [1, 2]}
    assert correction_record(row, made, TOKENIZER, ONE) == {
        "prompt": "q:",
        "answer": "12",
        "source": "random",
        "typed": "1x↵⌫⌫23⌫⏎",
        "visible": "12",
        "mistakes": [
            {"after": "1", "wrong": "x\n", "deletes": 2, "right": "2"},
            {"after": "12", "wrong": "3", "deletes": 1, "right": ""},
        ],
        "learned": ["1", None, None, "⌫", "⌫", "2", None, "⌫", "⏎"],
        "actions": made.actions,
        "targets": made.targets,
        "learn": made.learn,
    }


def test_a_rollout_is_recorded_with_what_should_have_been_typed() -> None:
    made = correction("13", "^2")
    record = correction_record({"prompt": "q:", "answer": "12"}, made, TOKENIZER, ONE)
    assert (record["typed"], record["visible"], record["learned"]) == ("13", "13", ["1", "2"])


def test_every_token_is_read_on_one_line() -> None:
    texts = [token_text(token, TOKENIZER, ONE) for token in (*range(len(TOKENIZER)), BACK)]
    assert not any("\n" in text for text in texts)
    assert texts[EOS] == "⏎" and texts[-1] == "⌫"
    assert token_text(CLEAR, TOKENIZER, rules()) == "⌫answer "


def test_the_detectors_table_has_a_row_for_each_source() -> None:
    """What is not known is a dash; ages are those that any source has."""
    found = {
        "random": summarise([State(0.9, True, 1), State(0.25, False, 4), State(0.125, False, 0)]),
        "samples": summarise([State(0.5, True, 2), State(0.75, True, 0)]),
        "uncertain": summarise([]),
    }
    shown = printed(detector_table(found), width=200).splitlines()
    (header,) = (line for line in shown if "errors" in line and "┃" in line)
    names = [cell.strip() for cell in header.strip("┃ ").split("┃")]
    assert names == ["errors", "if right", "if wrong", "1 ago", "2 ago", "3+ ago", "precision", "recall", "AUC"]
    rows = {
        cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("│")[1:-1]] for line in shown) if cells
    }
    assert rows == {
        "random": ["12.5", "57.5", "90.0", "–", "25.0", "100.0", "50.0", "100.0"],
        "samples": ["75.0", "50.0", "–", "50.0", "–", "50.0", "100.0", "0.0"],
        "uncertain": ["–"] * 8,
    }


def test_a_typing_streamer_can_be_used_again_and_ended_before_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=60, highlight=False, markup=False)
    monkeypatch.setattr("rl_backspace.display.console", terminal)
    streamer = TypingStreamer(TOKENIZER, "question ")
    streamer.end()
    shown = []
    for text in ("12$", "3<4$"):
        streamer.begin(rules())
        for action in typed(text):
            streamer.put_action(action)
        streamer.end()
        shown.append(out.getvalue())
        out.truncate(out.seek(0))
    assert "\x1b[2K" not in shown[1].partition("question")[0]  # no line is erased before the first one is shown
    assert "12" in shown[0] and "4" in shown[1]


def test_a_long_trace_is_decoded_run_by_run_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_backspace.display.console", Console(file=io.StringIO()))
    decoded = []
    original = TOKENIZER.decode
    monkeypatch.setattr(
        TOKENIZER, "decode", lambda ids, *rest, **kw: decoded.append(len(ids)) or original(ids, *rest, **kw)
    )
    generator = random.Random(0)
    streamer = TypingStreamer(TOKENIZER)
    streamer.begin(rules())
    for i in range(600):
        streamer.put_action(BACK if i % 8 == 7 else generator.randrange(5, 40))
    streamer.end()
    assert sum(decoded) < 600 * 200
