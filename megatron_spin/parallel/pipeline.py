"""One pass of Megatron's pipeline schedule over a rank's microbatches, and the sum of its results over the ranks.

A forward step takes ``(data_iterator, model)`` and returns the model's output and a loss function. This is the form
that Megatron's schedules and Megatron-LM's ``pretrain()`` call for each microbatch.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_spin.data.batcher import Microbatch
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims

ForwardStep = Callable[[Iterator[Microbatch], torch.nn.Module], tuple[Tensor, Callable[..., object]]]


def forward_step(loss_func: Callable[..., object]) -> ForwardStep:
    """The forward step of any model with GPTModel's forward signature whose loss is ``loss_func(batch, token_losses)``.

    ``token_losses`` are the model's ``-token_logps``, in the layout of the batch.
    """

    def step(data_iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., object]]:
        batch = next(data_iterator)
        output: Tensor = model(**batch.model_inputs())
        return output, functools.partial(loss_func, batch)

    return step


def collect_logps() -> ForwardStep:
    """The forward step of a scoring pass: collects the summed log-probs [b, r] of each microbatch."""

    def loss_func(batch: Microbatch, token_losses: Tensor, *, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        return -batch.sum_by_answer(token_losses)

    return forward_step(loss_func)


def collect_token_logps() -> ForwardStep:
    """As :func:`collect_logps`, but collects every token's log-prob, [n, s] fp32: what the export gate compares."""

    def loss_func(batch: Microbatch, token_losses: Tensor, *, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        return -token_losses.float()

    return forward_step(loss_func)


def run_schedule(
    step: ForwardStep,
    model: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    *,
    forward_only: bool = False,
) -> list[Any]:
    """Runs this rank's ``microbatches`` forward and backward, or forward only to collect what the loss function
    returns.

    Returns:
        One result per microbatch on the last pipeline stage, an empty list on the others.
    """
    sequences, length = microbatches[0].shape
    with megatron_region(), torch.set_grad_enabled(not forward_only):
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(microbatches),
            model=list(model),
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=sequences,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    return results


def speaks_for_replica(dims: ParallelDims) -> bool:
    """Whether this rank's results are those that count of its model replica."""
    return dims.is_last_stage and dims.tp_rank == 0


def sum_over_ranks(value: Tensor, dims: ParallelDims) -> Tensor:
    """Sums ``value`` over data parallel ranks, counting each model replica once.

    The value of a replica is that of its last stage's first tensor parallel rank; the others only need the same shape.

    Returns:
        The sum, on every rank.
    """
    total = value.clone() if speaks_for_replica(dims) else torch.zeros_like(value)
    torch.distributed.all_reduce(total)
    return total
