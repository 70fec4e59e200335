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
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import TensorStorageMetadata

from megatron_spin.conversion.parameters import finish_param_gather, unwrap
from megatron_spin.errors import CheckpointError
from megatron_spin.parallel.collectives import on_rank_zero, raised_everywhere
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.processes import forks_die_with_us
from megatron_spin.training import main_weights, optimizer_state
from megatron_spin.training.agreed_checkpointing import UNREADABLE, AgreedLoad, save_agreed, unreadable
from megatron_spin.training.integrity import Verified, reading, verify, write_checksums
from megatron_spin.training.tracker import TRACKER, checkpoint_path, latest_step, make_partial, publish

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
        save_agreed(sharded, content, partial=partial, final=final, dims=dims)
    write_checksums(partial, dims)
    on_rank_zero(dims, lambda: publish(directory, step, keep=keep))
    return final


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
    and its own share of the optimizer state. Only a state that was saved for any layout is held whole by every rank, on
    the host: 12 bytes per parameter of the model parallel shard.

    Args:
        optimizer: takes the main weights unrounded, and its own state if the checkpoint has it.
        moments: False leaves the optimizer's state as it is.
        step: which checkpoint; None takes the tracker's.

    Returns:
        The ``state`` that was saved, with ``step`` added.

    Raises:
        CheckpointError: there is no checkpoint, a file is missing or altered, it is of another model, its optimizer
            state is of another layout, or it holds unrounded weights only in a state that is not to be loaded.
        OSError: a rank cannot read a file.
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
            common = _load_common(path, dims)
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
            raise unreadable(path, error) from error
    return {**common.get("spin", {}), "step": step}  # another Megatron tool's has none


def _load_common(path: Path, dims: ParallelDims) -> dict[str, Any]:
    """The plain data of the checkpoint, which each rank reads."""
    common: dict[str, Any] = {}
    with raised_everywhere(dims):
        try:
            common = dist_checkpointing.load_common_state_dict(str(path))
        except UNREADABLE as error:
            raise unreadable(path, error) from error
    return common


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
        _check_main_weights(verified.path, content, stored)
        for chunk in sharded.values():
            for tensor in chunk.values():
                if isinstance(tensor, ShardedTensor | ShardedTensorFactory):
                    for prefix in MAIN_WEIGHTS:
                        if prefix + tensor.key in stored:
                            tensor.key = prefix + tensor.key
    _set_weights(model, _load(verified, sharded, dims))


def _check_main_weights(path: Path, content: dict[str, Any], stored: dict[str, Any]) -> None:
    """Refuses rounded weights where the unrounded ones are in a DistributedOptimizer's state as it lies in memory."""
    in_memory_order = content["distrib_optim_sharding_type"] == "dp_reshardable" and content.get("has_optimizer")
    if not in_memory_order or any(name.startswith(MAIN_WEIGHTS) for name in stored):
        return
    for name, tensor in stored.items():
        if name.startswith("optimizer.") or not isinstance(tensor, TensorStorageMetadata):
            continue
        if tensor.properties.dtype == torch.bfloat16:
            raise CheckpointError(
                f"{path} is of the middle of an iteration: its unrounded weights can only be loaded together with the "
                "optimizer's state; complete that training, and start from its last checkpoint"
            )


def _load(verified: Verified, sharded: dict[str, Any], dims: ParallelDims) -> dict[str, Any]:
    strategy = FullyParallelLoadStrategyWrapper(AgreedLoad(verified.path, dims), dims.pg_collection.dp_cp)
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
            f"{_layout_text(layout)}: continue with the former (bucket=0 is parallel.ddp.overlap_grad_reduce=false) "
            "until the iteration ends, set training.checkpoint_resharding=any there for later checkpoints, or delete "
            "the iteration's checkpoints"
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
