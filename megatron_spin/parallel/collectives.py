"""What ranks must agree on: decisions, errors, and what each of them holds.

Ranks on other nodes may see an older state of a shared file system: NFS keeps directory listings for up to a minute.
So rank 0 alone reads what a decision depends on. And no rank may wait in a collective for one that has failed, which
would take as long as the process group's timeout: an error of one rank is raised on all of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from megatron_spin.errors import SpinError
from megatron_spin.processes import Ranks

if TYPE_CHECKING:  # importing torch takes seconds, which a phase of one process may not need
    import torch.distributed as dist

T = TypeVar("T")


def gather_objects(value: T, ranks: Ranks, group: "dist.ProcessGroup | None" = None) -> list[T]:
    """``value`` of every rank of ``group`` (None: all ranks), in rank order, on every rank.

    Raises:
        SpinError, OSError: a rank failed before, in a block of :func:`raised_everywhere`.
    """
    return _exchange(value, None, ranks, group)


@contextlib.contextmanager
def raised_everywhere(ranks: Ranks) -> Iterator[None]:
    """Raises an error of one rank on all ranks, at the end of the block: no rank enters a collective that never ends.

    The block may hold calls of this module over all ranks, nested as they come, since each of them passes errors on;
    it must hold no other collective. Of several errors the lowest rank's is raised. Only expected errors count: those
    of :mod:`megatron_spin.errors` and OSError; a defect ends its rank at once.
    """
    error: SpinError | OSError | None = None
    try:
        yield
    except (SpinError, OSError) as caught:
        if getattr(caught, "is_everywhere", False):
            raise
        error = caught
    _exchange(None, error, ranks)


def on_rank_zero(ranks: Ranks, action: Callable[[], T]) -> T:
    """Runs ``action`` on rank 0 alone; its result, or its error, is that of every rank; a collective.

    ``action`` must hold no collective. Its result is pickled.
    """
    outcome: list[T | None] = [None]
    with raised_everywhere(ranks):
        if ranks.rank == 0:
            outcome[0] = action()
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(outcome, src=0)
    return cast(T, outcome[0])


def _exchange(value: T, error: Exception | None, ranks: Ranks, group: "dist.ProcessGroup | None" = None) -> list[T]:
    """Values of all ranks; every exchange carries errors, so a rank that failed meets the others wherever they are."""
    everything: list[Any] = [(value, error)]
    if ranks.world_size > 1:
        import torch.distributed as dist

        everything *= dist.get_world_size(group)
        dist.all_gather_object(everything, (value, error), group=group)
    for _, found in everything:
        if found is not None:
            found.is_everywhere = True  # an outer block need not raise it everywhere once more
            raise found
    return [found for found, _ in everything]
