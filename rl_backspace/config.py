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

from rl_backspace.corrections import SOURCES, Source
from rl_backspace.errors import UserError, nearest
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
    """What deleting means. Saved with the policy."""

    tokens: dict[str, UnitName] = Field(
        default={"<|delete|>": "token"},
        description="token text -> how much one press takes: 'token', 'line', 'answer' or a number of tokens; "
        "{}: none, for a twin that cannot delete",
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
    dropout: Share = Field(
        default=0.0,
        description="dropout on the adapter's input, in the warm-up; in RL too if trainer.disable_dropout is false",
    )
    target_modules: str | list[str] = Field(default="all-linear", description="as in peft.LoraConfig")


class Warmup(Strict):
    """Correction warm-up: supervised, before RL, which never discovers a fresh token."""

    steps: Annotated[int, Field(ge=0)] = Field(default=1000, description="optimizer steps; 0: none")
    group: PositiveInt = Field(
        default=1, description="corrections made of each prompt; more share its computation, and teach fewer prompts"
    )
    sources: dict[Source, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default={"random": 1.0, "samples": 1.0},
        description="where errors come from, with weights: random, early, samples, uncertain, rollouts",
    )
    labels: Literal["prefixes", "answers"] = Field(
        default="prefixes",
        description="what tells an error: the task's own check of prefixes, or the reference answers alone",
    )
    clean: Share = Field(default=0.3, description="share of examples without an error")
    errors: PositiveInt = Field(default=2, description="most errors in one example")
    late: Annotated[int, Field(ge=0)] = Field(default=2, description="most tokens typed before an error is noticed")
    temperature: float = Field(
        default=1.0, ge=0.01, allow_inf_nan=False, description="of the model's own samples and rollouts"
    )
    entropy: float = Field(default=0.5, ge=0, allow_inf_nan=False, description="nats above which a choice is uncertain")
    refresh: PositiveInt = Field(
        default=100, description="steps after which the model is asked again for errors, and delete measured"
    )
    beta: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the KL term that keeps what is typed, deletes apart, near the base model's",
    )
    trainer: dict[str, Any] = Field(default={}, description="any field of transformers.TrainingArguments")


class PPO(Strict):
    """What `algorithm: ppo` takes besides `trainer`; the names are TRL's and the field's."""

    gamma: Share = Field(default=1.0, description="discount per action")
    lam: Share = Field(default=0.95, description="GAE's lambda: 1 trusts the rewards alone, 0 the critic")
    vf_coef: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="weight of the value loss")
    cliprange_value: Annotated[float, Field(gt=0)] | None = Field(
        default=0.2, description="how far a value may move from the old one in an update; null: as far as it likes"
    )
    whiten: bool = Field(default=True, description="advantages with mean 0 and standard deviation 1 in each batch")


class Reward(Strict):
    fn: str = Field(description="'module:function' of rewards/, 'file.py:function' or 'package.module:function'")
    weight: float = Field(default=1.0, allow_inf_nan=False, description="its share of the total; 0: a metric only")
    kwargs: dict[str, Any] = Field(default={}, description="keyword arguments of the function")


class Evaluation(Strict):
    rows: PositiveInt = Field(default=1024, description="test prompts, at most")
    controls: Annotated[int, Field(ge=0)] = Field(
        default=0, description="tries of best-of-n, to examine the policy as `eval` does, into controls.json; 0: none"
    )


class Wandb(Strict):
    project: str = "rl-backspace"
    mode: Literal["online", "offline"] = Field(default="offline", description="offline needs no account")
    group: str | None = None
    tags: list[str] = []


def is_name(text: str) -> str:
    """The text, where it can be a folder's name; ValueError where not."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise ValueError("a letter or digit, then letters, digits, '.', '_' and '-'")
    return text


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes


class Config(Strict):
    """One experiment, from a base model to a policy that deletes."""

    name: Annotated[str, AfterValidator(is_name)] = Field(description="the run's folder is runs/<name>")
    model: str = Field(
        description="an embedded model (arith-1m, ...), a hub id, a path, or a run (with {seed}) to go on from"
    )
    task: Plugin
    rewards: dict[str, Reward] = Field(min_length=1)
    seed: Seed = 0
    delete: Delete = Delete()
    lora: Lora | None = Field(default=Lora(), description="null: train all parameters instead")
    warmup: Warmup = Warmup()
    algorithm: Literal["grpo", "ppo"] = Field(default="grpo", description="what RL compares a rollout with")
    ppo: PPO = PPO()
    audit: Literal["warn", "strict", "skip"] = Field(
        default="warn", description="whether a reward that can be farmed is told of before training, or refused"
    )
    trainer: dict[str, Any] = Field(default={}, description="any field of trl.GRPOConfig")
    evaluation: Evaluation = Evaluation()
    wandb: Wandb | None = Field(default=None, description="log to wandb too")


class MixedTask(Plugin):
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="how often it is drawn, next to others")


class PretrainConfig(Strict):
    """A base model from nothing, for experiments without a hub, or on from another one."""

    tasks: list[MixedTask] = Field(min_length=1, description="task blocks, each with a weight in the mixture")
    model: str | None = Field(
        default=None, description="embedded model, hub id or path to go on from, whose shape is kept"
    )
    seed: Seed = 0
    vocab_size: PositiveInt = Field(default=128, description="embedding rows; what the tokenizer leaves are spare")
    width: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    context: PositiveInt = Field(default=256, description="longest sequence in tokens")
    steps: PositiveInt = 7000
    batch: PositiveInt = Field(default=64, description="sequences per step")
    learning_rate: float = Field(default=2e-3, gt=0, allow_inf_nan=False, description="peak of a one-cycle schedule")


class PlainLoader(yaml.SafeLoader):
    """YAML as wandb reads it, in which a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Loader(PlainLoader):
    """In it 3e-4 is a number, as YAML 1.2 has it."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


class _ArgumentLoader(_Loader):
    """Takes Python's None too, which wandb's agent writes for null."""


_ArgumentLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), ["N"])  # type: ignore[no-untyped-call]
for _yaml in (_Loader, _Dumper, _ArgumentLoader):
    _yaml.add_implicit_resolver(  # type: ignore[attr-defined]
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
    )


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = _Loader) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of an experiment file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that does not exist
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


def override(content: dict[str, Any], arguments: Sequence[str]) -> None:
    """Apply `a.b.c=value` or `--a.b.c=value`; `reward.` may stand for `rewards.`.

    Raises:
        UserError: arguments that are not of that form, a line each.
    """
    problems = [problem for argument in arguments if (problem := _override(content, argument))]
    if problems:
        raise UserError("\n".join(problems))


def _override(content: dict[str, Any], argument: str) -> str | None:
    """Apply one argument; what is wrong with it, or None."""
    key, equals, value = argument.removeprefix("--").partition("=")
    names = key.split(".")
    if not equals or not all(names):
        return f"override {argument!r}: expected key=value, such as trainer.learning_rate=1e-4"
    if names[0] == "reward":
        names[0] = "rewards"
    for name in names[:-1]:
        if content.get(name) is None:
            content[name] = {}
        if not isinstance(content[name], dict):
            return f"override {argument!r}: {name} is {content[name]!r}, which has no keys"
        content = content[name]
    try:
        content[names[-1]] = yaml.load(value, _ArgumentLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"override {argument!r}: {value!r} is not a YAML value"
    return None


def parse(content: Mapping[str, Any]) -> Config:
    """Check everything that needs no model or data; all mistakes at once.

    Raises:
        UserError: one line per mistake.
    """
    problems: list[str] = []
    config = validate(Config, content, problems)
    trainer, warmup = content.get("trainer"), content.get("warmup")
    if isinstance(trainer, dict):
        problems += trainer_problems(trainer, "trainer", "GRPOConfig")
    if isinstance(warmup, dict) and isinstance(warmup.get("trainer"), dict):
        problems += trainer_problems(warmup["trainer"], "warmup.trainer", "TrainingArguments")
    problems += _combinations(content)
    if problems or config is None:
        raise UserError("\n".join(problems))
    return config


def parse_pretrain(content: Mapping[str, Any]) -> PretrainConfig:
    problems: list[str] = []
    config = validate(PretrainConfig, content, problems)
    problems += _sizes(content)
    if problems or config is None:
        raise UserError("\n".join(problems))
    return config


_Model = typing.TypeVar("_Model", bound=BaseModel)


def validate(model: type[_Model], content: Mapping[str, Any], problems: list[str]) -> _Model | None:
    """A block as the model has it, or None; then `problems` gets a line for each mistake."""
    try:
        return model.model_validate(dict(content))
    except ValidationError as error:
        problems += _lines(model, content, error)
        return None


def _lines(model: type[BaseModel], content: Mapping[str, Any], error: ValidationError) -> list[str]:
    """One line per mistake; what the members of a union expected is one mistake."""
    issues: dict[tuple[Any, ...], list[Any]] = {}
    for issue in error.errors():
        issues.setdefault(_path(content, issue["loc"]), []).append(issue)
    outer = {path[:length] for path in issues for length in range(len(path))}  # the mistake is further in
    return [_line(model, content, path, found) for path, found in issues.items() if path not in outer]


def _path(content: Any, location: Sequence[Any]) -> tuple[Any, ...]:
    """pydantic's location without the names of union members and checks, which it puts between the keys."""
    path = []
    node = content
    for part in location:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and part in range(len(node))):
            node = node[part]
            path.append(part)
    return tuple(path)


def _line(model: type[BaseModel], content: Mapping[str, Any], path: tuple[Any, ...], issues: list[Any]) -> str:
    key, issue = ".".join(map(str, path)), issues[0]
    if issue["type"] == "extra_forbidden":
        known = _fields(model, path[:-1])
        return f"{key}: unknown key{nearest(path[-1], known)}; known here: {', '.join(known)}"
    if issue["type"] == "missing":
        missing = ".".join(map(str, issue["loc"]))
        return f"{missing}: missing; add it{_slip(content, issue['loc'])}"
    expected = ", or ".join(dict.fromkeys(_expected(issue) for issue in issues))
    return f"{key}: expected {expected}; got {issue['input']!r} ({type(issue['input']).__name__})"


def _expected(issue: Any) -> str:
    named = {
        "model_type": "a block of keys",
        "dict_type": "a block of keys",
        "too_short": "at least one entry",
        "invalid_key": "text as a key",
    }
    message = issue["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return named.get(issue["type"]) or f"{'a number ' * message.startswith(('greater', 'less'))}{message}"


def _slip(content: Any, location: Sequence[Any]) -> str:
    """A hint for a missing key: the key or block that may have been meant for it."""
    if location[-1] == "fn" and len(location) > 1:
        *outer, name = location[:-1]
        for part in outer:
            content = content[part]
        return nearest("fn", content[name]) or nearest(name, [other for other in content if other != name])
    return ""


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Field names of the block at a path, walking through nested blocks and mappings of blocks."""
    current: Any = model
    for name in path:
        if typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        else:
            current = current.model_fields[name].annotation
            if typing.get_origin(current) is not dict:  # Lora | None
                current = next((a for a in typing.get_args(current) if hasattr(a, "model_fields")), current)
    return list(current.model_fields)


OURS = {
    "output_dir": "the run folder is set by name or --out",
    "seed": "set the top-level seed",
    "report_to": "add the top-level block wandb",
    "reward_weights": "set each reward's weight in rewards",
}
WARMUP_OURS = {
    "max_steps": "set warmup.steps",
    "remove_unused_columns": "the warm-up's columns are its own",
}


def _steps(steps: int) -> int:
    if steps < -1:
        raise ValueError("a number of steps, 0 to stop after the warm-up, or -1 to train for trainer.num_train_epochs")
    return steps


LIMITS: dict[str, Any] = {  # what rollouts take, and choices that TRL would refuse only once it trains
    "temperature": Annotated[float, Field(gt=0)],
    "top_k": Annotated[int, Field(ge=0)],
    "top_p": Annotated[float, Field(gt=0, le=1)],
    "min_p": Share | None,
    "max_completion_length": PositiveInt,
    "per_device_train_batch_size": PositiveInt,
    "num_generations": PositiveInt,
    "max_steps": Annotated[int, AfterValidator(_steps)],
    "num_train_epochs": Annotated[float, Field(gt=0)],
    "loss_type": Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"],
    "importance_sampling_level": Literal["token", "sequence"],
    "scale_rewards": bool | Literal["group", "batch", "none"],
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
}
UNSUPPORTED = {
    "use_vllm": "rollouts with deletes run in this project's own engine",
    "use_transformers_continuous_batching": "rollouts with deletes run in this project's own engine",
    "generation_kwargs": "rollouts with deletes run in this project's own engine",
    "cache_implementation": "rollouts with deletes run in this project's own engine",
    "repetition_penalty": "exact scoring does not know it",
    "use_liger_kernel": "it replaces the forward that scoring calls",
    "cast_lm_head_to_fp32": "the delete token's own row is trained there",
    "push_to_hub": "the run folder is yours to upload",
    "eval_strategy": "test prompts are measured before and after; set evaluation.rows",
    "eval_on_start": "test prompts are measured before and after; set evaluation.rows",
    "chat_template_kwargs": "prompts are rendered by the tokenizer's chat template as it is; edit the template",
    "model_init_kwargs": "the base model is loaded as its own config.json says; edit that",
    "resume_from_checkpoint": "name a run as the model to go on from it",
    "sync_ref_model": "the reference is the policy as it was when RL began",
}


NOT_PPO: dict[str, tuple[tuple[Any, ...], str]] = {  # what is harmless, and why all else is refused
    "scale_rewards": ((None, "group", True, "none", False), "its advantages are scaled by ppo.whiten, not by groups"),
    "multi_objective_aggregation": ((None, "sum_then_normalize"), "its advantages are scaled by ppo.whiten"),
    "off_policy_mask_threshold": ((None,), "it wants one advantage per rollout"),
    "mask_truncated_completions": ((None, False), "an episode that was cut short would have no end to learn from"),
}
WARMUP_UNSUPPORTED = {
    "dataloader_num_workers": "corrections come from what the model does now, which workers would not see",
    "train_sampling_strategy": "corrections have no lengths before they are made",
}


def trainer_problems(
    fields: Mapping[str, Any], where: str, kind: Literal["GRPOConfig", "TrainingArguments"]
) -> list[str]:
    """Names and types against TRL's or transformers' own config class; one line per mistake."""
    types, defaults = _trainer_types(kind)
    warmup = kind == "TrainingArguments"
    ours = {**OURS, **(WARMUP_OURS if warmup else {})}
    unsupported = {**UNSUPPORTED, **(WARMUP_UNSUPPORTED if warmup else {})}
    problems = []
    for key, value in fields.items():
        if not isinstance(key, str):
            continue  # the block's own check names it
        if key not in types:
            problems.append(f"{where}.{key}: {kind} has no such field{nearest(key, types)}")
        elif key in ours:
            problems.append(f"{where}.{key}: not here; {ours[key]}")
        elif problem := type_problem(types[key], value, strict=not _is_enum(types[key])):
            problems.append(f"{where}.{key}: {problem}")
        elif key in unsupported and value and value != defaults[key]:
            problems.append(f"{where}.{key}: not supported; {unsupported[key]}")
    return problems


def type_problem(annotation: Any, value: Any, strict: bool = True) -> str | None:
    """`expected ...; got ...` where a value is not of an annotated type, else None."""
    try:
        TypeAdapter(annotation).validate_python(value, strict=strict)
    except ValidationError as error:
        expected = ", or ".join(dict.fromkeys(map(_expected, error.errors())))
        return f"expected {expected}; got {value!r} ({type(value).__name__})"
    return None


def _trainer_types(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types and the defaults of the fields of TRL's or transformers' config class."""
    if kind == "GRPOConfig":
        from trl import GRPOConfig as cls
    else:
        from transformers import TrainingArguments as cls
    fields = [field for field in dataclasses.fields(cls) if field.init]
    hints = {**typing.get_type_hints(cls), **LIMITS}
    return {field.name: hints[field.name] for field in fields}, {field.name: field.default for field in fields}


def _is_enum(annotation: Any) -> bool:
    import enum

    return any(isinstance(a, type) and issubclass(a, enum.Enum) for a in (annotation, *typing.get_args(annotation)))


def _combinations(content: Mapping[str, Any]) -> list[str]:
    """Settings that are each valid but cannot work together; blocks that are not valid are left out."""
    problems = []
    trainer = content.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    answer, steps = trainer.get("max_completion_length"), trainer.get("max_steps")
    rl = type(steps) is not int or steps != 0
    warmup = _part(Warmup, content.get("warmup", {}))
    if warmup is not None and warmup.steps == 0 and not rl:
        problems.append("trainer.max_steps: 0, and warmup.steps is 0 too: nothing to train; give one of them steps")
    warmup = content.get("warmup")
    sources = _part(dict[str, float], warmup.get("sources")) if isinstance(warmup, dict) else None
    if sources is not None and not any(sources.values()):
        problems.append(
            f"warmup.sources: the weights {sources} sum to nothing; give one of {', '.join(SOURCES)} a weight above 0"
        )
    delete = _part(Delete, content.get("delete", {}))
    if delete is not None and delete.budget is not None and type(answer) is int and delete.budget < answer:
        problems.append(
            f"delete.budget: {delete.budget} actions cannot type an answer of trainer.max_completion_length={answer} "
            "tokens; raise the one or lower the other"
        )
    if delete is not None and "line" in delete.tokens.values() and not delete.boundary:
        problems.append("delete.boundary: empty, but a delete token takes back a 'line'; give the text that ends one")
    if content.get("algorithm") == "ppo":
        problems += [
            f"trainer.{key}: got {trainer[key]!r}, not with ppo; {why}"
            for key, (harmless, why) in NOT_PPO.items()
            if trainer.get(key) not in harmless
        ]
    rewards = _part(dict[str, Reward], content.get("rewards"))
    if rl and rewards and all(reward.weight == 0 for reward in rewards.values()):
        problems.append("rewards: every weight is 0, so there is nothing to learn from; give one a weight")
    return problems


def _sizes(content: Mapping[str, Any]) -> list[str]:
    """Sizes of a base model that are each valid but make none; sizes that are not valid are left out."""
    from rl_backspace.pretrain import character_tokenizer

    if content.get("model") is not None:
        given = [name for name in ("vocab_size", "width", "layers", "heads", "context") if name in content]
        return [f"{name}: {content['model']!r} has a shape of its own; leave {name} out" for name in given]
    defaults = {name: field.default for name, field in PretrainConfig.model_fields.items()}
    vocab_size, width, heads = (
        _part(PositiveInt, content.get(name, defaults[name])) for name in ("vocab_size", "width", "heads")
    )
    problems = []
    characters = len(character_tokenizer())
    if vocab_size and vocab_size <= characters:
        problems.append(
            f"vocab_size: got {vocab_size}; the tokenizer's {characters} characters and a spare row for a delete "
            f"token need {characters + 1} or more"
        )
    if width and heads and width % (2 * heads):
        problems.append(
            f"width: {width} is not an even number for each of {heads} heads; give a multiple of {2 * heads}"
        )
    return problems


def _part(kind: Any, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return None


def dump(config: BaseModel) -> str:
    """The resolved config as YAML, in the order of the class."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
