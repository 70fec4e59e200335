"""A Hugging Face directory whose weights are a pickle is not read."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import TensorFiles
from megatron_spin.hf.model import load_model
from tests.support.tiny import tiny_model


class Hostile:
    """Pickles as a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.file}",))


@pytest.mark.parametrize("hostile", [True, False])
def test_weights_in_a_pickle_are_refused(tmp_path: Path, hostile: bool) -> None:
    model = tiny_model(tmp_path / "model", tokenizer=False)
    (tmp_path / "model/model.safetensors").unlink()
    weights = Hostile(tmp_path / "executed") if hostile else model.state_dict()
    torch.save(weights, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(tmp_path / "model", dtype="fp32", device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        TensorFiles(tmp_path / "model")
    assert not (tmp_path / "executed").exists()
