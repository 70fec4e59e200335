"""Whether a checkpoint may be read: its bytes are those that were written.

``checksums.json`` holds the SHA-256 of each small file and of each tensor. Rank 0 lists the files, the small ones are
shared out over the ranks, and every rank compares each tensor as it reads it. So a rank hashes the bytes that its part
of the load touches and no others: with Megatron's fully parallel load its share of the weights and its own share of the
optimizer state.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata

from megatron_spin.errors import CheckpointError
from megatron_spin.io import sha256, write_json
from megatron_spin.parallel.collectives import gather_objects, on_rank_zero, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.training.safe_load import METADATA_FILE, parse_metadata, plain_data_only, read_metadata

CHECKSUMS = "checksums.json"
TENSOR_FILE = ".distcp"
"""Suffix of the files of tensors; all others are small."""
READ_BY_ALL = ("common.pt", "metadata.json")
"""What Megatron reads on every rank between collectives: a rank that cannot read it must have said so before."""
NFS_LEFTOVER = ".nfs"
"""How the name of a file begins that was removed while a process had it open. It vanishes when that process ends."""
BLOCK = 2**22
"""Bytes that are hashed at a time: a tensor is not held twice."""


@dataclasses.dataclass(frozen=True)
class Checksums:
    """``checksums.json`` of a checkpoint."""

    megatron_core: str | None
    """The version that wrote the checkpoint; None if it was not recorded."""
    files: dict[str, str]
    """SHA-256 by the name of a file. A checkpoint of an earlier version lists the files of tensors here, too."""
    tensors: dict[str, dict[str, str]]
    """SHA-256 by file and by the offset of the tensor in it."""


@dataclasses.dataclass(frozen=True)
class Verified:
    """A checkpoint whose small files are those that were written."""

    path: Path
    metadata: Metadata
    checksums: Checksums | None
    """None for a checkpoint of another Megatron tool, which has nothing to compare with."""

    def check_tensor(self, file: IO[bytes], name: str, offset: int, length: int) -> None:
        """Compares the bytes of one tensor in ``file`` with their checksum.

        Raises:
            CheckpointError: they are others, or the tensor has no checksum.
        """
        if self.checksums is None or name in self.checksums.files:
            return
        expected = self.checksums.tensors.get(name, {}).get(str(offset))
        if expected is None:
            raise _damaged_checksums(self.path, f"it does not list the tensor at byte {offset} of {name}")
        if _hash_range(file, offset, length) != expected:
            raise _corrupted(self.path / name)


def write_checksums(path: Path, dims: ParallelDims) -> None:
    """Writes ``checksums.json`` of the checkpoint ``path``; a collective.

    Each rank reads what it has written itself, which its node still has in memory.
    """
    ranges, small = on_rank_zero(dims, lambda: (_tensor_ranges(read_metadata(path)), _small_files(path)))
    own: dict[str, dict[str, str]] = {}
    with raised_everywhere(dims):
        for name, parts in ranges.items():
            if _writer(name) % dims.world_size != dims.rank:
                continue
            with open(path / name, "rb") as file:
                own[name] = {str(offset): _hash_range(file, offset, length) for offset, length in parts}
    tensors: dict[str, dict[str, str]] = {}
    for part in gather_objects(own, dims):
        tensors |= part

    def write() -> None:
        files = {name: sha256(path / name) for name in small}
        sums = Checksums(
            megatron_core=importlib.metadata.version("megatron-core"),
            files=files,
            tensors=dict(sorted(tensors.items())),
        )
        write_json(path / CHECKSUMS, dataclasses.asdict(sums))

    on_rank_zero(dims, write)


def verify(path: Path, dims: ParallelDims) -> Verified:
    """Compares the small files of the checkpoint ``path`` with their checksums and reads its metadata; a collective.

    Raises:
        CheckpointError: a file is missing or altered, ``checksums.json`` is damaged, or the metadata names foreign
            code.
    """

    def look() -> tuple[Checksums | None, list[str]]:
        sums = _read_checksums(path / CHECKSUMS)
        present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        if sums is not None:
            for name in (*sums.files, *sums.tensors):
                if name not in present:
                    raise CheckpointError(f"checkpoint file {path / name} is missing: {_remedy(path)}")
        return sums, [name for name in READ_BY_ALL if name in present]

    sums, read_by_all = on_rank_zero(dims, look)
    files = sums.files if sums is not None else {}
    names = sorted(files.keys() - {METADATA_FILE})
    with raised_everywhere(dims):
        for name in {*names[dims.rank :: dims.world_size], *read_by_all}:
            digest = sha256(path / name)
            if name in names and digest != files[name]:
                raise _corrupted(path / name)
    return Verified(path, on_rank_zero(dims, lambda: _verified_metadata(path, files.get(METADATA_FILE))), sums)


@contextlib.contextmanager
def reading(verified: Verified) -> Iterator[None]:
    """Within the block torch reads the checkpoint with the metadata that was verified, compares each tensor with its
    checksum, and unpickles plain data only, whatever Megatron asks it for.
    """
    # Here, so that this module can be imported before the device is chosen.
    from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
        CachedMetadataFileSystemReader,
    )

    slice_file = FileSystemReader._slice_file
    read_data = FileSystemReader.read_data
    compared = 0

    def checked_slice(reader: FileSystemReader, file: IO[bytes], info: Any) -> IO[bytes]:
        nonlocal compared
        compared += 1
        verified.check_tensor(file, info.relative_path, info.offset, info.length)
        return slice_file(reader, file, info)

    def checked_data(reader: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
        before = compared
        read = read_data(reader, plan, planner)
        if compared - before < len(plan.items):  # the comparison hangs on a private function of torch
            raise CheckpointError(
                f"torch {torch.__version__} reads tensors past the comparison with their checksums: install the "
                "version that requirements.lock names"
            )
        return read

    def verified_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        if Path(reader.path).resolve() != verified.path.resolve():
            raise CheckpointError(f"Megatron reads {reader.path} in place of {verified.path}: report this")
        return verified.metadata

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(FileSystemReader, "_slice_file", checked_slice))
        stack.enter_context(_replaced(FileSystemReader, "read_data", checked_data))
        # Newer versions of Megatron's reader keep metadata by path, although a path may be written anew.
        for reader in (FileSystemReader, CachedMetadataFileSystemReader):
            stack.enter_context(_replaced(reader, "read_metadata", verified_metadata))
        stack.enter_context(plain_data_only())
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _verified_metadata(path: Path, expected: str | None) -> Metadata:
    """The metadata of the checkpoint ``path``, from the very bytes whose SHA-256 is ``expected``, if that is known."""
    try:
        data = (path / METADATA_FILE).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is no torch_dist checkpoint ({METADATA_FILE} is missing): restore it, or give another directory"
        ) from None
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise _corrupted(path / METADATA_FILE)
    return parse_metadata(data, path / METADATA_FILE)


def _tensor_ranges(metadata: Metadata) -> dict[str, list[tuple[int, int]]]:
    """(offset, length) of what each file holds, in bytes."""
    ranges = defaultdict(list)
    for info in (metadata.storage_data or {}).values():
        ranges[info.relative_path].append((info.offset, info.length))
    return {name: sorted(parts) for name, parts in sorted(ranges.items())}


def _small_files(path: Path) -> list[str]:
    files = (file for file in path.rglob("*") if file.is_file())
    small = (file for file in files if file.suffix != TENSOR_FILE and not file.name.startswith(NFS_LEFTOVER))
    return sorted(str(file.relative_to(path)) for file in small)


def _writer(name: str) -> int:
    """The rank that has written a file of tensors, by torch_dist's naming; any rank if it is named otherwise."""
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else 0


def _hash_range(file: IO[bytes], offset: int, length: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while length > 0 and (block := file.read(min(length, BLOCK))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


def _read_checksums(path: Path) -> Checksums | None:
    """The record in ``path``, or None if the file is missing."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged_checksums(path.parent, str(error)) from None
    if isinstance(content, dict) and METADATA_FILE in content:  # of an earlier version
        return Checksums(megatron_core=None, files=content, tensors={})
    try:
        sums = Checksums(**content)
        listed = METADATA_FILE in sums.files and isinstance(sums.tensors, dict)
    except TypeError:
        listed = False
    # An empty record would verify nothing.
    if not listed:
        raise _damaged_checksums(path.parent, "it does not list the checkpoint's files")
    return sums


def _damaged_checksums(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path / CHECKSUMS} is damaged ({problem}), so the checkpoint cannot be verified: {_remedy(path)}"
    )


def _corrupted(file: Path) -> CheckpointError:
    return CheckpointError(f"checkpoint file {file} is corrupted (its SHA-256 differs): {_remedy(file.parent)}")


def _remedy(path: Path) -> str:
    return f"restore it, or name an older step in the tracker file in {path.parent}"
