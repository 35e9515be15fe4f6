"""Your own data: a JSONL file, or a folder that `datasets` saved or can load."""

from __future__ import annotations

import random
from pathlib import Path

from rl_backspace.errors import UserError
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
    rows = {split: [_row(raw, prompt, answer, path) for raw in raws] for split, raws in _load(Path(path)).items()}
    if "test" not in rows:
        everything = [row for split in rows.values() for row in split]
        rows = {name: [r for r in everything if split_of(str(r["prompt"])) == name] for name in ("train", "test")}
        if not rows["test"] and len(rows["train"]) > 1:  # too few for one in ten: hold back one
            rows["test"] = [rows["train"].pop()]
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


def _load(path: Path) -> dict[str, list[Row]]:
    """Split name -> rows."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; task.path takes a .jsonl file or a datasets folder")
    import datasets

    try:
        if path.is_file():
            found = datasets.load_dataset("json", data_files=str(path))
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path))
    except Exception as error:  # whatever the loader met, the user's file is what to mend
        cause = error.__cause__ or error
        raise UserError(
            f"{path}: cannot be read as JSON lines or as a datasets folder: {str(cause).splitlines()[0]}"
        ) from error
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    return {str(name): list(split) for name, split in found.items()}


def _row(raw: Row, prompt: str, answer: str, path: str) -> Row:
    for column in (prompt, answer):
        if raw.get(column) in (None, ""):
            has = ", ".join(raw)
            raise UserError(f"{path}: a row has no {column!r}; its columns are {has}; set task.prompt and task.answer")
    others = {key: value for key, value in raw.items() if key not in (prompt, answer)}
    return {**others, "prompt": raw[prompt], "answer": str(raw[answer])}
