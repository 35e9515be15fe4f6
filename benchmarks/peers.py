"""What one would write without this project: the other side of each case."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    StoppingCriteria,
    StoppingCriteriaList,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks.models import DELETE, DEVICE, EOS, PAD, USED, adapt, make
from rl_backspace.corrections import Correction
from rl_backspace.policy import Policy
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Rules
from rl_backspace.tasks import Task
from rl_backspace.trainer import BackspaceGRPOTrainer

PAGE = 32


def generate(
    model: PreTrainedModel, prompts: Tensor, answer: int, criteria: StoppingCriteriaList | None = None
) -> Tensor:
    """`model.generate`, sampling `answer` tokens for every row (B, P): no end-of-sequence, so lengths are equal; it
    ends when the criteria have ended every row."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=answer, pad_token_id=PAD, eos_token_id=None
    )
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=config, stopping_criteria=criteria
    )
    return out[:, prompts.shape[1] :]


def generate_batch(model: PreTrainedModel, prompts: list[list[int]], lengths: list[int], batch: int) -> int:
    """transformers' continuous batching, sampling for each prompt as many tokens as its length says, at most `batch`
    prompts at once; how many tokens came.

    With pages of 32 positions and room for `batch` of the longest, which on CPU it does not find out for itself.
    """
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=PAD, eos_token_id=-1)
    pages = -(-(len(prompts[0]) + max(lengths)) // PAGE) * batch
    batching = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=2 * pages,
        max_batch_tokens=batch * len(prompts[0]),
        max_requests_per_batch=batch,
    )
    going, tokens = len(prompts), 0
    with model.continuous_batching_context_manager(config, continuous_batching_config=batching, timeout=5) as manager:
        for prompt, length in zip(prompts, lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=length)
        while going:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                going, tokens = going - 1, tokens + len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("generate_batch ended before its requests did")
    return tokens


class Lengths(StoppingCriteria):
    """Ends each row when it has as many tokens as it is to have."""

    def __init__(self, prompt: int, lengths: Tensor):
        self.ends = (prompt + lengths).to(DEVICE)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


def generate_skewed(model: PreTrainedModel, prompts: Tensor, lengths: Tensor, batch: int) -> int:
    """`model.generate`, `batch` rows at a time, until the longest of them is done; how many tokens came that were
    asked for (what comes behind them in a shorter row does not count)."""
    tokens = 0
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        criteria = StoppingCriteriaList([Lengths(prompts.shape[1], lengths[part])])
        out = generate(model, prompts[part], int(lengths[part].max()), criteria)
        tokens += int(lengths[part].clamp(max=out.shape[1]).sum())
    return tokens


@torch.no_grad()
def crop(model: PreTrainedModel, prompt: list[int], actions: int) -> list[int]:
    """A trace of `actions` actions, one sequence, its KV cache cropped at each delete, as samplers that backtrack do.

    It keeps the logits of every visible position, so that a delete costs it no forward pass either.
    """
    cache = DynamicCache()
    trace: list[int] = []
    seen: list[Tensor] = []  # logits after the prompt, and after each visible token
    feed = list(prompt)
    while len(trace) < actions:
        if feed:
            ids = torch.tensor([feed], device=DEVICE)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seen.append(out.logits[0, -1].float())
        logits = seen[-1].clone()
        if len(seen) == 1 or len(trace) + 1 == actions:
            logits[DELETE] = -torch.inf
        action = int(torch.multinomial(logits.softmax(-1), 1))
        trace.append(action)
        feed = [] if action == DELETE else [action]
        if action == DELETE:
            seen.pop()
            cache.crop(-1)
    return trace


def backtrack_sampler(model: PreTrainedModel, prompt: list[int], actions: int) -> list[int]:
    """A trace of `actions` actions by the package of that name (`pip install backtrack_sampler`), one sequence: a token
    that deletes is a strategy of its own there. Its last action is the end of the sequence, which nothing else is."""
    from backtrack_sampler import BacktrackSampler
    from backtrack_sampler.provider.transformers_provider import TransformersProvider
    from backtrack_sampler.strategy.base_strategy import BaseStrategy

    trace: list[int] = []

    class DeleteToken(BaseStrategy):
        def get_keep_index(self) -> int:
            return 0

        def on_logits(self, logits: Tensor, tokens: list[int]) -> Tensor:
            if len(trace) + 1 == actions:
                return torch.full_like(logits, -torch.inf).index_fill_(-1, torch.tensor(EOS, device=DEVICE), 0.0)
            blocked = [EOS, DELETE] if not tokens else [EOS]
            return logits.index_fill(-1, torch.tensor(blocked, device=DEVICE), -torch.inf)

        def on_probs(self, probs: Tensor, tokens: list[int]) -> Tensor:
            return probs

        def on_next_token(self, tokens: list[int], probs: Tensor) -> None:
            trace.append(tokens[-1])

        def backtrack(self, tokens: list[int]) -> list[int]:
            return tokens[:-2] if tokens[-1] == DELETE else tokens

        def reset(self) -> None: ...

    tokenizer = character_tokenizer()
    provider = TransformersProvider(model, tokenizer, model.device)
    provider.encode = lambda text, add_special_tokens=True: list(prompt)
    for _ in BacktrackSampler(provider, DeleteToken()).generate("", top_k=0):
        pass
    return trace


@torch.no_grad()
def recompute(model: PreTrainedModel, prompt: list[int], actions: int) -> list[int]:
    """A trace of `actions` actions, one sequence, the whole context computed again for each; deletes take one token."""
    visible: list[int] = []
    trace: list[int] = []
    while len(trace) < actions:
        context = torch.tensor([prompt + visible], device=DEVICE)
        logits = model(input_ids=context, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        if not visible or len(trace) + 1 == actions:
            logits[DELETE] = -torch.inf
        action = int(torch.multinomial(logits.softmax(-1), 1))
        trace.append(action)
        if action == DELETE:
            visible.pop()
        else:
            visible.append(action)
    return trace


def contexts(prompt: list[int], trace: list[int]) -> Iterator[list[int]]:
    """The token ids that each action of a trace was chosen after."""
    visible: list[int] = []
    for action in trace:
        yield prompt + visible
        if action == DELETE:
            visible.pop()
        else:
            visible.append(action)


def score_prefixes(
    model: PreTrainedModel, prompts: list[list[int]], traces: list[list[int]], chunk: int, grad: bool = True
) -> Tensor:
    """Log-probability of every action, each context a sequence of its own; gradients add up in the model.

    Sequences are sorted by length and padded on the left, `chunk` to a forward pass, so that little is padding.
    A delete is illegal after the bare prompt and as the last action, as in rollouts with a budget of actions.
    """
    work = [
        (context, action, len(context) == len(prompt) or step + 1 == len(trace))
        for prompt, trace in zip(prompts, traces, strict=True)
        for step, (context, action) in enumerate(zip(contexts(prompt, trace), trace, strict=True))
    ]
    order = sorted(range(len(work)), key=lambda i: len(work[i][0]))
    out = torch.empty(len(work), device=DEVICE)
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        longest = len(work[part[-1]][0])
        padding = [longest - len(work[i][0]) for i in part]
        ids = torch.tensor([[PAD] * n + work[i][0] for n, i in zip(padding, part, strict=True)], device=DEVICE)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=DEVICE)
        with torch.set_grad_enabled(grad):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
            blocked = torch.tensor([i for i, j in enumerate(part) if work[j][2]], dtype=torch.long, device=DEVICE)
            illegal = blocked, torch.tensor(DELETE, device=DEVICE)
            logits = logits.float().index_put(illegal, logits.new_tensor(-torch.inf))
            chosen = logits.log_softmax(-1).gather(1, torch.tensor([[work[i][1]] for i in part], device=DEVICE))[:, 0]
            if grad:
                chosen.sum().backward()
        out[part] = chosen.detach()
    return out


def score_flat(model: PreTrainedModel, ids: Tensor, actions: int) -> Tensor:
    """Log-probabilities (B, K) of the last `actions` tokens of each row (B, P + K), as TRL computes them; gradients of
    their sum add up in the model."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=actions + 1).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(2, ids[:, -actions:, None])[:, :, 0]
    chosen.sum().backward()
    return chosen.detach()


def low(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward with a spread."""
    return [sum(token < USED // 2 for token in ids) / (1 + len(ids)) for ids in completion_ids]


def grpo_trainer(
    size: str, batch: int, prompt: int, actions: int, group: int, steps: int, deletes: float, ours: bool, folder: str
) -> GRPOTrainer:
    """A trainer of `steps` steps with LoRA: this project's, whose policy deletes, or TRL's, which samples by
    `model.generate`. Nothing ends an answer before `actions`; the reward is the share of low token ids."""
    tokenizer = character_tokenizer()
    model = make(size, deletes, prompt + actions)
    model.config.eos_token_id = None
    dice = random.Random(0)
    texts = ["".join(dice.choices(string.ascii_letters, k=prompt)) for _ in range(batch // group * 8)]
    dataset = datasets.Dataset.from_dict({"prompt": texts, "row": list(range(len(texts)))})
    arguments = GRPOConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        num_generations=group,
        max_completion_length=actions,
        learning_rate=1e-6,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        generation_kwargs={"suppress_tokens": [EOS]},  # of TRL's generation; ours knows no end
        disable_tqdm=True,
    )
    if ours:
        policy = Policy(adapt(model), tokenizer, Rules({DELETE: "token"}, eos=frozenset()))
        rows = [{"prompt": text, "answer": ""} for text in texts]
        budget = Budget(answer=actions, actions=actions)
        trainer: GRPOTrainer = BackspaceGRPOTrainer(policy, Task(rows, rows), budget, [low], arguments, dataset)
    else:
        trainer = GRPOTrainer(adapt(model), low, arguments, dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclass
class Branch:
    """A plain sequence and what is learned in it.

    Attributes:
        ids: the prompt and what stands behind it, a context that is the prefix of no other one.
        weight: of each target, so that those of a correction weigh 1 together.
        labels: index into `ids` of the token that it is chosen after, target, token ids that are illegal there.
    """

    ids: list[int]
    weight: float
    labels: list[tuple[int, int, list[int]]] = field(default_factory=list)


def branches(prompt: list[int], correction: Correction, actions: int) -> list[Branch]:
    """A correction as plain sequences: as few as hold all contexts in which it learns, each target in one of them.

    Deletes take one token, which may not be typed there again; one is illegal after the bare prompt and as the last
    of a budget of `actions`.
    """
    visible: list[int] = []
    tried: list[list[int]] = [[]]
    learned: list[tuple[list[int], int, list[int]]] = []
    for step, (action, target) in enumerate(zip(correction.actions, correction.targets, strict=True)):
        if correction.learn[step]:
            must_type = not visible or step + 1 == actions
            learned.append((prompt + visible, target, tried[-1] + [DELETE] * must_type))
        if action == DELETE:
            tried.pop()
            tried[-1].append(visible.pop())
        else:
            visible.append(action)
            tried.append([])
    out: list[Branch] = []
    for context, target, illegal in sorted(learned, key=lambda choice: len(choice[0]), reverse=True):
        branch = next((branch for branch in out if branch.ids[: len(context)] == context), None)
        if branch is None:
            branch = Branch(context, 1 / len(learned))
            out.append(branch)
        branch.labels.append((len(context) - 1, target, illegal))
    return out


def score_branches(model: PreTrainedModel, sequences: list[Branch], chunk: int, grad: bool = True) -> Tensor:
    """Log-probability of every target, sequence by sequence; gradients of the loss add up in the model.

    The loss is the mean over what a correction teaches, then over corrections, as the warm-up's.
    Sequences are sorted by length, `chunk` to a forward pass, so that little is padding. It stands on the right, where
    causal attention does not see it, with and without a mask.
    """
    corrections = sum(branch.weight * len(branch.labels) for branch in sequences)
    order = sorted(sequences, key=lambda branch: len(branch.ids))
    out = []
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        longest = len(part[-1].ids)
        ids = torch.tensor([branch.ids + [PAD] * (longest - len(branch.ids)) for branch in part], device=DEVICE)
        labels = [(row, *label) for row, branch in enumerate(part) for label in branch.labels]
        first = min(place for _, place, _, _ in labels)
        blocked = [(i, token) for i, (*_, illegal) in enumerate(labels) for token in illegal]
        rows, places, targets = torch.tensor([label[:3] for label in labels], device=DEVICE).unbind(1)
        with torch.set_grad_enabled(grad):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest - first).logits[rows, places - first]
            illegal = torch.tensor(blocked, dtype=torch.long, device=DEVICE).reshape(-1, 2).unbind(1)
            logits = logits.float().index_put(illegal, logits.new_tensor(-torch.inf))
            chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            if grad:
                weights = torch.tensor([part[row].weight for row, *_ in labels], device=DEVICE)
                (-(weights * chosen).sum() / corrections).backward()
        out.append(chosen.detach())
    return torch.cat(out)
