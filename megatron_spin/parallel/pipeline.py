"""One pass of Megatron's pipeline schedule over a global batch, and the sum of its results over the ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_spin.data.batches import Microbatch
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.training.forward_step import ForwardStep


def run_schedule(
    forward_step: ForwardStep,
    model: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    *,
    forward_only: bool = False,
) -> list[Any]:
    """Runs this rank's ``microbatches``, forward and backward, or forward only to collect what the step's loss function returns.

    Returns:
        One result a microbatch on the last pipeline stage, an empty list on the others.
    """
    sequences, length = microbatches[0].input_ids.shape
    with megatron_region(), torch.set_grad_enabled(not forward_only):
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=list(model),
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=sequences,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    return results


def sum_over_ranks(value: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Sums ``value`` over data parallel ranks, counting each model replica once: what its last stage's first tensor rank holds.

    The result is on every rank; the others' values do not count, they only need the same shape.
    """
    counted = dims.is_last_stage and dims.tp_rank == 0
    total = value.clone() if counted else torch.zeros_like(value)
    torch.distributed.all_reduce(total)
    return total
