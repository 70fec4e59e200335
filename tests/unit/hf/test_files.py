"""Safetensors files that are missing, truncated or quantized name themselves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import TensorFiles


def test_files_that_are_missing_or_truncated_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        TensorFiles(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    files = TensorFiles(tmp_path)
    assert (files.names, files.shape("a"), files.dtype("a")) == (["a"], (100,), torch.float32)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupted or truncated"):
        TensorFiles(tmp_path)
    path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is missing"):
        TensorFiles(tmp_path)


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor a .* is not floating point"):
        files.read("a")
