"""The load-balancing loss of a mixture-of-experts model (Switch Transformer, equations 4 to 6) over the global batch.

transformers' models add `router_aux_loss_coef × load_balancing_loss_func(…)` to a loss of their own where their
configuration says `output_router_logits`. That is E · Σ_i f_i · P_i with f_i the share of tokens that went to expert i
and P_i its mean probability, over all layers. f has no gradient, but stands in the gradient of every token, so the f of
the global batch must be known before the first backward pass.

Shapes: N tokens of a micro-batch on this rank, E experts, K experts a token.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.parallel.context import positions
from heliostat.parallel.mesh import Layout
from heliostat.parallel.parallelize import Parallel
from heliostat.recipe import Refused
from heliostat.tasks import Batch

FIELD = "model.config.output_router_logits"
OWN_LOSS = "load_balancing_loss_func"
"""The name of the loss in the files of transformers' models."""
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""What it takes where it is the loss above; families with another one take other things."""


def routers(model: Any) -> dict[str, tuple[nn.Module, int]]:
    """Name → router, and where in its output its logits (N, E) are, as the model declares (`_can_record_outputs`)."""
    declared = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = declared if isinstance(declared, list) else [declared]
    return {
        name: (module, recorder.index)
        for name, module in model.named_modules()
        for recorder in recorders
        if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name
    }


def valid_tokens(batch: Batch, layout: Layout, count: int) -> Tensor:
    """(B, t): which of this rank's `count` positions hold a token of a row that counts."""
    rows = len(batch.row_weight_B)
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        mask = batch.row_weight_B.new_ones(rows, count // rows)
    elif layout.parallelism.context > 1:  # the mask is that of the whole sequence
        mask = mask[:, positions(mask.shape[1], layout.parallelism.context, layout.context_rank)]
    if mask.numel() != count:
        raise Refused(FIELD, f"a router saw {count} tokens of a batch of {mask.numel()}", "set it false")
    return (mask != 0) & (batch.row_weight_B > 0)[:, None]


def chosen_experts(outputs: tuple[Tensor, ...], index: int, top_k: int) -> Tensor:
    """(N, K): the experts a router chose. Most say so; of others the logits do."""
    indices = [tensor for tensor in outputs if not tensor.is_floating_point()]
    return indices[0] if indices else outputs[index].topk(top_k, -1).indices


class RouterBalance:
    """Adds the loss's gradient where router logits pass. Of a step with one micro-batch (and no pipeline) the forward
    pass counts: `start`, forward, `finish`, backward. Several need a forward pass of their own in front:
    `start`, forward over all, `finish`, then forward and backward as ever."""

    def __init__(self, parallel: Parallel, coefficient: float, num_experts: int, top_k: int) -> None:
        self.parallel, self.coefficient = parallel, coefficient
        self.num_experts, self.top_k = num_experts, top_k
        self.counting = False
        device = parallel.layout.device
        self._sums = torch.zeros(2 * num_experts + 1, dtype=torch.float64, device=device)
        """Choices of each expert, probabilities of each expert, tokens: over layers and micro-batches."""
        self.slope_E = torch.zeros(num_experts, device=device)
        """The loss's derivative by one token's probabilities, in the unit of `LossSums.loss_sum`."""
        for router, index in routers(parallel.model).values():
            router.register_forward_hook(self._hook(index))

    def start(self) -> None:
        self._sums.zero_()
        self.counting = True

    def finish(self, weight: Tensor) -> Tensor:
        """The loss over the global batch, without its coefficient. `weight`: what this rank adds to the global
        weight, by which the step divides.

        Collective: every rank must call it, in the same order."""
        self.counting = False
        layout = self.parallel.layout
        sums = layout.counted_once(torch.cat([self._sums, weight.double().reshape(1)]))
        layout.add_up(sums)
        chosen_E, probability_E, rest = sums.split([self.num_experts, self.num_experts, 2])
        tokens, weight = rest[0].clamp(min=1), rest[1]
        fraction_E = chosen_E / tokens
        self.slope_E = (self.coefficient * self.num_experts * weight / tokens * fraction_E).float()
        return self.num_experts * (fraction_E * probability_E / tokens).sum()

    def _hook(self, index: int) -> Any:
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            outputs = output if isinstance(output, tuple) else (output,)
            batch, valid_N = self.parallel.batch, None
            if batch is not None:  # else recompute, whose first pass knew its tokens
                logits_NE = outputs[index].detach().flatten(0, -2)
                valid_N = valid_tokens(batch, self.parallel.layout, len(logits_NE)).flatten()
                if self.counting:
                    self._count(logits_NE, valid_N)
            # Which output the model goes on with differs between families: the gradient is added wherever one comes
            # back.
            floating = [i for i, tensor in enumerate(outputs) if tensor.is_floating_point()]
            passed = _Balance.apply(self, valid_N, floating.index(index), *(outputs[i] for i in floating))
            replaced = dict(zip(floating, passed, strict=True))
            outputs = tuple(replaced.get(i, tensor) for i, tensor in enumerate(outputs))
            return outputs if isinstance(output, tuple) else outputs[0]

        return hook

    @torch.no_grad()
    def _count(self, logits_NE: Tensor, valid_N: Tensor) -> None:
        probability_NE = logits_NE.float().softmax(-1)
        chosen_NE = torch.zeros_like(probability_NE).scatter_(1, probability_NE.topk(self.top_k, -1).indices, 1.0)
        both = torch.cat([chosen_NE, probability_NE, torch.ones_like(probability_NE[:, :1])], -1)
        self._sums += both[valid_N].sum(0, dtype=torch.float64)


class _Balance(torch.autograd.Function):
    """A router's outputs as they are; on the way back the logits' gradient gets the loss's share in addition. Nothing
    but the logits is saved, so that recompute may compute them again."""

    @staticmethod
    def forward(ctx: Any, balance: RouterBalance, valid_N: Tensor | None, index: int, *outputs: Tensor) -> Any:
        ctx.balance, ctx.valid_N, ctx.index = balance, valid_N, index
        ctx.save_for_backward(outputs[index])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found = list(grads)
        if ctx.valid_N is not None:
            (logits,) = ctx.saved_tensors
            slope_E, p = ctx.balance.slope_E, logits.float().softmax(-1)
            slope = p * (slope_E - (p * slope_E).sum(-1, keepdim=True)) * ctx.valid_N.view(*p.shape[:-1], 1)
            given = found[ctx.index]
            found[ctx.index] = slope.to(logits.dtype) if given is None else given + slope.to(given.dtype)
        return None, None, None, *found


def router_balance(parallel: Parallel) -> RouterBalance | None:
    """What balances the routers of a model whose configuration asks for it, else None. Raises Refused for a model that
    defines the loss in another way."""
    model: Any = parallel.model
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    config.output_router_logits = False  # or the model would compute the loss of each micro-batch, too, for nothing
    files = [sys.modules[kind.__module__] for kind in type(model).__mro__]  # FSDP puts a class of its own in front
    own = next((found for file in files if (found := getattr(file, OWN_LOSS, None))), None)
    if own is None:
        return None  # nor does the model add one to its own loss
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if list(inspect.signature(own).parameters) != ARGUMENTS or not isinstance(coefficient, float | int):
        raise Refused(FIELD, f"{type(model).__name__} balances its routers in a way of its own", "set it false")
    if coefficient <= 0:
        return None
    return RouterBalance(parallel, coefficient, config.num_experts, config.num_experts_per_tok)
