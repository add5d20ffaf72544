"""Context parallelism: the ranks of a group hold the same rows and different positions of them. All but attention works
on its own positions; attention asks its peers for the keys and values of theirs.

Shapes: B rows, H heads, T positions of the whole sequence, t = T / degree of them on this rank, D head size.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, packed_sequence_mask_function, sdpa_mask

from heliostat.parallel.mesh import Layout
from heliostat.recipe import Refused
from heliostat.tasks import PADDING_MULTIPLE, Batch, Task

FIELD = "parallelism.context"
ATTENTION = "heliostat_context"
"""The name of our attention and of its mask among transformers' own."""
SPLITTABLE = {"full_attention", "sliding_attention", "dense", "sparse"}
"""Kinds of layers, in transformers' words, that mix positions by an attention mask alone, or not at all."""
LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies depend on the largest position they see, which differs between ranks."""
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")
"""What some models also hand to their attention, and ours would ignore."""


def positions(length: int, degree: int, rank: int) -> Tensor:
    """The (t,) positions that a rank holds of `length`: of 2 × degree equal chunks one near the start and one near the
    end, so that under a causal mask every rank has the same work. `length` must be a multiple of 2 × degree."""
    chunks = torch.arange(length).view(2 * degree, -1)
    return torch.cat([chunks[rank], chunks[2 * degree - 1 - rank]])


def padded_length(longest: int, degree: int, tensor: int = 1) -> int:
    """The length to which rows of at most `longest` positions are padded: each rank gets two chunks of it, which
    `tensor` peers share evenly under sequence parallelism."""
    multiple = math.lcm(PADDING_MULTIPLE, 2 * degree, degree * tensor)
    return -(-max(longest, 1) // multiple) * multiple


def split_batch(batch: Batch, degree: int, rank: int) -> Batch:
    """A rank's part of a batch whose tensors are (B, T): (B, t), each position with its number. The attention mask
    stays whole, since keys come from everywhere. Where a batch has positions of its own, which start anew with each
    document, the mask holds the number of each position's document, from 1."""
    length = batch.inputs["input_ids"].shape[1]
    mine_T = positions(length, degree, rank)
    inputs = dict(batch.inputs)
    mask_BT = inputs.pop("attention_mask", None)
    if mask_BT is None:
        mask_BT = torch.ones_like(batch.inputs["input_ids"])
    if "position_ids" in inputs:
        mask_BT = (inputs["position_ids"] == 0).cumsum(-1)
    else:  # padding may lie beyond the last position that a model has an embedding for
        inputs["position_ids"] = torch.arange(length).expand_as(mask_BT).masked_fill(mask_BT == 0, 0)
    return Batch(
        {name: tensor[:, mine_T] for name, tensor in inputs.items()} | {"attention_mask": mask_BT},
        {name: tensor[:, mine_T] for name, tensor in batch.targets.items()},
        batch.row_weight_B,
        batch.sample_ids,
    )


def check_task(task: Task, degree: int) -> None:
    """Raise Refused for a task whose loss needs whole sequences."""
    if degree > 1 and not task.splits_sequences:
        raise Refused(
            FIELD,
            f"the task {task.recipe.task} does not have a loss for each position (splits_sequences)",
            "use context=1",
        )


def split_context(model: Any, layout: Layout, isolate_documents: bool = False) -> None:
    """Let a model's attention see the whole sequence through the layout's context group, or each document only itself.
    Raises Refused, by name, for a model that mixes positions in another way. The attention is registered for the
    process: it has one layout."""
    refuse(model)
    degree, rank, group = layout.parallelism.context, layout.context_rank, layout.context_group
    assert group is not None
    documents_BT: Tensor | None = None

    def remember_documents(base_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before transformers makes the attention mask boolean."""
        nonlocal documents_BT
        documents_BT = kwargs["attention_mask"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Queries (B, H, t, D), keys and values (B, their heads, t, D), mask (B, 1, t, T) → (B, t, H, D)."""
        given = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
        if given or attention_mask is None:
            reason = f"hands {given[0]} to its attention" if given else "has attention without a mask of its own"
            raise Refused(FIELD, f"{type(module).__name__} {reason}", "use context=1")
        sizes = [key.shape[-1], value.shape[-1]]
        keys, values = Gather.apply(torch.cat([key, value], -1), group).split(sizes, -1)  # one collective for both
        return sdpa_attention_forward(module, query, keys, values, attention_mask, **kwargs)

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Any,
        attention_mask: Tensor,
        device: torch.device,
        use_vmap: bool = False,
        **_: Any,
    ) -> Tensor:
        """Which of the gathered keys each query may see: (B, 1, t, T), in the order in which keys are gathered."""
        if kv_length != q_length * degree:
            raise Refused(
                FIELD, f"{type(model).__name__} masks {kv_length} keys for {q_length} queries", "use context=1"
            )
        by_rank = [positions(kv_length, degree, peer).to(device) for peer in range(degree)]
        mine, order = by_rank[rank], torch.cat(by_rank)
        if isolate_documents:
            assert documents_BT is not None
            mask_function = and_masks(mask_function, packed_sequence_mask_function(documents_BT))
        mask_B1tT = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            mask_function=lambda b, h, q, kv: mask_function(b, h, mine[q], order[kv]),
            attention_mask=attention_mask[:, order],
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert mask_B1tT is not None
        # A token sees itself anyway; padding that sees nothing would be NaN in some kernels.
        return mask_B1tT | (mine[:, None] == order)

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, mask)
    model.set_attn_implementation(ATTENTION)
    if isolate_documents:
        model.base_model.register_forward_pre_hook(remember_documents, with_kwargs=True)
    model.config.get_text_config().use_cache = False  # a cache would take this rank's keys for all


def refuse(model: Any) -> None:
    """Raise Refused for a model that cannot be split, by what it says of itself."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - SPLITTABLE
    ropes = {kind for module in model.modules() for kind in rope_kinds(module) if kind in LENGTH_DEPENDENT}
    reasons = {
        f"has layers of kind {', '.join(sorted(kinds))}, which need whole sequences": bool(kinds),
        f"has rotary frequencies that follow the batch's longest position ({', '.join(sorted(ropes))})": bool(ropes),
        "carries a state along the sequence": model._is_stateful,
        "convolves along the sequence": any(isinstance(module, nn.Conv1d) for module in model.modules()),
        "does not take its attention from transformers' interface": not (
            model._supports_attention_backend and model._supports_sdpa
        ),
        "takes no position_ids": "position_ids" not in inspect.signature(model.forward).parameters,
    }
    for reason, applies in reasons.items():
        if applies:
            raise Refused(FIELD, f"{type(model).__name__} {reason}", "use context=1")


def rope_kinds(module: nn.Module) -> set[str]:
    """The rotary embeddings that a module computes, as transformers names them: one, or one for each kind of layer."""
    kinds = getattr(module, "rope_type", None) or ()
    return {kinds} if isinstance(kinds, str) else set(kinds.values() if isinstance(kinds, dict) else kinds)


class Gather(torch.autograd.Function):
    """(B, H, t, D) of every rank as (B, H, T, D), in the order of ranks; gradients go back to whose they are, summed
    over the ranks that used them. Collective, both ways."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = mine.new_empty(group.size() * len(mine), *mine.shape[1:])
        dist.all_gather_single(parts, mine.contiguous(), group=group)
        return parts.unflatten(0, (group.size(), -1)).movedim(0, 2).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts = grads[0].unflatten(2, (ctx.group.size(), -1)).movedim(2, 0).flatten(0, 1).contiguous()
        mine = parts.new_empty(len(parts) // ctx.group.size(), *parts.shape[1:])
        dist.reduce_scatter_single(mine, parts, group=ctx.group)
        return mine, None
