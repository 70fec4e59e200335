"""Reads what is pickled in a checkpoint without executing any of it.

torch_dist keeps its description of the tensors as a pickle, which :func:`read_metadata` reads through an unpickler that
knows the few classes such a file needs. Whatever else is pickled is read with ``weights_only``
(:func:`plain_data_only`).
"""

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata

from megatron_spin.errors import CheckpointError

METADATA_FILE = ".metadata"
"""torch_dist's description of the tensors, a pickle."""
_TORCH = "torch.distributed.checkpoint"
SAFE_CLASSES = frozenset(
    {
        (f"{_TORCH}.metadata", "BytesStorageMetadata"),
        (f"{_TORCH}.metadata", "ChunkStorageMetadata"),
        (f"{_TORCH}.metadata", "Metadata"),
        (f"{_TORCH}.metadata", "MetadataIndex"),
        (f"{_TORCH}.metadata", "StorageMeta"),
        (f"{_TORCH}.metadata", "TensorProperties"),
        (f"{_TORCH}.metadata", "TensorStorageMetadata"),
        (f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_TORCH}.filesystem", "_StorageInfo"),
        (f"{_TORCH}.planner", "SavePlan"),
        (f"{_TORCH}.planner", "TensorWriteData"),
        (f"{_TORCH}.planner", "WriteItem"),
        (f"{_TORCH}.planner", "WriteItemType"),
        ("torch.distributed._shard.sharded_tensor.metadata", "ShardedTensorMetadata"),
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        ("torch.distributed._shard.metadata", "ShardMetadata"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
        ("pathlib", "PosixPath"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
    }
)
"""(module, name) of what the metadata of a torch_dist checkpoint may name."""


@contextlib.contextmanager
def plain_data_only() -> Iterator[None]:
    """Within the block ``torch.load`` reads plain data and tensors only.

    It is torch's own switch, which holds for every ``torch.load``, also where ``weights_only=False`` is asked for.
    """
    variables = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def read_metadata(path: Path) -> Metadata:
    """torch_dist's description of the tensors in the checkpoint ``path``.

    Raises:
        CheckpointError: it cannot be read, or it names what such a file has no use for.
    """
    file = path / METADATA_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from None
    return parse_metadata(data, file)


def parse_metadata(data: bytes, file: Path) -> Metadata:
    """As :func:`read_metadata`, of the bytes ``data`` that ``file`` holds."""
    try:
        metadata = _RestrictedUnpickler(data).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"checkpoint metadata {file} describes no tensors: restore the file")
        for info in (metadata.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(
                    f"checkpoint metadata {file} names the file {info.relative_path}, outside the checkpoint: do not "
                    "trust this file"
                )
    except CheckpointError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from None
    return metadata


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"checkpoint metadata {file} cannot be read ({error}): restore the file")


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads torch_dist's metadata and refuses any class or function that such a file has no use for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        # Exact names: a pickle may name an attribute of an attribute, with dots, and so reach any module from any
        # other.
        if (module, name) not in SAFE_CLASSES:
            raise CheckpointError(
                f"checkpoint metadata names {module}.{name}, which no torch_dist checkpoint needs: "
                "do not trust this file"
            )
        return super().find_class(module, name)
