"""Checkpoints in Megatron-LM's torch_dist layout: ``iter_0000100/`` and ``latest_checkpointed_iteration.txt``.

A checkpoint is written under a temporary name, renamed when it is complete, and only then named in the tracker
(:mod:`megatron_spin.training.tracker`). Each rank writes and reads its own share: of the weights, which all data
parallel ranks have, an equal part, and of the optimizer state what is its own. Nothing in a checkpoint is executed
(:mod:`megatron_spin.training.integrity`).

Two kinds of content:

- weights and optimizer state, within an iteration. A DistributedOptimizer's state is stored as it lies in memory
  (Megatron's ``dp_reshardable``), which another number of data parallel ranks can load; or, where
  ``resharding="any"`` asks for it, parameter by parameter (``fully_reshardable``), which any layout can load.
- main weights alone, after the last step (``moments=False``). They are fp32, have the names of the parameters, and load
  into any layout and dtype: the next iteration starts from them unrounded, and an export rounds them as the optimizer
  does.
"""

import contextlib
import errno
import os
import pickle
import queue
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spin.conversion.parameters import finish_param_gather, unwrap
from megatron_spin.errors import CheckpointError, SpinError
from megatron_spin.parallel.collectives import on_rank_zero, raised_everywhere
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.processes import forks_die_with_us
from megatron_spin.training import main_weights, optimizer_state
from megatron_spin.training.integrity import Verified, reading, verify, write_checksums
from megatron_spin.training.tracker import TRACKER, checkpoint_path, latest_step, make_partial, partial_path, publish

LITTLE_SPACE = 64 * 2**20
"""Free bytes below which a failed write means a full disk: torch's own writer says only "unexpected pos"."""
SHARDINGS: dict[str, dict[str, Any]] = {
    "data_parallel": {"distrib_optim_sharding_type": "dp_reshardable"},
    # Data parallel rank 0 gathers the state; without the second key all ranks would.
    "any": {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    },
}
"""Megatron's names for ``training.checkpoint_resharding``."""
MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""What Megatron puts before a parameter's key for its main weight, with and without a DistributedOptimizer."""
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

Resharding = Literal["data_parallel", "any"]


@torch.no_grad()
def save_checkpoint(
    directory: Path,
    step: int,
    model: Sequence[torch.nn.Module],
    *,
    dims: ParallelDims,
    optimizer: MegatronOptimizer | None = None,
    moments: bool = True,
    resharding: Resharding = "data_parallel",
    state: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Writes the checkpoint of ``step``; a collective.

    On the host a rank needs a copy of its own share (on a CPU not even that); with ``resharding="any"`` data parallel
    rank 0 needs 24 bytes per parameter of the model parallel shard.

    Args:
        moments: False saves the optimizer's main weights in place of the model's, and none of its state; the gradients
            are zero afterwards.
        resharding: the layouts that the optimizer state can be loaded into.
        state: plain data that :func:`load_checkpoint` gives back.
        keep: how many of the newest checkpoints stay in ``directory``; None keeps all.

    Raises:
        OSError: the disk is full; earlier checkpoints and the tracker are untouched.
        CheckpointError: Megatron could not write it.
    """
    final = checkpoint_path(directory, step)
    partial = on_rank_zero(dims, lambda: make_partial(directory, step))
    finish_param_gather(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(megatron_region())
        if optimizer is not None and not moments:
            stack.enter_context(main_weights.saving(model, optimizer))
            optimizer = None
        content = {**SHARDINGS[resharding], "layout": _layout(model, dims), "has_optimizer": optimizer is not None}
        sharded = _sharded_state(model, optimizer, content, is_loading=False)
        sharded |= {"iteration": step, "checkpoint_version": 3.0, "spin": state or {}}
        # Megatron's own queue for its writers' reports lives in a server process. A kill -9 of this process would leave
        # that one behind for ever, with the run directory's lock and the driver's pipes. The queue is for asynchronous
        # saves; ours put and get in this process.
        filesystem_async._results_queue = queue.Queue()
        forks_die_with_us()  # the writers
        strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1), dims.pg_collection.dp_cp
        )
        try:
            dist_checkpointing.save(sharded, str(partial), strategy, content_metadata=content)
        except CheckpointException as error:
            _raise_failed_save(error, final, partial_path(directory, step), dims)
    write_checksums(partial, dims)
    on_rank_zero(dims, lambda: publish(directory, step, keep=keep))
    return final


def _raise_failed_save(error: CheckpointException, final: Path, partial: Path, dims: ParallelDims) -> None:
    """Tells a full disk from other failures: Megatron's writer processes pass on only the text of their errors."""

    # Megatron tells all ranks, so all come here.
    def clear() -> bool:
        full = shutil.disk_usage(final.parent).free < LITTLE_SPACE
        shutil.rmtree(partial, ignore_errors=True)
        return full

    if on_rank_zero(dims, clear):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
    raise CheckpointError(f"checkpoint {final} could not be written: {_end_of(error)}") from error


@torch.no_grad()
def load_checkpoint(
    directory: Path,
    model: Sequence[torch.nn.Module],
    *,
    dims: ParallelDims,
    optimizer: MegatronOptimizer | None = None,
    moments: bool = True,
    step: int | None = None,
) -> dict[str, Any]:
    """Loads weights in place, into any layout; a collective.

    A rank reads and hashes an equal part of the weights that the data parallel ranks share, which they then exchange,
    and its own share of the optimizer state. Only a state that was saved for any layout is read whole by every rank,
    12 bytes per parameter of the model parallel shard.

    Args:
        optimizer: takes the main weights unrounded, and its own state if the checkpoint has it.
        moments: False leaves the optimizer's state as it is.
        step: which checkpoint; None takes the tracker's.

    Returns:
        The ``state`` that was saved, with ``step`` added.

    Raises:
        CheckpointError: there is no checkpoint, a file is missing or altered, it is of another model, or its optimizer
            state is of another layout.
    """
    step = on_rank_zero(dims, lambda: latest_step(directory)) if step is None else step
    if step is None:
        raise CheckpointError(
            f"{directory} holds no checkpoint ({TRACKER} is missing): run tools/import_hf.py or give another directory"
        )
    path = checkpoint_path(directory, step)
    verified = verify(path, dims)
    on_rank_zero(dims, lambda: _check_version(verified))
    finish_param_gather(model)
    with megatron_region(), reading(verified):
        try:
            common = dist_checkpointing.load_common_state_dict(str(path))
            content: dict[str, Any] = common.get("content_metadata") or SHARDINGS["any"]
            if optimizer is not None and moments and content.get("has_optimizer", "optimizer" in common):
                _check_layout(path, content, _layout(model, dims), optimizer)
                _load_all(verified, model, optimizer, content, dims)
            elif optimizer is not None:
                with main_weights.loading(model, optimizer):
                    _load_weights(verified, model, content, dims, main=True)
            else:
                _load_weights(verified, model, content, dims, main=False)
        except UNREADABLE as error:
            raise _unreadable(path, error) from error
    return {**common.get("spin", {}), "step": step}  # another Megatron tool's has none


def _load_all(
    verified: Verified,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    content: dict[str, Any],
    dims: ParallelDims,
) -> None:
    optimizer_state.prime(optimizer)
    optimizer_state.add_missing_init_state(optimizer)
    sharded = _sharded_state(model, optimizer, content, is_loading=True)
    loaded = _load(verified, sharded, dims)
    _set_weights(model, loaded)
    optimizer_state.keep_steps_apart(optimizer)
    optimizer.load_state_dict(loaded["optimizer"])
    optimizer_state.unshare_steps(optimizer)


def _load_weights(
    verified: Verified, model: Sequence[torch.nn.Module], content: dict[str, Any], dims: ParallelDims, *, main: bool
) -> None:
    """Loads the model's weights; with ``main`` the unrounded ones, where the optimizer's state holds them."""
    sharded = _sharded_state(model, None, content, is_loading=True)
    if main:
        stored = verified.metadata.state_dict_metadata
        for chunk in sharded.values():
            for tensor in chunk.values():
                if isinstance(tensor, ShardedTensor | ShardedTensorFactory):
                    for prefix in MAIN_WEIGHTS:
                        if prefix + tensor.key in stored:
                            tensor.key = prefix + tensor.key
    _set_weights(model, _load(verified, sharded, dims))


class _AgreedLoad(TorchDistLoadShardedStrategy):
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
                raise _unreadable(self._path, error) from error
        return loaded


def _load(verified: Verified, sharded: dict[str, Any], dims: ParallelDims) -> dict[str, Any]:
    strategy = FullyParallelLoadStrategyWrapper(_AgreedLoad(verified.path, dims), dims.pg_collection.dp_cp)
    loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(verified.path), strategy)
    return loaded


def _set_weights(model: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(model):
        unwrap(chunk).load_state_dict(loaded[_model_key(model, index)], strict=False)


def _check_version(verified: Verified) -> None:
    """Refuses a checkpoint that this version of Megatron cannot read: 0.19 and newer keep plain data elsewhere."""
    ours = tuple(int(number) for number in megatron_version.split(".")[:2])
    if ours < (0, 19) and not (verified.path / "common.pt").exists():
        recorded = verified.checksums.megatron_core if verified.checksums is not None else None
        raise CheckpointError(
            f"{verified.path} was written by megatron-core {recorded or '0.19 or newer'}, which megatron-core "
            f"{megatron_version} cannot read: install that version"
        )


def _check_layout(path: Path, content: dict[str, Any], layout: dict[str, int], optimizer: MegatronOptimizer) -> None:
    """Refuses a distributed optimizer's state that only its own layout can load."""
    parts = optimizer_state.optimizer_parts(optimizer)
    if not any(isinstance(part, DistributedOptimizer) for part in parts):
        return
    stored = content.get("layout", layout)
    if content["distrib_optim_sharding_type"] == "dp_reshardable" and stored != layout:
        raise CheckpointError(
            f"{path} holds the optimizer state of {_layout_text(stored)}, which cannot be loaded with "
            f"{_layout_text(layout)}: continue with the former (its bucket size is a matter of parallel.ddp) until the "
            "iteration ends, set training.checkpoint_resharding=any there for later checkpoints, or delete the "
            "iteration's checkpoints"
        )


def _layout(model: Sequence[torch.nn.Module], dims: ParallelDims) -> dict[str, int]:
    """What an optimizer state that is stored as it lies in memory depends on."""
    ddp_config = getattr(model[0], "ddp_config", None)  # of Megatron's DistributedDataParallel alone
    return {
        "tensor": dims.tp_size,
        "pipeline": dims.pp_size,
        "chunks": len(model),
        "expert": dims.ep_size,
        "bucket": (ddp_config.bucket_size if ddp_config is not None else None) or 0,  # 0: all in one
    }


def _layout_text(layout: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in layout.items())


def _unreadable(path: Path, error: Exception) -> SpinError:
    """What to tell of ``error``, which Megatron or torch raised while the checkpoint ``path`` was read."""
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):  # holds the errors of all ranks
        causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, SpinError):
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


def _model_key(model: Sequence[torch.nn.Module], index: int) -> str:
    """Megatron-LM's key of a chunk: numbered if there are several."""
    return "model" if len(model) == 1 else f"model{index}"


def _sharded_state(
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    content: dict[str, Any],
    *,
    is_loading: bool,
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for index, chunk in enumerate(model):
        core: Any = unwrap(chunk)  # a MegatronModule
        sharded = core.sharded_state_dict(metadata=content)
        if is_loading:
            # Extra states are FP8's, and Transformer Engine unpickles them. Its layers have more than Megatron's own.
            sharded = {name: value for name, value in sharded.items() if not isinstance(value, ShardedObject)}
        state[_model_key(model, index)] = sharded
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=content)
    return state
