"""Cross entropy of logits that are cut over tensor parallel ranks, without an fp32 copy of them."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK = 2**23
"""Logits that are in fp32 at a time: 32 MiB, little beside the logits and enough to keep a GPU busy."""


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, *, vocab_size: int, group: ProcessGroup) -> Tensor:
    """``-log softmax(logits)[target]`` over the first ``vocab_size`` tokens of the whole vocabulary, in fp32.

    What Megatron's function of this name computes, bit for bit, after a copy to fp32 and with the padding masked. Here
    rows are taken to fp32 in chunks, once in the forward and once in the backward pass. The backward pass writes the
    gradient over the logits.

    Args:
        logits: [s, b, V / tp], contiguous, of any floating point type; nothing else may need them afterwards.
        target: [s, b] token ids.
        group: the tensor parallel ranks, in the order of their shares of the vocabulary.

    Returns:
        [s, b] fp32, equal on all ranks of ``group``.
    """
    losses: Tensor = _CrossEntropy.apply(logits, target, vocab_size, group)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
        rows = logits.view(-1, logits.shape[-1])
        width = rows.shape[1]
        first = torch.distributed.get_rank(group) * width
        num_real = min(width, max(0, vocab_size - first))
        index = target.reshape(-1) - first
        is_elsewhere = (index < 0) | (index >= width)
        index = index.masked_fill(is_elsewhere, 0)

        largest = torch.full_like(index, torch.finfo(torch.float32).min, dtype=torch.float32)
        if num_real:
            largest = rows[:, :num_real].amax(dim=-1).float()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)

        predicted, total = torch.empty_like(largest), torch.empty_like(largest)
        for part in _chunks(rows):
            shifted = rows[part] - largest[part, None]  # fp32, without a copy of its own
            predicted[part] = shifted.gather(1, index[part, None]).squeeze(1)
            shifted.exp_()
            shifted[:, num_real:] = 0.0
            total[part] = shifted.sum(dim=-1)
        predicted.masked_fill_(is_elsewhere, 0.0)
        torch.distributed.all_reduce(predicted, group=group)
        torch.distributed.all_reduce(total, group=group)

        ctx.num_real = num_real
        ctx.save_for_backward(logits, index, is_elsewhere, largest, total)
        return (total.log() - predicted).view_as(target)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, index, is_elsewhere, largest, total = ctx.saved_tensors
        rows, scale = logits.view(-1, logits.shape[-1]), grad_output.reshape(-1)
        is_here = 1.0 - is_elsewhere.float()
        for part in _chunks(rows):
            gradient = (rows[part] - largest[part, None]).exp_()
            gradient /= total[part, None]
            gradient[torch.arange(len(gradient), device=rows.device), index[part]] -= is_here[part]
            gradient *= scale[part, None]
            gradient[:, ctx.num_real :] = 0.0
            rows[part] = gradient
        return logits, None, None, None


def _chunks(rows: Tensor) -> list[slice]:
    """Slices of ``rows`` with at most :data:`CHUNK` elements each, and at least one row."""
    step = max(1, CHUNK // rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]
