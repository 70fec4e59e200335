"""Checkpoints in Megatron-LM's torch_dist layout: ``iter_0000100/`` and the tracker ``latest_checkpointed_iteration.txt``.

A checkpoint is written beside its final name, renamed when whole, and only then named in the tracker: whatever is killed, the tracker names a
complete checkpoint. ``checksums.json`` holds the SHA-256 of each file and is verified on load, and nothing in a checkpoint is executed:
Megatron reads its common state with ``weights_only``, and the pickled ``.metadata`` passes through an unpickler restricted to plain classes.
"""

import errno
import functools
import io
import json
import os
import pickle
import queue
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spin.conversion.parameters import unwrap
from megatron_spin.errors import CheckpointError
from megatron_spin.io import atomic_writer, sha256, write_json
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.processes import forks_die_with_us

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
FULL = 64 * 2**20
"""Free bytes below which a failed write is taken for a full disk: torch's own writer says only "unexpected pos"."""
# `fully_reshardable` loads into any layout; Megatron's default sharding fails with "flattened_range is not supported".
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
SAFE_CLASSES = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata\.\w+|filesystem\._StorageInfo|planner\.(SavePlan|WriteItem|WriteItemType|TensorWriteData))|torch\.(Size|\w*float\w*|\w*int\w*|bool|strided)"
    r"|torch\.(torch\.)?Size|torch\.serialization\._get_layout|torch\.distributed\._shard\..*|pathlib\.(PosixPath|Path)"
    r"|collections\.(OrderedDict|defaultdict)|builtins\.(dict|list|set|tuple|int|str|frozenset)|megatron\.core\.dist_checkpointing\.core\.\w+"
)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Directory of the checkpoint of ``step``, by Megatron's naming."""
    return directory / f"iter_{step:07d}"


def latest_step(directory: Path) -> int | None:
    """The step that the tracker names, or None where there is no checkpoint yet.

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
    if not checkpoint_path(directory, int(text)).is_dir():
        raise CheckpointError(
            f"{tracker} names step {text}, but {checkpoint_path(directory, int(text))} does not exist: restore it"
        )
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
    """Writes the checkpoint of ``step``; a collective. ``state`` is plain data that :func:`load_checkpoint` gives back.

    Only the newest ``keep`` checkpoints stay in ``directory``; None keeps all.

    The main weights and the optimizer's moments are saved in fp32, so the next iteration starts from unrounded weights.

    Raises:
        OSError: the disk is full; earlier checkpoints and the tracker are untouched.
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
        # Megatron's own queue for what its writers report lives in a server process, which a kill -9 of this one would leave behind for ever,
        # with the run directory's lock and the driver's pipes. It is for asynchronous saves; ours put and get in this process.
        filesystem_async._results_queue = queue.Queue()
        forks_die_with_us()  # the writers
        try:
            dist_checkpointing.save(sharded, str(partial), content_metadata=METADATA)
        except (
            CheckpointException
        ) as error:  # Megatron writes in processes of its own: only the text of what they met comes back
            # All ranks come here, Megatron tells them; none may remove anything before all have looked.
            torch.distributed.barrier()
            full = shutil.disk_usage(directory).free < FULL
            torch.distributed.barrier()
            if dims.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
            raise CheckpointError(
                f"checkpoint {final} could not be written: {' '.join(str(error).split())[-300:]}"
            ) from error
    sums = _checksums(partial, dims)
    if dims.rank == 0:
        write_json(partial / CHECKSUMS, sums)
        if final.exists():  # the tracker must name nothing that may be gone when a kill comes now
            (directory / TRACKER).unlink(missing_ok=True)
            shutil.rmtree(final)
        partial.rename(final)
        with atomic_writer(directory / TRACKER) as file:
            file.write(str(step))
        _remove_old(directory, keep)
    torch.distributed.barrier()
    return final


def load_checkpoint(
    directory: Path,
    model: Sequence[torch.nn.Module],
    *,
    dims: ParallelDims,
    optimizer: MegatronOptimizer | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Loads weights (and, with ``optimizer``, main weights and optimizer state) in place, into any layout; a collective.

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
    _verify(path, dims)
    with megatron_region():
        if optimizer is not None:
            prime_optimizer(optimizer)
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
            _keep_steps_apart(optimizer)
            optimizer.load_state_dict(loaded["optimizer"])
            _unshare_steps(optimizer)
    return {**loaded["spin"], "step": step}


def _remove_old(directory: Path, keep: int | None) -> None:
    checkpoints = sorted(path for path in directory.glob("iter_*") if path.is_dir())
    for path in checkpoints[:-keep] if keep else []:
        shutil.rmtree(path)


def carry_over_main_weights(optimizer: MegatronOptimizer) -> None:
    """Forgets the moments and step counts of a loaded optimizer and keeps its fp32 main weights: how each iteration begins."""
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = 0
        for state in inner.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and name != "master_param":
                    state[name] = torch.zeros_like(value)


def inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch (or fused) optimizers inside Megatron's wrappers."""
    return [part.optimizer for part in _parts(optimizer) if part.optimizer is not None]


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def prime_optimizer(optimizer: MegatronOptimizer) -> None:
    """Allocates the zero state of torch's optimizers: Megatron can neither save nor load what the first step has not made yet."""
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                if inner.state.get(param):
                    continue
                if isinstance(inner, torch.optim.Adam):  # AdamW is a subclass
                    zeros = {name: torch.zeros_like(param.data) for name in ("exp_avg", "exp_avg_sq")}
                    inner.state[param] = {"step": torch.tensor(0.0), **zeros}
                elif isinstance(inner, torch.optim.SGD) and group["momentum"]:
                    inner.state[param] = {"momentum_buffer": torch.zeros_like(param.data)}


def _keep_steps_apart(optimizer: MegatronOptimizer) -> None:
    # DistributedOptimizer saves torch Adam's `step` in its parameter groups, yet looks for it among a parameter's loaded tensors too.
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = functools.partial(_set_states_but_step, part)


def _set_states_but_step(
    part: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    group, order = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    own = {"step": state["step"]} if "step" in state else {}
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {**own, **tensors})


def _unshare_steps(optimizer: MegatronOptimizer) -> None:
    # DistributedOptimizer.load_state_dict gives all parameters ONE step tensor, which Adam would then advance once a parameter.
    for inner in inner_optimizers(optimizer):
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _model_key(model: Sequence[torch.nn.Module], index: int) -> str:
    return "model" if len(model) == 1 else f"model{index}"


def _sharded_weights(chunk: torch.nn.Module) -> dict[str, Any]:
    core: Any = unwrap(chunk)  # a MegatronModule
    state: dict[str, Any] = core.sharded_state_dict(metadata=METADATA)
    return state


def _sharded_state(
    model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {_model_key(model, i): _sharded_weights(chunk) for i, chunk in enumerate(model)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=METADATA)
    return state


def _checksums(path: Path, dims: ParallelDims) -> dict[str, str]:
    """SHA-256 of each file, shared out over the ranks; the whole on every rank."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    own = {str(file.relative_to(path)): sha256(file) for file in files[dims.rank :: dims.world_size]}
    parts: list[dict[str, str] | None] = [None] * dims.world_size
    torch.distributed.all_gather_object(parts, own)
    return dict(sorted(item for part in parts if part for item in part.items()))


def _verify(path: Path, dims: ParallelDims) -> None:
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
    except (OSError, ValueError):
        expected = None  # a checkpoint that another Megatron tool wrote: it has no checksums to compare
    if expected is not None:
        actual = _checksums(path, dims)
        for name, value in expected.items():
            if actual.get(name) != value:
                problem = "missing" if name not in actual else "corrupted (its SHA-256 differs)"
                raise CheckpointError(
                    f"checkpoint file {path / name} is {problem}: restore it, or name an older step in {path.parent / TRACKER}"
                )
    try:
        _RestrictedUnpickler((path / ".metadata").read_bytes()).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint metadata {path / '.metadata'} cannot be read ({error}): restore the file"
        ) from None


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads torch_dist's ``.metadata`` and refuses any class or function that such a file has no business to name."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if not SAFE_CLASSES.fullmatch(f"{module}.{name}"):
            raise CheckpointError(
                f"checkpoint metadata names {module}.{name}, which no torch_dist checkpoint needs: do not trust this file"
            )
        return super().find_class(module, name)
