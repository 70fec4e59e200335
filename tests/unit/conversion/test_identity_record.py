"""An identity is hashed once; afterwards sizes and times of the files stand for it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_spin.conversion.identity import identity
from megatron_spin.conversion.identity_record import RECORD, kept_identities
from megatron_spin.errors import CheckpointError
from tests.support.tiny import tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "hf", layers=1, hidden=16, ffn=16, tokenizer=False)
    return tmp_path / "hf"


def alter(path: Path, *, new_time: bool) -> None:
    """Changes the last byte; the modification time stays what it was, or becomes a millisecond later."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**6 * new_time))


def known(hf: Path, record: Path, dtype: str = "fp32") -> str:
    return kept_identities(hf, [dtype], record)[dtype]


@pytest.mark.parametrize("inside", [True, False])
def test_files_of_the_same_sizes_and_times_are_not_read_again(hf: Path, tmp_path: Path, inside: bool) -> None:
    record = (hf if inside else tmp_path / "run/base") / RECORD
    original = identity(hf, "fp32")
    assert known(hf, record) == original
    alter(hf / WEIGHTS, new_time=False)
    assert identity(hf, "fp32") != original
    assert known(hf, record) == original, "the limit of the method: nothing tells that the byte changed"
    os.utime(hf / "config.json")
    assert known(hf, record) == identity(hf, "fp32")


def test_a_changed_byte_is_found_by_the_time(hf: Path) -> None:
    original = known(hf, hf / RECORD)
    alter(hf / WEIGHTS, new_time=True)
    found = known(hf, hf / RECORD)
    assert found == identity(hf, "fp32") != original


def test_a_copy_is_hashed_anew_with_the_same_result(hf: Path, tmp_path: Path) -> None:
    """Its files have other times."""
    original = known(hf, hf / RECORD)
    copy = tmp_path / "copy"
    shutil.copytree(hf, copy, copy_function=shutil.copyfile)
    before = json.loads((copy / RECORD).read_text())
    assert known(copy, copy / RECORD) == original
    now = json.loads((copy / RECORD).read_text())
    assert now["identities"] == before["identities"] and now["files"] != before["files"]


def test_another_directory_is_not_taken_for_the_recorded_one(hf: Path, tmp_path: Path) -> None:
    """Where a tool gives all files one time, two models of one size differ in nothing but their bytes and paths."""
    record = tmp_path / "run/base" / RECORD
    known(hf, record)
    other = shutil.copytree(hf, tmp_path / "other")
    alter(other / WEIGHTS, new_time=False)
    assert known(other, record) == identity(other, "fp32") != identity(hf, "fp32")


def test_each_dtype_has_its_own(hf: Path) -> None:
    record = hf / RECORD
    found = kept_identities(hf, ["fp32", "bf16"], record)
    assert found == {dtype: identity(hf, dtype) for dtype in ("fp32", "bf16")}
    alter(hf / WEIGHTS, new_time=False)
    assert kept_identities(hf, ["bf16", "fp32"], record) == found
    record.write_text("{")
    assert known(hf, record) == identity(hf, "fp32"), "a damaged record is none"


def test_a_missing_file_is_named(hf: Path) -> None:
    known(hf, hf / RECORD)
    (hf / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        known(hf, hf / RECORD)
