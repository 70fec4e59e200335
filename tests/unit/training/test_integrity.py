"""Which checkpoints are read: verification cannot be turned off by damage, and metadata names no foreign code."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_spin.errors import CheckpointError
from megatron_spin.io import sha256
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.setup import choose_device
from megatron_spin.training.integrity import CHECKSUMS, reading, verify, write_checksums
from megatron_spin.training.safe_load import METADATA_FILE, read_metadata

ALONE = ParallelDims(
    device=torch.device("cpu"),
    rank=0,
    world_size=1,
    tp_rank=0,
    tp_size=1,
    pp_rank=0,
    pp_size=1,
    dp_rank=0,
    dp_size=1,
    ep_rank=0,
    ep_size=1,
    expert_dp_rank=0,
    pg_collection=None,  # a single process asks for no group
)


WEIGHTS = {"first": torch.arange(100.0), "second": torch.arange(50.0)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two tensors in torch_dist's format, with checksums."""
    choose_device("cpu")  # before Megatron's reader is imported
    path = tmp_path / "checkpoints/iter_0000004"
    path.mkdir(parents=True)
    dcp.save(WEIGHTS, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    write_checksums(path, ALONE)
    return path


def read(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """The tensors ``names`` of the checkpoint, verified."""
    verified = verify(path, ALONE)
    tensors = {name: torch.zeros_like(WEIGHTS[name]) for name in names}
    with reading(verified):
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return tensors


def alter(path: Path, name: str) -> None:
    """Changes one bit of the tensor ``name``."""
    [info] = [info for index, info in read_metadata(path).storage_data.items() if index.fqn == name]
    data = bytearray((path / info.relative_path).read_bytes())
    data[info.offset + info.length // 2] ^= 1
    (path / info.relative_path).write_bytes(data)


def as_of_an_earlier_version(path: Path) -> None:
    """Checksums by file alone."""
    files = (file for file in path.iterdir() if file.name != CHECKSUMS)
    (path / CHECKSUMS).write_text(json.dumps({file.name: sha256(file) for file in files}))


def test_what_was_written_is_read(checkpoint: Path) -> None:
    for name, tensor in read(checkpoint, "first", "second").items():
        assert torch.equal(tensor, WEIGHTS[name])


def test_another_tools_checkpoint_has_no_checksums(checkpoint: Path) -> None:
    (checkpoint / CHECKSUMS).unlink()
    assert torch.equal(read(checkpoint, "first")["first"], WEIGHTS["first"])


def test_only_what_is_read_is_compared(checkpoint: Path) -> None:
    alter(checkpoint, "second")
    assert torch.equal(read(checkpoint, "first")["first"], WEIGHTS["first"])
    with pytest.raises(dcp.api.CheckpointException, match=r"__0_0.distcp is corrupted"):
        read(checkpoint, "second")


def test_checksums_of_an_earlier_version_are_compared_by_file(checkpoint: Path) -> None:
    as_of_an_earlier_version(checkpoint)
    assert torch.equal(read(checkpoint, "first")["first"], WEIGHTS["first"])
    alter(checkpoint, "second")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is corrupted"):
        read(checkpoint, "first")


class DirectReader(dcp.FileSystemReader):
    """Reads tensors without the function in which they are compared, as another version of torch may."""

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))


def test_what_torch_reads_without_a_comparison_is_not_taken(checkpoint: Path) -> None:
    tensors = {"first": torch.zeros(100)}
    with reading(verify(checkpoint, ALONE)), pytest.raises(dcp.api.CheckpointException, match=r"torch 2\..* past the"):
        dcp.load(tensors, storage_reader=DirectReader(checkpoint), no_dist=True)


def test_a_tensor_without_a_checksum_is_not_read(checkpoint: Path) -> None:
    sums = json.loads((checkpoint / CHECKSUMS).read_text())
    sums["tensors"] = {}
    (checkpoint / CHECKSUMS).write_text(json.dumps(sums))
    with pytest.raises(dcp.api.CheckpointException, match=r"checksums.json is damaged \(it does not list the tensor"):
        read(checkpoint, "first")


def test_what_nfs_leaves_behind_is_not_part_of_a_checkpoint(checkpoint: Path) -> None:
    leftover = checkpoint / ".nfs000000000001a2b300000001"
    leftover.write_text("of a process that was killed")
    (checkpoint / CHECKSUMS).unlink()
    write_checksums(checkpoint, ALONE)
    leftover.unlink()
    assert torch.equal(read(checkpoint, "first")["first"], WEIGHTS["first"])


def test_the_writing_version_is_recorded(checkpoint: Path) -> None:
    sums = verify(checkpoint, ALONE).checksums
    assert sums is not None and str(sums.megatron_core).startswith("0.")


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not JSON": lambda text: "\x00" * len(text),
    "empty record": lambda text: "{}",
    "a list": lambda text: "[]",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checksums_do_not_turn_verification_off(checkpoint: Path, damage: str) -> None:
    """Before, whatever could not be read counted as another tool's checkpoint, and altered weights were loaded."""
    sums = checkpoint / CHECKSUMS
    sums.write_text(DAMAGE[damage](sums.read_text()))
    alter(checkpoint, "first")
    with pytest.raises(CheckpointError, match=r"checksums.json is damaged .* restore it"):
        verify(checkpoint, ALONE)


def test_unreadable_checksums_do_not_turn_verification_off(checkpoint: Path) -> None:
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / CHECKSUMS).mkdir()
    with pytest.raises(CheckpointError, match=r"checksums.json is damaged"):
        verify(checkpoint, ALONE)


def test_an_altered_metadata_file_is_named(checkpoint: Path) -> None:
    (checkpoint / METADATA_FILE).write_bytes(b"altered")
    with pytest.raises(CheckpointError, match=r".metadata is corrupted"):
        verify(checkpoint, ALONE)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing"):
        verify(checkpoint, ALONE)


class Foreign:
    """Pickles as a call of a function that no checkpoint needs."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


def recompute_checksums(path: Path) -> None:
    """As whoever alters a checkpoint on purpose does."""
    sums = json.loads((path / CHECKSUMS).read_text())
    sums["files"][METADATA_FILE] = sha256(path / METADATA_FILE)
    (path / CHECKSUMS).write_text(json.dumps(sums))


def _text(value: str) -> bytes:
    """A short string in pickle's protocol 4."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


DOTTED = (
    b"\x80\x04" + _text("torch.distributed.checkpoint.metadata") + _text("os.system") + b"\x93" + _text("x") + b"\x85R."
)
"""Calls os.system by way of a module whose classes metadata may name."""


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (pickle.dumps(Foreign()), "builtins.print"),
        (DOTTED, "torch.distributed.checkpoint.metadata.os.system"),
        (b"ctorch.distributed._shard.sharded_tensor\ntorch.os.system\n(S'x'\ntR.", "torch.os.system"),
        (b"cbuiltins\neval\n(S'x'\ntR.", "builtins.eval"),
        (b"ctorch\nload\n(S'x'\ntR.", "torch.load"),
    ],
)
def test_metadata_that_names_foreign_code_is_not_read(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], content: bytes, named: str, has_checksums: bool
) -> None:
    (checkpoint / METADATA_FILE).write_bytes(content)
    if has_checksums:
        recompute_checksums(checkpoint)
    else:
        (checkpoint / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match=rf"names .*{named}, which no torch_dist checkpoint needs"):
        verify(checkpoint, ALONE)
    assert capfd.readouterr() == ("", "")


def test_a_file_outside_the_checkpoint_is_not_read(checkpoint: Path) -> None:
    metadata = read_metadata(checkpoint)
    for info in metadata.storage_data.values():
        info.relative_path = "../other/__0_0.distcp"
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    (checkpoint / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match=r"names the file ../other/__0_0.distcp, outside the checkpoint"):
        verify(checkpoint, ALONE)


def test_objects_in_a_checkpoint_are_not_unpickled(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dcp.save({"state": Foreign()}, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)
    (checkpoint / CHECKSUMS).unlink()
    verified = verify(checkpoint, ALONE)
    with reading(verified), pytest.raises(dcp.api.CheckpointException, match=r"UnpicklingError"):
        dcp.load({"state": None}, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    assert "executed" not in capfd.readouterr().out
    dcp.load({"state": None}, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    assert "executed" in capfd.readouterr().out  # without it torch calls the function
