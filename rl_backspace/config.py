"""The experiment file: typed, strict, every mistake reported at once with the nearest right name."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rl_backspace.errors import UserError
from rl_backspace.plugins import nearest
from rl_backspace.semantics import Memory, Retry

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
UnitName = Literal["token", "line", "answer"] | PositiveInt


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Plugin(BaseModel):
    """A function and its arguments, the latter checked by the function's own signature."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    fn: str = Field(description="bundled name, 'file.py:function' or 'package.module:function'")


class Delete(Strict):
    """What deleting means. Saved with the adapter."""

    tokens: dict[str, UnitName] = Field(
        default={"<|delete|>": "token"},
        min_length=1,
        description="token text -> how much one press takes: 'token', 'line', 'answer' or a number of tokens",
    )
    memory: Memory = Field(default="erase", description="what the context keeps of deleted text")
    retry: Retry = Field(default="ban", description="whether a deleted token may be typed there again")
    boundary: str = Field(default="\n", description="text of the tokens that end a line or step, for 'line'")
    budget: PositiveInt | None = Field(
        default=None, description="most actions per answer, deletes included; default: three times the answer"
    )


class Lora(Strict):
    r: PositiveInt = Field(default=32, description="rank")
    alpha: PositiveInt = Field(default=64, description="scale of the update, times r")
    dropout: Share = Field(default=0.0, description="dropout on the adapter's input; any makes the log-prob gap grow")
    target_modules: str | list[str] = Field(default="all-linear", description="as in peft.LoraConfig")


class Warmup(Strict):
    """Correction warm-up: supervised, before RL, which never discovers a fresh token."""

    steps: Annotated[int, Field(ge=0)] = Field(default=1000, description="optimizer steps; 0: none")
    clean: Share = Field(default=0.5, description="share of examples without an error")
    errors: PositiveInt = Field(default=2, description="most errors in one example")
    late: Annotated[int, Field(ge=0)] = Field(default=2, description="most tokens typed before an error is noticed")
    trainer: dict[str, Any] = Field(default={}, description="any field of transformers.TrainingArguments")


class Reward(Strict):
    fn: str = Field(description="'module:function' of rewards/, 'file.py:function' or 'package.module:function'")
    weight: float = Field(default=1.0, description="its share of the total; 0: a metric only")
    kwargs: dict[str, Any] = Field(default={}, description="keyword arguments of the function")


class Evaluation(Strict):
    rows: PositiveInt = Field(default=1024, description="test prompts, at most")


class Wandb(Strict):
    project: str = "rl-backspace"
    mode: Literal["online", "offline"] = Field(default="offline", description="offline needs no account")
    group: str | None = None
    tags: list[str] = []


def _is_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text):
        raise ValueError("expected letters, digits, '.', '_' and '-'")
    return text


class Config(Strict):
    """One experiment, from a base model to an adapter."""

    name: Annotated[str, AfterValidator(_is_name)] = Field(description="the run's folder is runs/<name>")
    model: str = Field(description="an embedded model (arith-1m), a hub id or a local path")
    task: Plugin
    rewards: dict[str, Reward] = Field(min_length=1)
    seed: int = 0
    delete: Delete = Delete()
    lora: Lora = Lora()
    warmup: Warmup = Warmup()
    trainer: dict[str, Any] = Field(default={}, description="any field of trl.GRPOConfig")
    evaluation: Evaluation = Evaluation()
    wandb: Wandb | None = Field(default=None, description="log to wandb too")


class PretrainConfig(Strict):
    """A base model from nothing, for experiments without a hub."""

    tasks: list[dict[str, Any]] = Field(min_length=1, description="task blocks, each with a weight in the mixture")
    seed: int = 0
    vocab_size: PositiveInt = Field(default=128, description="embedding rows; what the tokenizer leaves are spare")
    width: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    context: PositiveInt = Field(default=256, description="longest sequence in tokens")
    steps: PositiveInt = 7000
    batch: PositiveInt = Field(default=64, description="sequences per step")
    learning_rate: float = Field(default=2e-3, description="peak of a one-cycle schedule")


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as YAML 1.2 has it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of an experiment file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


def override(content: dict[str, Any], arguments: Sequence[str]) -> None:
    """Apply `a.b.c=value` or `--a.b.c=value`; `reward.` may stand for `rewards.`.

    Raises:
        UserError: an argument is not of that form.
    """
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals or not key:
            raise UserError(f"override {argument!r}: expected key=value, such as trainer.learning_rate=1e-4")
        names = key.split(".")
        if names[0] == "reward":
            names[0] = "rewards"
        node = content
        for name in names[:-1]:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise UserError(f"override {argument!r}: {name} is {child!r}, which has no keys")
            node = child
        try:
            node[names[-1]] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"override {argument!r}: {value!r} is not a YAML value") from error


def parse(content: Mapping[str, Any]) -> Config:
    """Check everything that needs no model or data; all mistakes at once.

    Raises:
        UserError: one line per mistake.
    """
    problems: list[str] = []
    config = _validate(Config, content, problems)
    trainer, warmup = content.get("trainer"), content.get("warmup")
    if isinstance(trainer, dict):
        problems += trainer_problems(trainer, "trainer", "GRPOConfig")
    if isinstance(warmup, dict) and isinstance(warmup.get("trainer"), dict):
        problems += trainer_problems(warmup["trainer"], "warmup.trainer", "TrainingArguments")
    if config is not None:
        problems += _combinations(config)
    if problems:
        raise UserError("\n".join(problems))
    assert config is not None
    return config


def parse_pretrain(content: Mapping[str, Any]) -> PretrainConfig:
    problems: list[str] = []
    config = _validate(PretrainConfig, content, problems)
    if config is None:
        raise UserError("\n".join(problems))
    return config


_Model = typing.TypeVar("_Model", bound=BaseModel)


def _validate(model: type[_Model], content: Mapping[str, Any], problems: list[str]) -> _Model | None:
    try:
        return model.model_validate(dict(content))
    except ValidationError as error:
        problems += [_line(model, issue) for issue in error.errors()]
        return None


def _line(model: type[BaseModel], issue: Any) -> str:
    location = [str(part) for part in issue["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(location)
    if issue["type"] == "extra_forbidden":
        known = _fields(model, location[:-1])
        return f"{key}: unknown key{nearest(location[-1], known)}; known here: {', '.join(known)}"
    if issue["type"] == "missing":
        return f"{key}: missing; add it to the experiment file"
    got = issue["input"]
    return f"{key}: {issue['msg'][0].lower()}{issue['msg'][1:]}; got {got!r} ({type(got).__name__})"


def _fields(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Field names of the block at a location, walking through nested blocks and mappings."""
    current: Any = model
    for name in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[name].annotation
        blocks = [a for a in (current, *typing.get_args(current)) if isinstance(a, type) and issubclass(a, BaseModel)]
        current = blocks[0] if blocks and typing.get_origin(current) is not dict else current
        if typing.get_origin(current) is dict:
            current = typing.get_args(current)[1] if name not in ("rewards",) else current
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


OURS = {
    "output_dir": "the run folder is set by name or --out",
    "seed": "set the top-level seed",
    "report_to": "add the top-level block wandb",
}
UNSUPPORTED = {
    "use_vllm": "rollouts with deletes run in this project's own engine",
    "use_transformers_continuous_batching": "rollouts with deletes run in this project's own engine",
    "generation_kwargs": "rollouts with deletes run in this project's own engine",
    "cache_implementation": "rollouts with deletes run in this project's own engine",
    "repetition_penalty": "exact scoring does not know it",
    "use_liger_kernel": "it replaces the forward that scoring calls",
}


def trainer_problems(
    fields: Mapping[str, Any], where: str, kind: Literal["GRPOConfig", "TrainingArguments"]
) -> list[str]:
    """Names and types against TRL's or transformers' own config class; one line per mistake."""
    types = _trainer_types(kind)
    problems = []
    for key, value in fields.items():
        if key not in types:
            problems.append(f"{where}.{key}: {kind} has no such field{nearest(key, types)}")
        elif key in OURS:
            problems.append(f"{where}.{key}: not here; {OURS[key]}")
        elif key in UNSUPPORTED and value:
            problems.append(f"{where}.{key}: not supported; {UNSUPPORTED[key]}")
        else:
            try:
                TypeAdapter(types[key]).validate_python(value, strict=not _is_enum(types[key]))
            except ValidationError as error:
                expected = error.errors()[0]["msg"]
                problems.append(
                    f"{where}.{key}: {expected[0].lower()}{expected[1:]}; got {value!r} ({type(value).__name__})"
                )
    return problems


def _trainer_types(kind: str) -> dict[str, Any]:
    if kind == "GRPOConfig":
        from trl import GRPOConfig as cls
    else:
        from transformers import TrainingArguments as cls
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _is_enum(annotation: Any) -> bool:
    import enum

    return any(isinstance(a, type) and issubclass(a, enum.Enum) for a in (annotation, *typing.get_args(annotation)))


def _combinations(config: Config) -> list[str]:
    """Settings that are each valid but cannot work together."""
    problems = []
    answer = config.trainer.get("max_completion_length")
    budget = config.delete.budget
    if budget is not None and isinstance(answer, int) and budget < answer:
        problems.append(
            f"delete.budget: {budget} actions cannot type an answer of trainer.max_completion_length={answer} tokens; "
            "raise the one or lower the other"
        )
    if "line" in config.delete.tokens.values() and not config.delete.boundary:
        problems.append("delete.boundary: empty, but a delete token takes back a 'line'; give the text that ends one")
    if all(reward.weight == 0 for reward in config.rewards.values()):
        problems.append("rewards: every weight is 0, so there is nothing to learn from; give one a weight")
    return problems


def dump(config: BaseModel) -> str:
    """The resolved config as YAML, in the order of the class."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
