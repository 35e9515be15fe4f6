"""Your own data: a JSONL file, or a folder that `datasets` saved or can load."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rl_backspace.errors import UserError, first_line, nearest
from rl_backspace.tasks.task import Row, Task, split_of


def data(
    path: str, prompt: str = "prompt", answer: str = "answer", train: int = 0, test: int = 1024, seed: int = 0
) -> Task:
    """Rows with a prompt column and an answer column; the other columns reach the rewards by name.

    Splits named `train` and `test` are taken as they are; otherwise one prompt in ten is for testing.

    Args:
        path: a .jsonl or .json file, or a folder in the format of `datasets` (saved, or one it can load).
        prompt, answer: names of the columns. Prompts are text or lists of chat messages.
        train, test: most rows of each split; 0 takes all.
    """
    if train < 0 or test < 0:
        raise UserError(f"task: got train={train}, test={test}; expected 0, which takes all rows, or more")
    rows = {
        split: [_row(raw, prompt, answer, f"{path}: row {number} of {split!r}") for number, raw in enumerate(raws, 1)]
        for split, raws in _load(Path(path)).items()
    }
    if "test" not in rows:
        rows = _split([row for split in rows.values() for row in split])
    train_rows, test_rows = rows.get("train", []), rows["test"]
    if not train_rows or not test_rows:
        raise UserError(
            f"{path}: {len(train_rows)} train and {len(test_rows)} test rows; expected at least one of each"
        )
    held_out = {str(row["prompt"]) for row in test_rows}
    train_rows = [row for row in train_rows if str(row["prompt"]) not in held_out]
    if not train_rows:
        raise UserError(f"{path}: every train prompt is also a test prompt; give distinct prompts")
    rng = random.Random(seed)
    rng.shuffle(train_rows)
    rng.shuffle(test_rows)
    return Task(train_rows[: train or None], test_rows[: test or None])


def _split(rows: list[Row]) -> dict[str, list[Row]]:
    """One prompt in ten for testing; where there are too few for that, the last row."""
    split: dict[str, list[Row]] = {"train": [], "test": []}
    for row in rows:
        split[split_of(str(row["prompt"]))].append(row)
    if len(rows) > 1 and not all(split.values()):
        return {"train": rows[:-1], "test": rows[-1:]}
    return split


def _load(path: Path) -> dict[str, list[Row]]:
    """Split name -> rows."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; task.path takes a .jsonl file or a datasets folder")
    if path.is_file():
        return {"train": _read_json(path)}
    import datasets

    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path))
    except Exception as error:  # whatever the loader met, the user's folder is what to mend
        cause = first_line(error.__cause__ or error)
        raise UserError(f"{path}: cannot be read as a datasets folder: {cause}") from error
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    return {str(name): list(split) for name, split in found.items()}


def _read_json(path: Path) -> list[Row]:
    """The rows of a JSON-lines file, or of one JSON array; a column that a row lacks is None."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    if text.lstrip().startswith("["):
        rows = list(enumerate(_parse(text, f"{path}"), 1))
    else:
        lines = enumerate(text.split("\n"), 1)  # not splitlines: JSON text may hold other line separators
        rows = [(number, _parse(line, f"{path}: line {number}")) for number, line in lines if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number} is a {type(row).__name__}; expected an object with named columns")
    columns = dict.fromkeys(column for _, row in rows for column in row)
    return [{column: row.get(column) for column in columns} for _, row in rows]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def _row(raw: Row, prompt: str, answer: str, where: str) -> Row:
    """A row with its prompt and answer under those names.

    Raises:
        UserError: it lacks one of them, or it is of no use as such.
    """
    for key, column in (("prompt", prompt), ("answer", answer)):
        if raw.get(column) in (None, "", []):
            hint = nearest(column, raw) if column not in raw else ""
            has = f"its columns are {', '.join(map(str, raw))}"
            raise UserError(f"{where} has no {column!r}; {has}{hint}; set task.{key}")
    asked, expected = raw[prompt], raw[answer]
    if not isinstance(asked, str) and not _is_chat(asked):
        raise UserError(f"{where}: the prompt is {str(asked)[:60]!r}; expected text or a list of chat messages")
    if not isinstance(expected, str | int | float):
        raise UserError(f"{where}: the answer is {str(expected)[:60]!r}; expected text or a number")
    others = {key: value for key, value in raw.items() if key not in (prompt, answer)}
    return {**others, "prompt": asked, "answer": str(expected)}


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt
    )
