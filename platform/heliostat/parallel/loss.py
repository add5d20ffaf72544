"""Loss parallelism: each tensor peer holds the logits of its share of the vocabulary, and a task computes its sums from
them as if they were whole. PyTorch's cross entropy exchanges maxima and sums over the vocabulary only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel

from heliostat.tasks import Batch, LossSums, Task

# It names tensors of one element, which are as replicated here as all others.
warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")


@contextmanager
def split_vocabulary() -> Iterator[None]:
    """In here, losses of split logits and their gradients are right: labels and weights count as every peer's."""
    with loss_parallel(), implicit_replication():
        yield


def loss_sums(task: Task, outputs: Tensor, batch: Batch, train: bool) -> LossSums:
    """The task's sums, whole on every tensor peer. Collective over the tensor peers where logits are split."""
    loss_sum, weight, metric_sums = task.loss(outputs, batch, train)
    return LossSums(whole(loss_sum), whole(weight), {name: whole(value) for name, value in metric_sums.items()})


def whole(tensor: Tensor) -> Tensor:
    # A view would not do: a pipeline detaches the loss in place.
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
