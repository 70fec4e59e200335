"""Checkpoints in Megatron-LM's torch_dist layout: ``iter_0000100/`` and ``latest_checkpointed_iteration.txt``.

A checkpoint is written under a temporary name, renamed when it is complete, and only then named in the tracker file.
Whatever is killed, the tracker names a complete checkpoint. Nothing in a checkpoint is executed: Megatron reads its
common state with ``weights_only``, and :mod:`megatron_spin.training.integrity` checks the rest before Megatron reads
it.
"""

import errno
import os
import queue
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spin.conversion.parameters import unwrap
from megatron_spin.errors import CheckpointError
from megatron_spin.io import atomic_writer
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.processes import forks_die_with_us
from megatron_spin.training import optimizer_state
from megatron_spin.training.integrity import verify, write_checksums

TRACKER = "latest_checkpointed_iteration.txt"
LITTLE_SPACE = 64 * 2**20
"""Free bytes below which a failed write means a full disk: torch's own writer says only "unexpected pos"."""
# `fully_reshardable` loads into any layout; Megatron's default sharding fails with "flattened_range is not supported".
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def checkpoint_path(directory: Path, step: int) -> Path:
    """Directory of the checkpoint of ``step``, by Megatron's naming."""
    return directory / f"iter_{step:07d}"


def latest_step(directory: Path) -> int | None:
    """The step that the tracker names, or None if there is no checkpoint yet.

    Raises:
        CheckpointError: the tracker is not a number, or names a checkpoint that is not there.
    """
    tracker = directory / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(
            f"{tracker} holds {text!r}, not a step number: write the number of an iter_* directory beside it into it"
        )
    path = checkpoint_path(directory, int(text))
    if not path.is_dir():
        raise CheckpointError(f"{tracker} names step {text}, but {path} does not exist: restore it")
    return int(text)


def save_checkpoint(
    directory: Path,
    step: int,
    model: Sequence[torch.nn.Module],
    *,
    dims: ParallelDims,
    optimizer: MegatronOptimizer | None = None,
    state: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Writes the checkpoint of ``step``; a collective.

    Main weights and the optimizer's moments are saved in fp32, so the next iteration starts from unrounded weights.

    Args:
        state: plain data that :func:`load_checkpoint` gives back.
        keep: how many of the newest checkpoints stay in ``directory``; None keeps all.

    Raises:
        OSError: the disk is full; earlier checkpoints and the tracker are untouched.
        CheckpointError: Megatron could not write it.
    """
    final = checkpoint_path(directory, step)
    partial = directory / f".{final.name}.partial"
    if dims.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    with megatron_region():
        sharded = _sharded_state(model, optimizer, is_loading=False)
        sharded |= {"iteration": step, "checkpoint_version": 3.0, "spin": state or {}}
        # Megatron's own queue for its writers' reports lives in a server process. A kill -9 of this process would leave
        # that one behind for ever, with the run directory's lock and the driver's pipes. The queue is for asynchronous
        # saves; ours put and get in this process.
        filesystem_async._results_queue = queue.Queue()
        forks_die_with_us()  # the writers
        try:
            dist_checkpointing.save(sharded, str(partial), content_metadata=SHARDING)
        except CheckpointException as error:
            _raise_failed_save(error, final, partial, dims)
    write_checksums(partial, dims)
    if dims.rank == 0:
        _publish(directory, step, partial, final)
        _remove_old(directory, keep)
    torch.distributed.barrier()
    return final


def _raise_failed_save(error: CheckpointException, final: Path, partial: Path, dims: ParallelDims) -> None:
    """Tells a full disk from other failures: Megatron's writer processes pass on only the text of their errors."""
    # Megatron tells all ranks, so all come here. None may remove anything before all have looked.
    torch.distributed.barrier()
    full = shutil.disk_usage(final.parent).free < LITTLE_SPACE
    torch.distributed.barrier()
    if dims.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    if full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
    text = " ".join(str(error).split())[-300:]
    raise CheckpointError(f"checkpoint {final} could not be written: {text}") from error


def _publish(directory: Path, step: int, partial: Path, final: Path) -> None:
    """Renames the complete checkpoint into place, then names it in the tracker."""
    if final.exists():
        # The tracker must not name what would be gone if a kill came now.
        (directory / TRACKER).unlink(missing_ok=True)
        shutil.rmtree(final)
    partial.rename(final)
    with atomic_writer(directory / TRACKER) as file:
        file.write(str(step))


def _remove_old(directory: Path, keep: int | None) -> None:
    if keep is None:
        return
    checkpoints = sorted(path for path in directory.glob("iter_*") if path.is_dir())
    for path in checkpoints[:-keep]:
        shutil.rmtree(path)


def load_checkpoint(
    directory: Path,
    model: Sequence[torch.nn.Module],
    *,
    dims: ParallelDims,
    optimizer: MegatronOptimizer | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Loads weights in place, into any layout; with ``optimizer`` main weights and optimizer state, too; a collective.

    Args:
        step: which checkpoint; None takes the tracker's.

    Returns:
        The ``state`` that was saved, with ``step`` added.

    Raises:
        CheckpointError: there is no checkpoint, a file is missing or altered, or it is of another model.
    """
    step = latest_step(directory) if step is None else step
    if step is None:
        raise CheckpointError(
            f"{directory} holds no checkpoint ({TRACKER} is missing): run tools/import_hf.py or give another directory"
        )
    path = checkpoint_path(directory, step)
    verify(path, dims)
    with megatron_region():
        if optimizer is not None:
            optimizer_state.prime(optimizer)
        sharded = _sharded_state(model, optimizer, is_loading=True)
        try:
            loaded = dist_checkpointing.load(sharded, str(path))
        except (
            dist_checkpointing.core.CheckpointingException,
            CheckpointException,
            KeyError,
            ValueError,
            RuntimeError,
        ) as error:
            raise CheckpointError(
                f"{path} does not fit this model ({str(error)[:300]}): is it of another architecture?"
            ) from error
        for index, chunk in enumerate(model):
            unwrap(chunk).load_state_dict(loaded[_model_key(model, index)], strict=False)
        if optimizer is not None:
            optimizer_state.keep_steps_apart(optimizer)
            optimizer.load_state_dict(loaded["optimizer"])
            optimizer_state.unshare_steps(optimizer)
    return {**loaded["spin"], "step": step}


def _model_key(model: Sequence[torch.nn.Module], index: int) -> str:
    """Megatron-LM's key of a chunk: numbered if there are several."""
    return "model" if len(model) == 1 else f"model{index}"


def _sharded_state(
    model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for index, chunk in enumerate(model):
        core: Any = unwrap(chunk)  # a MegatronModule
        state[_model_key(model, index)] = core.sharded_state_dict(metadata=SHARDING)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=SHARDING)
    return state
