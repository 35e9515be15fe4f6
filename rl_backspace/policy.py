"""A policy: a stock model with a delete token, trained by a LoRA adapter or as a whole, and the folder it is saved in.

The folder holds PEFT's adapter or a stock checkpoint, the tokenizer with the delete token in it, and
`delete.json`: the semantics the policy was trained with, without which its tokens mean nothing.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rl_backspace.backbone import Backbone, causal_lm, evaluating
from rl_backspace.config import Delete, Lora
from rl_backspace.engine import GREEDY, Engine, Rollout, Sampling
from rl_backspace.errors import UserError, first_line, nearest, one_line
from rl_backspace.folder import RunFolder, is_run
from rl_backspace.generation import IN_CONFIG, SUPPRESSED
from rl_backspace.scoring import batched, pack, score
from rl_backspace.semantics import SEMANTICS_FILE, Budget, Rules

EMBEDDED = Path(__file__).parent / "models"
CRITIC_FILE = "critic.safetensors"


class Critic(nn.Linear):
    """PPO's value head: hidden states (..., H) -> values (..., 1), in float32; it starts at zero."""

    def __init__(self, width: int):
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    @classmethod
    def like(cls, model: Any) -> Critic:
        """One for a model's hidden states."""
        base = model.get_input_embeddings()
        return cls(model.config.get_text_config().hidden_size).to(base.weight.device)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / CRITIC_FILE)

    def restore(self, folder: Path) -> None:
        """The weights saved in a folder, where there are some."""
        if (folder / CRITIC_FILE).exists():
            self.load_state_dict(load_file(folder / CRITIC_FILE))


@dataclass
class Policy:
    """A model that can delete.

    Attributes:
        model: a PeftModel, or a plain model for one that is trained as a whole.
        tokenizer: with the delete tokens in its vocabulary.
        rules: what they do.
        critic: what PPO learned of how states end, to go on from; None where it has not trained.
        chat: whether it was trained on chat messages, and not on text.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    rules: Rules
    critic: Critic | None = None
    chat: bool = False

    def encode(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts: text, or lists of chat messages.

        Raises:
            UserError: the tokenizer has no chat template, or it refuses the messages; or there are both kinds, or
                something else.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts: got the text {prompts!r}; expected a list, such as [{prompts!r}]")
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, (str, list))]:
            raise UserError(f"prompts: got {wrong[0]!r}; expected text or a list of chat messages")
        if not prompts:
            return []
        kinds = {isinstance(prompt, list) for prompt in prompts}
        if kinds == {False}:
            return self.tokenizer(text=prompts)["input_ids"]
        if len(kinds) > 1:
            raise UserError("task: some prompts are text and some are chat messages; expected one kind")
        if self.tokenizer.chat_template is None:
            raise UserError(
                "task: the prompts are chat messages, but the model's tokenizer has no chat template; "
                "give prompts as text, or a model that was made for chat"
            )
        try:
            encoded = self.tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # templates are programs of their own
            raise UserError(f"task: the model's chat template refuses a prompt: {one_line(error)}") from error
        return encoded["input_ids"]

    def text(self, visible: list[int]) -> str:
        """The text that a user reads."""
        return self.tokenizer.decode(visible, skip_special_tokens=True)

    def generate(
        self,
        prompts: list[Any],
        budget: Budget,
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
    ) -> list[Rollout]:
        """Answer prompts, text or lists of chat messages; one rollout each, with its trace.

        Raises:
            UserError: a prompt is empty, or does not fit the model's context together with the budget.
        """
        return Engine(self.model, self.rules).run(self.encode(prompts), budget, sampling, generator)

    @torch.no_grad()
    def score(self, rollouts: list[Rollout], budget: Budget | None = None, temperature: float = 1.0) -> list[Tensor]:
        """Log-probability of each action of some rollouts, by this policy, in the context it was chosen in.

        Args:
            rollouts: traces of any policy with the same rules; their own `logprobs` are not looked at.
            budget: what they were made under, which decides when a delete was legal; default: no limit.

        Raises:
            UserError: the temperature is not above 0.
            semantics.IllegalAction: a trace has an action that the rules or the budget forbid.
        """
        if not rollouts:
            return []
        ids, mask = batched([r.prompt for r in rollouts], [r.actions for r in rollouts], pad=0)
        device = causal_lm(self.model).device
        steps = max(len(rollout.actions) for rollout in rollouts)
        packed = pack(ids.to(device), mask.to(device), steps, self.rules, budget)
        with evaluating(causal_lm(self.model)):
            logprobs, _ = score(self.model, packed, temperature)
        return [row[: len(rollout.actions)] for row, rollout in zip(logprobs, rollouts, strict=True)]

    @property
    def whole(self) -> bool:
        """Whether there is no adapter: all of the model is the policy's own."""
        return isinstance(self.model, PreTrainedModel)

    @property
    def base(self) -> str:
        """The base model's name; of an embedded one without its path, which differs elsewhere."""
        path = self.model.name_or_path
        return Path(path).name if Path(path).parent == EMBEDDED else path

    def save(self, folder: Path) -> None:
        """Write the folder anew beside the old one, then swap: a full disk or an interrupt leaves the old one whole.

        Raises:
            UserError: the weights are not numbers, and an older policy is not to be lost for them.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not all(parameter.isfinite().all() for parameter in trained):
            raise UserError(f"training diverged: the weights are not numbers, so {folder} is left as it was")
        new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.whole:
            _save_whole(self.model, new, sorted(self.rules.deletes))
        else:
            self.model.save_pretrained(new, save_embedding_layers=False, selected_adapters=["default"])
        self.tokenizer.save_pretrained(new)
        if self.critic is not None:
            self.critic.save(new)
        (new / SEMANTICS_FILE).write_text(json.dumps(self.semantics(), indent=2) + "\n")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def semantics(self) -> dict[str, Any]:
        """What is saved of the rules, and `Rules.of` reads."""
        rules = self.rules
        texts = {self.tokenizer.convert_ids_to_tokens(index): index for index in rules.deletes}
        saved = {
            "tokens": {text: rules.deletes[index] for text, index in texts.items()},
            "ids": texts,
            "memory": rules.memory,
            "retry": rules.retry,
            "boundaries": sorted(rules.boundaries),
            "eos": sorted(rules.eos),
        }
        elsewhere = {} if self.whole or self.base == self.model.name_or_path else {"model": self.base}
        base = {} if self.whole else {"layers": self.model.config.get_text_config().num_hidden_layers}
        return {**saved, **elsewhere, **base, **({"chat": True} if self.chat else {})}


def find_base(model: str) -> tuple[str, str]:
    """A base model's folder or hub id, and what else could be given; neither loads it nor asks the hub.

    Raises:
        UserError: it can be none of the three.
    """
    embedded = [path.parent.name for path in sorted(EMBEDDED.glob("*/config.json"))]
    source = str(EMBEDDED / model) if model in embedded else model
    advice = f"give an embedded model ({', '.join(embedded)}), a hub id or a local path"
    hint = nearest(model, embedded) if "/" not in model else ""  # that may be a folder still to be made
    if not Path(source).exists() and (hint or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)):
        raise UserError(f"model: {model!r} is no folder{hint}; {advice}")
    return source, advice


def load_base(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An embedded model by name, or any causal LM by hub id or local path; float32 unless saved otherwise.

    Raises:
        UserError: it cannot be found or is no causal language model.
    """
    source, advice = find_base(model)
    try:
        AutoConfig.from_pretrained(source)  # first, for its errors are the clearest
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        base = AutoModelForCausalLM.from_pretrained(source)
    except Exception as error:  # a folder may hold anything, and each loader has errors of its own
        raise UserError(f"model: {model!r} cannot be loaded ({first_line(error).rstrip('.')}); {advice}") from error
    place(base)
    _allow(base)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of {model!r} has no end-of-sequence token; answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return base, tokenizer


def create(model: str, delete: Delete, lora: Lora | None, seed: int) -> Policy:
    """A fresh policy: the base model with its delete tokens, and an untrained adapter or all of it trainable.

    Raises:
        UserError: no such model, one that cannot rewind, no spare row for a delete token, a LoRA that scoring
            cannot see, or without LoRA weights that cannot be trained.
    """
    base, tokenizer = load_base(model)
    Backbone(base)  # refuses what cannot rewind, before LoRA finds something else amiss
    torch.manual_seed(seed)
    ids = {text: _add_token(text, base, tokenizer) for text in delete.tokens}
    rules = Rules(
        deletes={ids[text]: unit for text, unit in delete.tokens.items()},
        eos=_eos(base, tokenizer),
        memory=delete.memory,
        retry=delete.retry,
        boundaries=_boundaries(tokenizer, delete.boundary) if "line" in delete.tokens.values() else frozenset(),
    )
    trained = _unfreeze(base) if lora is None else _adapt(base, lora, sorted(rules.deletes))
    policy = Policy(trained, tokenizer, rules)
    setattr(base.generation_config, IN_CONFIG, policy.semantics())
    return policy


def _unfreeze(base: PreTrainedModel) -> PreTrainedModel:
    """All parameters trainable and in float32, as PEFT's are: bfloat16 would round steps as small as RL's away."""
    if getattr(base, "hf_quantizer", None) is not None:
        raise UserError(
            f"lora: null trains all parameters, but those of this {type(base).__name__} are quantised; "
            "give a lora block, or a model that is not"
        )
    return base.float().requires_grad_(True)


def _adapt(base: PreTrainedModel, lora: Lora, rows: list[int]) -> Any:
    """The base in an untrained LoRA adapter, which also trains these rows of the embedding."""
    import peft

    if lora.target_modules != "all-linear" and any(name.endswith("lm_head") for name in _as_list(lora.target_modules)):
        raise UserError("lora.target_modules: lm_head cannot carry LoRA; the delete token's own row is trained already")
    bias = getattr(base.get_output_embeddings(), "bias", None)
    if rows and bias is not None and bias.any():
        raise UserError(
            f"lora: the output head of {type(base).__name__} has a bias, which PEFT leaves out where it trains some of "
            "its rows; train the whole model (lora: null), or another one"
        )
    adapter = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        trainable_token_indices=_token_layers(base, rows) if rows else None,
    )
    try:
        return peft.get_peft_model(base, adapter)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lora.target_modules: {lora.target_modules!r} does not fit {type(base).__name__}: {first_line(error)}"
        ) from error


def load(folder: str | Path, trainable: bool = False) -> Policy:
    """A saved policy: the whole model, or its base model with the adapter on it.

    Args:
        folder: a run, its `adapter` or `model`, or what `rl-backspace export` wrote.
        trainable: go on training it.

    Raises:
        UserError: the folder is not a policy of this project, or an adapter's base cannot be loaded.
    """
    import peft

    folder = RunFolder.open(Path(folder)).policy if is_run(Path(folder)) else Path(folder)
    try:
        saved = json.loads((folder / SEMANTICS_FILE).read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        rules = _rules(saved, tokenizer, folder)
        if (folder / "config.json").exists():
            model = place(AutoModelForCausalLM.from_pretrained(folder)).requires_grad_(trainable)
            _allow(model)
        else:
            base_name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
            base, _ = load_base(saved.get("model", base_name))
            _make_room(base, max(rules.deletes, default=0) + 1)
            model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
            _check_fit(model, folder, saved.get("layers"))
    except UserError:
        raise
    except Exception as error:  # files that are missing, cut short or another project's
        raise UserError(
            f"{folder}: no whole adapter or model of rl-backspace here ({one_line(error)}); "
            "expected RUN/adapter or RUN/model"
        ) from error
    policy = Policy(model, tokenizer, rules, chat=bool(saved.get("chat")))
    setattr(causal_lm(model).generation_config, IN_CONFIG, policy.semantics())  # for `generate`
    if (folder / CRITIC_FILE).exists():
        policy.critic = Critic.like(model)
        policy.critic.restore(folder)
    return policy


def _check_fit(model: Any, folder: Path, layers: int | None) -> None:
    """Refuse an adapter whose weights are not those that this base has a place for; PEFT leaves out the others."""
    import peft

    here, base = model.config.get_text_config().num_hidden_layers, model.name_or_path
    if layers not in (None, here):
        raise UserError(
            f"{folder}: the adapter does not fit its base {base}, which has {here} layers, not {layers}; "
            "give the base it was trained on"
        )

    file = folder / "adapter_model.safetensors"
    if not file.exists():
        return
    with safe_open(file, "pt") as saved:
        its = set(saved.keys())
    ours = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if strange := sorted(its ^ ours):
        raise UserError(
            f"{folder}: the adapter does not fit its base {base}: {len(its - ours)} of its {len(its)} weights have no "
            f"place there, {len(ours - its)} places have no weight ({strange[0]}, ...); give the base it was trained on"
        )


def _allow(model: PreTrainedModel) -> None:
    """Undo what `_save_whole` suppresses for other loaders."""
    config = model.generation_config
    ours = set((getattr(config, IN_CONFIG, None) or {}).get(SUPPRESSED, ()))
    if ours:
        config.suppress_tokens = [token for token in config.suppress_tokens or () if token not in ours] or None


def place(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the GPU, where there is one."""
    return model.to("cuda") if torch.cuda.is_available() else model


def _save_whole(model: PreTrainedModel, folder: Path, deletes: list[int]) -> None:
    """A stock checkpoint; who loads it without knowing of deletes gets the policy with its delete tokens blocked.

    Trainers turn the cache off in the config, and add the tokenizer's special tokens to the generation config,
    which transformers then refuses to save where it breaks a rule that published ones do break (a temperature
    without do_sample); so that file is written apart.
    """
    generation, model.generation_config = model.generation_config, GenerationConfig()
    model.config.use_cache = True
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation = copy.deepcopy(generation)
        listed = generation.suppress_tokens or []
        if more := [token for token in deletes if token not in listed]:
            generation.suppress_tokens = [*listed, *more]
            setattr(generation, IN_CONFIG, {**getattr(generation, IN_CONFIG), SUPPRESSED: more})
        generation._from_model_config = False  # else nothing of our own is read from it again
        generation.to_json_file(folder / "generation_config.json")


def _add_token(text: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a delete token: one that the vocabulary has already, a spare row of the embedding, or a new one."""
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        if vocabulary[text] in _eos(base, tokenizer) | {tokenizer.pad_token_id}:
            raise UserError(f"delete.tokens: {text!r} ends or pads answers already; name another token")
        return vocabulary[text]
    spare = max(vocabulary.values()) + 1
    _make_room(base, spare + 1)
    rows = base.get_input_embeddings().weight.shape[0]
    tokenizer.add_special_tokens({"additional_special_tokens": [text]}, replace_extra_special_tokens=False)
    index = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(index, int) or index >= rows or index in vocabulary.values():
        raise UserError(f"delete.tokens: {text!r} became row {index}, which is not a spare one of {rows}")
    with torch.no_grad():
        for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
            used = embedding.weight[:spare].float()  # a fresh row: the mean of the used ones, and noise
            noise = (
                torch.randn(used.shape[1]).to(used.device) * used.std(0) * 0.1
            )  # drawn on the CPU: the same everywhere
            embedding.weight[index] = (used.mean(0) + 0.1 * used.std(0) * noise).to(embedding.weight.dtype)
            if base.config.get_text_config().tie_word_embeddings:
                break
    return index


def _make_room(base: PreTrainedModel, rows: int) -> None:
    """Resize the embedding to so many rows, where it has fewer: most models are padded and have some to spare."""
    if base.get_input_embeddings().weight.shape[0] < rows:
        base.resize_token_embeddings(rows, mean_resizing=False)


def _token_layers(base: PreTrainedModel, rows: list[int]) -> Any:
    """Which embedding rows PEFT trains; untied models need the output's row named too, else it stays frozen."""
    if base.config.get_text_config().tie_word_embeddings:
        return rows
    names = {id(module): name.rpartition(".")[2] for name, module in base.named_modules()}
    return {names[id(base.get_input_embeddings())]: rows, names[id(base.get_output_embeddings())]: rows}


def _eos(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    listed = base.generation_config.eos_token_id if base.generation_config is not None else None
    return frozenset([tokenizer.eos_token_id, *(_as_list(listed) if listed is not None else [])])


def _boundaries(tokenizer: PreTrainedTokenizerBase, text: str) -> frozenset[int]:
    """Every token whose text ends with the boundary."""
    found = frozenset(i for i in range(len(tokenizer)) if tokenizer.decode([i]).endswith(text))
    if not found:
        raise UserError(f"delete.boundary: no token of this tokenizer ends with {text!r}; a 'line' could never end")
    return found


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _rules(saved: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Rules:
    """Saved rules, of ids that the tokenizer has for the delete tokens too."""
    try:
        rules = Rules.of(saved)
    except UserError as error:
        raise UserError(f"{folder}: no whole adapter or model of rl-backspace here ({error})") from error
    vocabulary = tokenizer.get_vocab()
    for text in saved["tokens"]:
        if text not in vocabulary:
            raise UserError(f"the tokenizer in this folder has no token {text!r}; it belongs to another policy")
        if vocabulary[text] != saved["ids"][text]:
            raise UserError(
                f"{folder}: the tokenizer's {text!r} is token {vocabulary[text]}, but {SEMANTICS_FILE} says "
                f"{saved['ids'][text]}; one of them belongs to another policy"
            )
    return rules
