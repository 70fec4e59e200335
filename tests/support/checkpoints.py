"""What the ranks of a test world do with checkpoints."""

import errno
import json
import os
import pickle
import resource
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.checkpoint import TensorStorageMetadata
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_spin.config import Config
from megatron_spin.io import sha256
from tests.support.ranks import make_trainer, random_pairs, weights

SCORE = -40.0
VOCABULARY = 99


def trainer_of(config: Config, *, steps: int = 6, taken: int = 0) -> Any:
    """A trainer over random pairs that has taken ``taken`` of ``steps`` steps."""
    pairs = random_pairs(24, vocabulary=VOCABULARY)
    trainer = make_trainer(config, pairs, np.full((24, 2), SCORE, dtype=np.float32), steps=steps)
    for step in range(taken):
        trainer.step(step)
    return trainer


def save(
    config: Config,
    directory: Path,
    *,
    taken: int,
    moments: bool = True,
    resharding: Literal["data_parallel", "any"] = "data_parallel",
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Trains, saves, and goes on: the weights that were saved (on rank 0) and the losses of the steps after it."""
    trainer = trainer_of(config, taken=taken)
    from megatron_spin.training.checkpoint import save_checkpoint

    save_checkpoint(
        directory,
        taken,
        trainer.model,
        dims=trainer.dims,
        optimizer=trainer.optimizer,
        moments=moments,
        resharding=resharding,
        state={"opponent": "x"},
    )
    saved = weights(trainer, Path(config.model.hf))
    return saved, [trainer.step(step)["loss"] for step in range(taken, 6)]


def load(
    config: Config, directory: Path, *, moments: bool = True, steps: int = 0
) -> tuple[dict[str, np.ndarray], list[float], dict[str, Any]]:
    """Loads into a fresh trainer: its weights (on rank 0), the losses of ``steps`` steps, and the state."""
    trainer = trainer_of(config)
    from megatron_spin.training.checkpoint import load_checkpoint

    state = load_checkpoint(directory, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer, moments=moments)
    loaded = weights(trainer, Path(config.model.hf))
    first = state["step"]
    return loaded, [trainer.step(step)["loss"] for step in range(first, first + steps)], state


def load_again_and_save(config: Config, source: Path, directory: Path) -> None:
    """Begins an iteration from ``source`` and saves its main weights without a step."""
    trainer = trainer_of(config)
    from megatron_spin.training.checkpoint import load_checkpoint, save_checkpoint

    common: dict[str, Any] = {"dims": trainer.dims, "optimizer": trainer.optimizer, "moments": False}
    load_checkpoint(source, trainer.model, **common)
    save_checkpoint(directory, 1, trainer.model, **common)


def first_row(config: Config, directory: Path) -> dict[str, Any]:
    """The metrics of the first step of an iteration that begins from ``directory``, after its main weights were saved,
    too.
    """
    trainer = trainer_of(config)
    from megatron_spin.training.checkpoint import load_checkpoint, save_checkpoint

    common: dict[str, Any] = {"dims": trainer.dims, "optimizer": trainer.optimizer, "moments": False}
    load_checkpoint(directory, trainer.model, **common)
    save_checkpoint(directory.with_name("again"), 1, trainer.model, **common)
    row: dict[str, Any] = trainer.step(0)
    return row


def refusal(config: Config, directory: Path, *, moments: bool = True) -> str:
    """The error of a load."""
    from megatron_spin.errors import CheckpointError

    try:
        load(config, directory, moments=moments)
    except CheckpointError as error:
        return str(error)
    return "loaded"


class FailingOpen:
    """Lets this process fail to open files of one name. Hooks stay for its life; this one does nothing most times."""

    def __init__(self) -> None:
        self.name: str | None = None

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or self.name is None or not isinstance(arguments[0], str | os.PathLike):
            return
        if Path(arguments[0]).name == self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), arguments[0])


def load_with_an_unreadable_file(config: Config, directory: Path, name: str) -> str:
    """The error of a load while rank 1 cannot open the file ``name``."""
    trainer = trainer_of(config)
    from megatron_spin.training.checkpoint import load_checkpoint

    failing = FailingOpen()
    sys.addaudithook(failing.hook)
    failing.name = name if trainer.dims.rank == 1 else None
    try:
        load_checkpoint(directory, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer)
    except OSError as error:
        return str(error)
    finally:
        failing.name = None
    return "loaded"


def save_with_an_unwritable_file(config: Config, directory: Path, name: str) -> str:
    """The error of a save while rank 0 cannot write the file ``name``, and whether ranks are together after it."""
    trainer = trainer_of(config, taken=1)
    from megatron_spin.errors import CheckpointError
    from megatron_spin.parallel.collectives import gather_objects
    from megatron_spin.training.checkpoint import save_checkpoint

    failing = FailingOpen()
    sys.addaudithook(failing.hook)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.dims.rank == 0:
        if name == "common.pt":  # torch writes it in C++, which tells no hook
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        failing.name = name
    try:
        save_checkpoint(directory, 1, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer)
    except (CheckpointError, OSError) as error:
        found = str(error)
    else:
        found = "saved"
    finally:
        failing.name = None
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return f"{found}, then {gather_objects(trainer.dims.rank, trainer.dims)}"


def export_identity(config: Config, directory: Path) -> str:
    """The identity of the checkpoint as a bf16 model without an optimizer, as an export has it."""
    from megatron_spin.parallel.setup import choose_device, initialize

    device = choose_device(config.device)
    from megatron_spin.conversion.identity import streamed_identity
    from megatron_spin.hf.assets import read_hf_config
    from megatron_spin.models.provider import build_model
    from megatron_spin.training.checkpoint import load_checkpoint

    dims = initialize(config.parallel, device)
    model = build_model(config, dims)
    load_checkpoint(directory, model, dims=dims)
    return streamed_identity(model, read_hf_config(Path(config.model.hf)), dims, "bf16")


def trained_identity(config: Config, *, taken: int, directory: Path) -> str:
    """The identity of the trainer's own weights, whose main weights are in ``directory`` afterwards."""
    trainer = trainer_of(config, taken=taken)
    from megatron_spin.conversion.identity import streamed_identity
    from megatron_spin.hf.assets import read_hf_config
    from megatron_spin.training.checkpoint import save_checkpoint

    save_checkpoint(directory, taken, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer, moments=False)
    return streamed_identity(trainer.model, read_hf_config(Path(config.model.hf)), trainer.dims, "bf16")


def tensors(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of the checkpoint ``path`` by its key."""
    from megatron_spin.training.safe_load import read_metadata

    stored = read_metadata(path).state_dict_metadata
    found = {}
    for name, item in stored.items():
        if isinstance(item, TensorStorageMetadata):
            found[name] = (item.size, item.properties.dtype)
    return found


def recompute_checksums(path: Path) -> None:
    """As whoever alters a checkpoint on purpose does: checksums by file."""
    files = (file for file in path.iterdir() if file.name != "checksums.json")
    (path / "checksums.json").write_text(json.dumps({file.name: sha256(file) for file in files}))


def without(path: Path, part: str) -> None:
    """Removes the tensors and objects whose key has ``part`` from the metadata, as if they had not been saved."""
    from megatron_spin.training.safe_load import METADATA_FILE, read_metadata

    metadata = read_metadata(path)
    for name in [name for name in metadata.state_dict_metadata if part in name]:
        del metadata.state_dict_metadata[name]
    for index in [index for index in metadata.storage_data if part in index.fqn]:
        del metadata.storage_data[index]
    (path / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    recompute_checksums(path)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that come into being within the block and live at the same time.

    Resident memory would also count what the allocator keeps, and not what it gives out a second time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._current = 0
        self._alive: dict[int, list[int]] = {}  # address: bytes, number of tensors
        self._known: set[int] = set()

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """Does not count the storages of ``tensors``, which are there already."""
        self._known |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if not address or address in self._known:
            return
        entry = self._alive.setdefault(address, [0, 0])
        self._current += max(storage.nbytes() - entry[0], 0)
        entry[0] = max(entry[0], storage.nbytes())
        entry[1] += 1
        weakref.finalize(tensor, self._drop, address)
        self.peak = max(self.peak, self._current)

    def _drop(self, address: int) -> None:
        entry = self._alive.get(address)
        if entry is not None:
            entry[1] -= 1
            if not entry[1]:
                del self._alive[address]
                self._current -= entry[0]


def peaks(config: Config, directory: Path) -> dict[str, Any]:
    """Bytes of host tensors at the peak of a save and a load, this rank's share, and the number of buckets."""
    trainer = trainer_of(config, taken=1)
    from megatron_spin.training.checkpoint import load_checkpoint, save_checkpoint
    from megatron_spin.training.optimizer_state import inner_optimizers

    def held() -> Iterator[torch.Tensor]:
        for chunk in trainer.model:
            for buffer in chunk.buffers:
                yield buffer.grad_data
                if buffer.param_data is not None:
                    yield buffer.param_data
            yield from chunk.parameters()
        for inner in inner_optimizers(trainer.optimizer):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    for value in inner.state[parameter].values():
                        if isinstance(value, torch.Tensor):
                            yield value

    parameters = sum(parameter.numel() for chunk in trainer.model for parameter in chunk.parameters())
    found: dict[str, Any] = {
        "parameters": parameters,
        "buckets": sum(len(buffer.buckets) for chunk in trainer.model for buffer in chunk.buffers),
    }
    common: dict[str, Any] = {"dims": trainer.dims, "optimizer": trainer.optimizer}
    for name, moments in (("", True), (" of main weights", False)):
        for action in ("save", "load"):
            memory = PeakMemory()
            memory.ignore(held())
            with memory:
                if action == "save":
                    save_checkpoint(directory / str(moments), 1, trainer.model, moments=moments, **common)
                else:
                    load_checkpoint(directory / str(moments), trainer.model, moments=moments, **common)
            found[action + name] = memory.peak
    return found


def stale(config: Config, directory: Path) -> dict[str, float]:
    """After two steps: by how much each weight that is streamed differs from the one after a gather, and whether the
    checkpoint holds the latter (on rank 0).
    """
    trainer = trainer_of(config, taken=2)
    from megatron_spin.training.checkpoint import load_checkpoint, save_checkpoint

    streamed = weights(trainer, Path(config.model.hf))
    for chunk in trainer.model:
        chunk.start_param_sync(force_sync=True)
    gathered = weights(trainer, Path(config.model.hf))
    trainer = trainer_of(config, taken=2)
    save_checkpoint(directory, 2, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer)
    trainer = trainer_of(config)
    load_checkpoint(directory, trainer.model, dims=trainer.dims)
    loaded = weights(trainer, Path(config.model.hf))
    differences = {}
    for name in gathered:
        differences[f"streamed {name}"] = float(np.abs(streamed[name] - gathered[name]).max())
        differences[f"saved {name}"] = float(np.abs(loaded[name] - gathered[name]).max())
    return differences
