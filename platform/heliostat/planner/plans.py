"""How layouts split a model, as far as names and numbers say it."""

from __future__ import annotations

import re

from heliostat.recipe import PipelineSchedule

GRAD_SUM = "replicated_with_grad_allreduce"
"""transformers' name for replicated modules that see this rank's heads only: their gradients are summed."""
EXPERTS = "moe_tp_experts"
"""Its name for modules that hold a slice of every expert, and whose outputs are summed."""
EXPERT_PARAMETERS = ("packed_colwise", "colwise", "rowwise")
"""Its names for how the experts' parameters, stacked along their first axis, are sliced. Packed: gate and up in one."""
EXPERT_SHARD, EXPERT_MODULE = "grouped_gemm", "ep_dispatch_experts"
"""Its names for the styles of expert parameters, stacked along their first axis, and of what holds them."""
CONV1D = CONV1D_COLWISE, CONV1D_QKV, CONV1D_ROWWISE = "conv1d_colwise", "conv1d_qkv_colwise", "conv1d_rowwise"
"""Our names for matrices that are kept as (inputs, outputs), transformers' Conv1D. Their biases stay whole. QKV: three
matrices side by side, each of which is split."""
DIVIDED = "divided"
"""Our name for a module's attribute that counts what a rank has a share of."""


TENSOR_PLANS = {
    "bert": {
        "encoder.layer.*.attention.self.query": "colwise",
        "encoder.layer.*.attention.self.key": "colwise",
        "encoder.layer.*.attention.self.value": "colwise",
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    },
    "gpt2": {
        "h.*.attn.c_attn": CONV1D_QKV,
        "h.*.attn.split_size": DIVIDED,
        "h.*.attn.c_proj": CONV1D_ROWWISE,
        "h.*.mlp.c_fc": CONV1D_COLWISE,
        "h.*.mlp.c_proj": CONV1D_ROWWISE,
    },
    "vit": {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    },
}
"""By `model_type`, for families that declare none of their own."""


def pattern_of(name: str) -> str:
    """A module's name as plans write it: the same for every layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def local_stages(schedule: PipelineSchedule, rank: int, ranks: int) -> list[int]:
    """The stages that pipeline rank `rank` of `ranks` holds, in the model's order. Every rank holds equally many."""
    if schedule == "interleaved":
        return [rank, rank + ranks]
    if schedule == "zbv":  # down one leg of the V and up the other: the first rank holds both ends
        return [rank, 2 * ranks - 1 - rank]
    return [rank]


def stage_bounds(num_blocks: int, stages: int) -> list[int]:
    """Stage i holds the blocks from bounds[i] up to bounds[i + 1]."""
    return [round(i * num_blocks / stages) for i in range(stages + 1)]
