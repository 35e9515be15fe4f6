"""Exact log-probabilities: every action of a trace in the context it was chosen in, by one forward pass.

A flat prompt + trace is the wrong context from the first delete on. Here each trace takes as many slots as
it has actions (`semantics.layout`): an action's slot stands for the context after it, attends to that
context alone, and its output scores the next action. So shapes are those of any causal LM, and the layout
depends on input_ids and attention_mask only: policy, old and reference log-probs follow from one function.

Shapes: B traces, P prompt slots (left-padded), K action slots (right-padded), L = P + K, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rl_backspace.backbone import attention_mask, causal_lm
from rl_backspace.semantics import Budget, Rules, layout


@dataclass(frozen=True)
class Packed:
    """Traces ready for one forward pass.

    Attributes:
        input_ids: (B, L) token ids to feed.
        position_ids: (B, L).
        allowed: (B, 1, L, L) bool, True where the slot of row i may attend to the slot of column j.
        actions: (B, K) the actions to score; padding where a trace is shorter.
        illegal: three index tensors (n,), (n,), (n,): row, step and token id of each illegal action.
    """

    input_ids: Tensor
    position_ids: Tensor
    allowed: Tensor
    actions: Tensor
    illegal: tuple[Tensor, Tensor, Tensor]


def pack(input_ids: Tensor, attention_mask: Tensor, steps: int, rules: Rules, budget: Budget | None = None) -> Packed:
    """Lay out prompts and traces, (B, L) with the traces in the last `steps` columns.

    Args:
        input_ids: left-padded prompts, then right-padded raw traces: TRL's `prompt_ids` and `completion_ids`.
        attention_mask: (B, L), 1 for real tokens.
        steps: K.
        rules, budget: what the traces were sampled under; together they fix which actions were legal.

    Raises:
        semantics.IllegalAction: a trace has an action that the rules or the budget forbid.
    """
    rows, length = input_ids.shape
    device, start = input_ids.device, length - steps
    ids, real = input_ids.cpu(), attention_mask.cpu().bool()
    pads = (~real[:, :start]).sum(1)  # (B,)
    packed = ids.clone()
    positions = (torch.arange(length) - pads[:, None]).clamp(min=0)
    parents = torch.arange(-1, steps - 1).repeat(rows, 1)  # (B, K); -1 is the prompt's end
    at_prompt = torch.zeros(rows, steps, dtype=torch.bool)  # copies of the prompt's last token
    banned: list[tuple[int, int, int]] = []
    branches = False
    for row in range(rows):
        count = int(real[row, start:].sum())
        trace = ids[row, start : start + count].tolist()
        out = layout(trace, rules, budget)
        banned += [(row, step, token) for step, tokens in enumerate(out.illegal) for token in tokens]
        if not any(action in rules.deletes for action in trace):
            continue
        branches = True
        last = int(ids[row, start - 1])
        end = slice(start, start + count)
        packed[row, end] = torch.tensor([last if token is None else token for token in out.tokens])
        positions[row, end] = torch.tensor(out.positions) + start - pads[row]
        parents[row, :count] = torch.tensor(out.parents)
        at_prompt[row, :count] = torch.tensor([token is None for token in out.tokens])
    return Packed(
        packed.to(device),
        positions.to(device),
        _allowed(real.to(device), parents.to(device), at_prompt.to(device), branches),
        input_ids[:, start:],
        tuple(torch.tensor(banned, dtype=torch.long, device=device).reshape(-1, 3).unbind(1)),  # type: ignore[arg-type]
    )


def _allowed(real: Tensor, parents: Tensor, at_prompt: Tensor, branches: bool) -> Tensor:
    """(B, 1, L, L) bool: each slot sees the prompt, its chain of parents and itself."""
    rows, length = real.shape
    steps = parents.shape[1]
    start = length - steps
    allowed = torch.ones(length, length, dtype=torch.bool, device=real.device).tril().repeat(rows, 1, 1)
    if branches:
        chain = torch.zeros(rows, steps, steps + 1, dtype=torch.bool, device=real.device)  # column K: no parent
        every = torch.arange(rows, device=real.device)
        for step in range(steps):
            if step:
                parent = parents[:, step]
                chain[:, step] = chain[every, parent] & (parent >= 0)[:, None]
            chain[:, step, step] = True
        allowed[:, start:, start:] = chain[:, :, :steps]
        allowed[:, start:, start - 1] &= ~at_prompt
    allowed &= real[:, None, :]
    allowed |= torch.eye(length, dtype=torch.bool, device=real.device)  # a padded slot sees itself: no empty softmax
    return allowed[:, None]


def score(
    model: nn.Module, packed: Packed, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, K) of the actions among the legal ones, with gradients, and their entropies if asked.

    `model` is called once, through its own forward, so that wrappers (PEFT, DDP, accelerate) do their work.
    """
    steps = packed.actions.shape[1]
    logits = model(
        input_ids=packed.input_ids,
        attention_mask=attention_mask(causal_lm(model), packed.allowed),
        position_ids=packed.position_ids,
        use_cache=False,
        logits_to_keep=steps + 1,
    ).logits[:, :-1]
    return action_logprobs(logits, packed, temperature, entropy)


def action_logprobs(
    logits: Tensor, packed: Packed, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, K) from logits (B, K, V), renormalised over the legal actions."""
    logits = logits.float() / temperature
    logits = logits.index_put(packed.illegal, logits.new_tensor(-torch.inf))
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, packed.actions.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return chosen, None
    with torch.no_grad():
        return chosen, -(logprobs.exp() * logprobs.masked_fill(logprobs.isinf(), 0)).sum(-1)
