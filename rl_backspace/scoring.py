"""Exact log-probabilities: every action of a trace in the context it was chosen in, by one forward pass.

A flat prompt + trace is the wrong context from the first delete on. Here each distinct context of a prompt
becomes one slot (`semantics.layout`): it holds the token that made the context, attends to the context and
itself, and its output scores every action that was chosen there. A delete goes back to a slot that is there
already, and traces of the same prompt share the prompt and whatever they have in common; there are never more
slots than in TRL's own layout. Everything is a function of TRL's `input_ids` and `attention_mask`, so
policy, old and reference log-probs follow from one function.

Shapes: B traces of at most K actions; R rows of L slots are fed to the model, the prompt's in front; V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rl_backspace.backbone import attention_mask, causal_lm
from rl_backspace.errors import UserError
from rl_backspace.fused import adapters_joined
from rl_backspace.keyboard import Keyboard
from rl_backspace.semantics import Budget, Layout, Rules, layout

SHARED_SLOTS = 256  # a row takes traces of one prompt up to this many slots


@dataclass(frozen=True)
class Packed:
    """Traces ready for one forward pass.

    Attributes:
        input_ids, position_ids: (R, L).
        allowed: (R, 1, L, L) bool, True where the slot of row i may attend to the slot of column j.
        keep: the last `keep` slots of each row choose actions: the prompt's end and what follows.
        outputs: (U,) for each distinct choice, a slot with what was illegal there, its place among R * keep.
        illegal: two index tensors (n,), choice and token id of each illegal action.
        choices: (B, K) which choice each action was; 0 where a trace is shorter.
        actions: (B, K) the actions to score; padding where a trace is shorter.
    """

    input_ids: Tensor
    position_ids: Tensor
    allowed: Tensor
    keep: int
    outputs: Tensor
    illegal: tuple[Tensor, Tensor]
    choices: Tensor
    actions: Tensor


def batched(prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """TRL's shapes: ids and mask (B, P + K), prompts padded on the left, traces on the right."""
    before, after = max(map(len, prompts), default=0), max(map(len, traces), default=0)
    ids = torch.full((len(prompts), before + after), pad, dtype=torch.long)
    real = torch.zeros_like(ids)
    for i, (prompt, trace) in enumerate(zip(prompts, traces, strict=True)):
        columns = slice(before - len(prompt), before + len(trace))
        ids[i, columns] = torch.tensor([*prompt, *trace])
        real[i, columns] = 1
    return ids, real


@dataclass
class _Row:
    """One prompt and the contexts behind it: a trie whose nodes are slots."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # -1: the prompt's end
    depths: list[int] = field(default_factory=list)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, trace: Layout) -> list[int]:
        """The slot of each of the trace's nodes; new ones only for contexts that no trace had yet."""
        placed: list[int] = []
        for token, node in zip(trace.tokens, trace.parents, strict=True):
            parent = placed[node] if node >= 0 else -1
            slot = self.slots.setdefault((parent, token), len(self.tokens))
            if slot == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
            placed.append(slot)
        return placed


def pack(input_ids: Tensor, attention_mask: Tensor, steps: int, rules: Rules, budget: Budget | None = None) -> Packed:
    """Lay out prompts and traces, (B, P + K) with the traces in the last `steps` columns.

    Args:
        input_ids: left-padded prompts, then right-padded raw traces: TRL's `prompt_ids` and `completion_ids`.
        attention_mask: (B, P + K), 1 for real tokens.
        steps: K.
        rules, budget: what the traces were sampled under; together they fix which actions were legal.

    Raises:
        UserError: there is no trace, or it has not so many columns.
        semantics.IllegalAction: a trace has an action that the rules or the budget forbid.
    """
    if not (len(input_ids) and 0 <= steps <= input_ids.shape[1]):
        raise UserError(
            f"got ids {tuple(input_ids.shape)} and {steps} steps; expected rows of at least that many columns"
        )
    start = input_ids.shape[1] - steps
    prompts, traces = [], []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        real = [token for token, kept in zip(ids, mask, strict=True) if kept]
        length = sum(mask[:start])
        prompts.append(tuple(real[:length]))
        traces.append(layout(real[length:], rules, budget))
    longest = max(len(trace.tokens) for trace in traces)
    rows, placed = _fill(prompts, traces, max(SHARED_SLOTS, longest))
    if len(rows) * max(len(row.tokens) for row in rows) > len(traces) * longest:
        rows, placed = _fill(prompts, traces, longest)  # few prompts are shared, and long rows would be mostly padding

    found: dict[tuple[int, int, tuple[int, ...]], int] = {}  # (row, slot, illegal) -> choice
    choices = []
    for trace, (at, slots) in zip(traces, placed, strict=True):
        made = [
            found.setdefault((at, slots[node] if node >= 0 else -1, tuple(illegal)), len(found))
            for node, illegal in zip(trace.anchors, trace.illegal, strict=True)
        ]
        choices.append(made + [0] * (steps - len(made)))
    if not found:  # every trace is masked out: one choice, which no loss counts
        found[0, -1, ()] = 0
    device, keep = input_ids.device, 1 + max(len(row.tokens) for row in rows)
    illegal_pairs = [(choice, token) for (_, _, tokens), choice in found.items() for token in tokens]
    ids, positions, allowed = _lay_out(rows)
    return Packed(
        ids.to(device),
        positions.to(device),
        allowed.to(device),
        keep,
        torch.tensor([row * keep + slot + 1 for row, slot, _ in found], device=device),
        tuple(torch.tensor(illegal_pairs, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)),  # type: ignore[arg-type]
        torch.tensor(choices, dtype=torch.long, device=device),
        input_ids[:, start:],
    )


def _fill(
    prompts: list[tuple[int, ...]], traces: list[Layout], most: int
) -> tuple[list[_Row], list[tuple[int, list[int]]]]:
    """Rows of at most `most` slots behind their prompts, and each trace's row and the slots of its nodes."""
    rows: list[_Row] = []
    open_row: dict[tuple[int, ...], int] = {}
    placed = []
    for prompt, trace in zip(prompts, traces, strict=True):
        at = open_row.get(prompt, -1)
        if at < 0 or len(rows[at].tokens) + len(trace.tokens) > most:
            at = open_row[prompt] = len(rows)
            rows.append(_Row(prompt))
        placed.append((at, rows[at].add(trace)))
    return rows, placed


def _lay_out(rows: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (R, L), positions (R, L) and mask (R, 1, L, L) of left-padded prompts and their tries."""
    before, after = max(len(row.prompt) for row in rows), max(len(row.tokens) for row in rows)
    ids, positions, parents = [], [], []
    for row in rows:
        left, right = before - len(row.prompt), after - len(row.tokens)
        ids.append([0] * left + list(row.prompt) + row.tokens + [0] * right)
        depths = [len(row.prompt) + depth for depth in row.depths]
        positions.append([0] * left + list(range(len(row.prompt))) + depths + [0] * right)
        parents.append(row.parents + [-1] * right)
    chain = torch.eye(after, dtype=torch.bool).repeat(len(rows), 1, 1)
    every, above = torch.arange(len(rows)), torch.tensor(parents, dtype=torch.long)
    for slot in range(1, after):
        chain[:, slot] |= chain[every, above[:, slot]] & (above[:, slot] >= 0)[:, None]
    real = torch.arange(before) >= before - torch.tensor([len(row.prompt) for row in rows])[:, None]
    allowed = torch.eye(before + after, dtype=torch.bool).repeat(
        len(rows), 1, 1
    )  # padding sees itself: no empty softmax
    allowed[:, :before, :before] |= torch.ones(before, before, dtype=torch.bool).tril() & real[:, None, :]
    allowed[:, before:, :before] = real[:, None, :]
    allowed[:, before:, before:] = chain
    return torch.tensor(ids), torch.tensor(positions), allowed[:, None]


def score(
    model: nn.Module,
    packed: Packed,
    temperature: float = 1.0,
    entropy: bool = False,
    keyboard: Keyboard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, K) of the actions among the legal ones, with gradients, and their entropies if asked.

    `model` is called once, through its own forward, so that wrappers (PEFT, DDP, accelerate) do their work.
    """
    return action_logprobs(packed_logits(model, packed), packed, temperature, entropy, keyboard)


def distributions(model: nn.Module, packed: Packed) -> Tensor:
    """Log-probabilities (U, V) of every token at each distinct choice; `packed.choices` maps actions to choices."""
    return _among_legal(packed_logits(model, packed), packed, 1.0)


def packed_logits(model: nn.Module, packed: Packed) -> Tensor:
    """The model's logits (R, keep, V) at every slot that chooses."""
    with adapters_joined(model):
        return model(
            input_ids=packed.input_ids,
            attention_mask=attention_mask(causal_lm(model), packed.allowed),
            position_ids=packed.position_ids,
            use_cache=False,
            logits_to_keep=packed.keep,
        ).logits


def action_logprobs(
    logits: Tensor,
    packed: Packed,
    temperature: float = 1.0,
    entropy: bool = False,
    keyboard: Keyboard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, K) from logits (R, keep, V), renormalised over the legal actions.

    On a keyboard they are, as the entropies, of what is typed and not of what was chosen.
    """
    logprobs = _among_legal(logits, packed, temperature)
    if keyboard is not None:
        logprobs = keyboard.through(logprobs)
    chosen = logprobs[packed.choices, packed.actions]
    if not entropy:
        return chosen, None
    with torch.no_grad():
        return chosen, entropy_of(logprobs)[packed.choices]


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropies (n,) in nats of log-probabilities (n, V), some of which may be -inf."""
    return -(logprobs.exp() * logprobs.masked_fill(logprobs.isinf(), 0)).sum(-1)


def typing_divergence(logits: Tensor, reference: Tensor, packed: Packed, deletes: Sequence[int]) -> Tensor:
    """KL(reference || model) in nats of what is typed when nothing is deleted; the mean over the distinct choices.

    Only choices whose context holds no delete token count: a reference that never learned one knows nothing there.

    Args:
        logits, reference: (R, keep, V), of the model and of the one that it is to type like.
        deletes: token ids that are left out of both distributions.
    """
    ids = torch.tensor(list(deletes), dtype=torch.long, device=logits.device)
    deleted = torch.isin(packed.input_ids, ids)[:, None, :]  # (R, 1, L)
    known = ~(packed.allowed[:, 0] & deleted).any(-1)[:, -packed.keep :].flatten()[packed.outputs]  # (U,)
    ours, theirs = (
        part.flatten(0, 1)[packed.outputs[known]].float().index_fill(1, ids, -torch.inf).log_softmax(-1)
        for part in (logits, reference)
    )
    gap = (theirs.exp() * (theirs - ours).masked_fill(theirs == -torch.inf, 0.0)).sum(-1)
    return gap.sum() / max(1, len(gap))


def _among_legal(logits: Tensor, packed: Packed, temperature: float) -> Tensor:
    """Log-probabilities (U, V) from logits (R, keep, V), renormalised over the legal actions of each choice."""
    if not temperature > 0:
        raise UserError(f"temperature: got {temperature}; expected more than 0, since greedy has no probabilities")
    logits = logits.flatten(0, 1)[packed.outputs].float() / temperature
    return logits.index_put(packed.illegal, logits.new_tensor(-torch.inf)).log_softmax(-1)
