"""Megatron's saving and loading, whose failures are one line on all ranks.

Megatron reads and writes some files on one rank, or on each rank by itself, between collectives. The others would wait
there for one that failed.
"""

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spin.errors import CheckpointError, SpinError
from megatron_spin.parallel.collectives import raised_everywhere
from megatron_spin.parallel.dims import ParallelDims

LITTLE_SPACE = 64 * 2**20
"""Free bytes below which a failed write means a full disk: torch's own writer says only "unexpected pos"."""
UNREADABLE: tuple[Any, ...] = (
    dist_checkpointing.core.CheckpointingException,
    CheckpointException,
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""How Megatron and torch say that a checkpoint does not fit or is damaged."""


def save_agreed(
    sharded: dict[str, Any], content: dict[str, Any], *, partial: Path, final: Path, dims: ParallelDims
) -> None:
    """Writes ``sharded`` into the empty directory ``partial``; a collective.

    Args:
        content: Megatron's content_metadata.
        final: the checkpoint that errors name.

    Raises:
        OSError: the disk is full.
        CheckpointError: Megatron could not write it.
    """
    strategy = _AgreedSave(dims)
    of_another_rank: CheckpointException | None = None
    with raised_everywhere(dims):
        try:
            dist_checkpointing.save(sharded, str(partial), strategy, content_metadata=content)
        except (CheckpointException, OSError, RuntimeError) as error:
            if getattr(error, "is_everywhere", False):
                raise
            if isinstance(error, CheckpointException) and not error.failures:
                of_another_rank = error  # which tells why; this one does not know
            else:
                if strategy.is_done:
                    dist.barrier()  # the others wait there until rank 0 has written metadata.json
                failed: Any = _failed_save(error, final, partial, dims)
                # Between collectives of Megatron's own nobody comes to hear of it. This rank ends at once, and the
                # others learn of it from its end.
                is_heard = isinstance(error, CheckpointException) or strategy.is_done
                if not is_heard and (strategy.has_begun or dims.rank > 0):
                    failed.is_everywhere = True
                raise failed from error
    if of_another_rank is not None:
        raise _failed_save(of_another_rank, final, partial, dims)


class _AgreedSave(FullyParallelSaveStrategyWrapper):
    """Megatron's strategy for tensors. It begins when all ranks have come, and learns of one that failed before."""

    def __init__(self, dims: ParallelDims) -> None:
        super().__init__(TorchDistSaveShardedStrategy("torch_dist", 1), dims.pg_collection.dp_cp)
        self._dims = dims
        self.has_begun = False
        self.is_done = False

    def save(self, *arguments: Any) -> Any:
        with raised_everywhere(self._dims):
            pass  # rank 0 has written common.pt by now, or meets the others here with its error
        self.has_begun = True
        saved = super().save(*arguments)
        self.is_done = True
        return saved


def _failed_save(error: BaseException, final: Path, partial: Path, dims: ParallelDims) -> Exception:
    """What to tell of ``error``; a full disk is told from other failures: torch's writers pass on only text."""
    is_full = shutil.disk_usage(final.parent).free < LITTLE_SPACE
    if dims.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    if isinstance(error, OSError):
        return error
    if is_full:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
    return CheckpointError(f"checkpoint {final} could not be written: {_end_of(error)}")


class AgreedLoad(TorchDistLoadShardedStrategy):
    """Megatron's strategy, whose errors reach all ranks.

    From 0.17 on each rank reads by itself, and the others would wait for one that failed in the exchange that follows.
    """

    def __init__(self, path: Path, dims: ParallelDims) -> None:
        super().__init__()
        self._path = path
        self._dims = dims

    def load(self, *arguments: Any) -> Any:
        loaded = None
        with raised_everywhere(self._dims):
            try:
                loaded = super().load(*arguments)
            except UNREADABLE as error:
                raise unreadable(self._path, error) from error
        return loaded


def unreadable(path: Path, error: Exception) -> SpinError | OSError:
    """What to tell of ``error``, which Megatron or torch raised while the checkpoint ``path`` was read."""
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):  # holds the errors of all ranks
        causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, SpinError | OSError):
            return cause
        if isinstance(cause, pickle.UnpicklingError):
            return CheckpointError(
                f"{path} is damaged or holds objects that are not plain data, which were not read: do not trust it, or "
                f"name an older step in the tracker file in {path.parent}"
            )
    return CheckpointError(f"{path} does not fit this model ({_end_of(causes[0])}): is it of another architecture?")


def _end_of(error: BaseException) -> str:
    """The last words of an error, on one line: Megatron's begin with what it was doing."""
    return " ".join(str(error).split())[-300:]
