"""What ranks must agree on: a decision, the first error, and what each of them holds.

Ranks on other nodes may see an older state of a shared file system: NFS keeps directory listings for up to a minute.
So rank 0 alone reads what a decision depends on, and no rank enters a collective while another one has failed.
"""

import contextlib
import typing
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from megatron_spin.errors import SpinError
from megatron_spin.parallel.dims import ParallelDims

T = TypeVar("T")


def gather_objects(value: T, dims: ParallelDims, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank of ``group`` (None: all ranks), in rank order, on every rank."""
    if dims.world_size == 1:
        return [value]
    gathered: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


@contextlib.contextmanager
def raised_everywhere(dims: ParallelDims) -> Iterator[None]:
    """Raises an error of one rank on all ranks, at the end of the block: no rank enters a collective that never ends.

    The block must hold no collective. Of several errors the lowest rank's is raised. Only expected errors count: those
    of :mod:`megatron_spin.errors` and OSError; a defect ends its rank at once.
    """
    error: SpinError | OSError | None = None
    try:
        yield
    except (SpinError, OSError) as caught:
        error = caught
    for other in gather_objects(error, dims):
        if other is not None:
            raise other


def on_rank_zero(dims: ParallelDims, action: Callable[[], T]) -> T:
    """Runs ``action`` on rank 0 alone; its result, or its error, is that of every rank; a collective.

    ``action`` must hold no collective, and what it returns must be picklable. Expected errors are those of
    :func:`raised_everywhere`.
    """
    outcome: list[T | None] = [None]
    with raised_everywhere(dims):
        if dims.rank == 0:
            outcome[0] = action()
    if dims.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    return typing.cast(T, outcome[0])
