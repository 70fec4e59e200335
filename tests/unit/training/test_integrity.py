"""Which checkpoints are read: verification cannot be turned off by damage, and metadata names no foreign code."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spin.errors import CheckpointError
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.training.integrity import CHECKSUMS, METADATA_FILE, verify, write_checksums

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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A verified directory: a file of weights, and metadata that is a pickle of plain data."""
    path = tmp_path / "checkpoints/iter_0000004"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"weights")
    (path / METADATA_FILE).write_bytes(pickle.dumps({"tensors": [1, 2]}))
    write_checksums(path, ALONE)
    return path


def test_what_was_written_is_read(checkpoint: Path) -> None:
    verify(checkpoint, ALONE)


def test_another_tools_checkpoint_has_no_checksums(checkpoint: Path) -> None:
    (checkpoint / CHECKSUMS).unlink()
    verify(checkpoint, ALONE)


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
    (checkpoint / "__0_0.distcp").write_bytes(b"altered")
    with pytest.raises(CheckpointError, match=r"checksums.json is damaged .* restore it"):
        verify(checkpoint, ALONE)


def test_unreadable_checksums_do_not_turn_verification_off(checkpoint: Path) -> None:
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / CHECKSUMS).mkdir()
    with pytest.raises(CheckpointError, match=r"checksums.json is damaged"):
        verify(checkpoint, ALONE)


def test_an_altered_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").write_bytes(b"altered")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is corrupted"):
        verify(checkpoint, ALONE)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing"):
        verify(checkpoint, ALONE)


class Foreign:
    """Pickles as a call of a function that no checkpoint needs."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_metadata_that_names_foreign_code_is_not_read(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(Foreign()))
    write_checksums(checkpoint, ALONE)
    with pytest.raises(CheckpointError, match=r"names builtins.print, which no torch_dist checkpoint needs"):
        verify(checkpoint, ALONE)
    assert capsys.readouterr().out == ""
