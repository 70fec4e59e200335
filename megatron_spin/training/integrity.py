"""Whether a checkpoint may be read: its files are those that were written, and its metadata names no foreign code."""

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

from megatron_spin.errors import CheckpointError
from megatron_spin.io import sha256, write_json
from megatron_spin.parallel.collectives import gather_objects
from megatron_spin.parallel.dims import ParallelDims

CHECKSUMS = "checksums.json"
METADATA_FILE = ".metadata"
"""torch_dist's description of the tensors, a pickle."""

SAFE_CLASSES = re.compile(
    "|".join(
        (
            r"torch\.distributed\.checkpoint\.metadata\.\w+",
            r"torch\.distributed\.checkpoint\.filesystem\._StorageInfo",
            r"torch\.distributed\.checkpoint\.planner\.(SavePlan|WriteItem|WriteItemType|TensorWriteData)",
            r"torch\.distributed\._shard\..*",
            r"torch\.(torch\.)?Size",
            r"torch\.(\w*float\w*|\w*int\w*|bool|strided)",
            r"torch\.serialization\._get_layout",
            r"megatron\.core\.dist_checkpointing\.core\.\w+",
            r"pathlib\.(PosixPath|Path)",
            r"collections\.(OrderedDict|defaultdict)",
            r"builtins\.(dict|list|set|tuple|int|str|frozenset)",
        )
    )
)
"""What the metadata of a torch_dist checkpoint may name."""


def write_checksums(path: Path, dims: ParallelDims) -> None:
    """Writes the SHA-256 of every file of the checkpoint ``path`` beside them; a collective."""
    sums = _checksums(path, dims)
    if dims.rank == 0:
        write_json(path / CHECKSUMS, sums)


def verify(path: Path, dims: ParallelDims) -> None:
    """Compares the files of the checkpoint ``path`` with their checksums, then reads its metadata; a collective.

    A checkpoint without ``checksums.json`` was written by another Megatron tool and has nothing to compare.

    Raises:
        CheckpointError: a file is missing or altered, ``checksums.json`` is damaged, or the metadata names foreign
            code.
    """
    expected = _read_checksums(path / CHECKSUMS)
    if expected is not None:
        actual = _checksums(path, dims)
        for name, value in expected.items():
            if actual.get(name) != value:
                problem = "missing" if name not in actual else "corrupted (its SHA-256 differs)"
                raise CheckpointError(
                    f"checkpoint file {path / name} is {problem}: restore it, or name an older step in the "
                    f"tracker file in {path.parent}"
                )
    _check_metadata(path / METADATA_FILE)


def _read_checksums(path: Path) -> dict[str, str] | None:
    """SHA-256 by file name, or None if the file is missing."""
    try:
        sums = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged_checksums(path, str(error)) from None
    # An empty record would verify nothing.
    if not isinstance(sums, dict) or METADATA_FILE not in sums:
        raise _damaged_checksums(path, "it does not list the checkpoint's files")
    return sums


def _damaged_checksums(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({problem}), so the checkpoint cannot be verified: restore it, or name an older "
        f"step in the tracker file in {path.parent.parent}"
    )


def _checksums(path: Path, dims: ParallelDims) -> dict[str, str]:
    """SHA-256 of each file by its name, shared out over the ranks; all of them on every rank."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    own = {str(file.relative_to(path)): sha256(file) for file in files[dims.rank :: dims.world_size]}
    sums: dict[str, str] = {}
    for part in gather_objects(own, dims):
        sums |= part
    return dict(sorted(sums.items()))


def _check_metadata(path: Path) -> None:
    try:
        _RestrictedUnpickler(path.read_bytes()).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint metadata {path} cannot be read ({error}): restore the file") from None


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads torch_dist's metadata and refuses any class or function that such a file has no use for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if not SAFE_CLASSES.fullmatch(f"{module}.{name}"):
            raise CheckpointError(
                f"checkpoint metadata names {module}.{name}, which no torch_dist checkpoint needs: "
                "do not trust this file"
            )
        return super().find_class(module, name)
