"""The engines' interface: what a session promises whatever engine it runs."""

import weakref
from pathlib import Path

import pytest
import torch

from megatron_spin.errors import CheckpointError, DeviceError
from megatron_spin.generation.engine import EngineSettings, answer_caps, open_session
from megatron_spin.generation.hf_engine import HfSession
from megatron_spin.hf.model import choose_device
from tests.support.tiny import EOS, SPECIAL, tiny_model


def settings(hf_dir: Path) -> EngineSettings:
    return EngineSettings(
        engine="hf", hf_dir=hf_dir, dtype="fp32", end_token_id=SPECIAL.index(EOS), max_length=40, device="cpu"
    )


def test_an_hf_session_frees_its_model_at_the_end(tmp_path: Path) -> None:
    tiny_model(tmp_path, tokenizer=False)
    with open_session(settings(tmp_path)) as session:
        assert isinstance(session, HfSession)
        model = weakref.ref(session._model)
        assert model() is not None
    assert model() is None


def test_a_missing_gpu_is_an_error_and_auto_takes_what_there_is() -> None:
    if torch.cuda.is_available():
        assert choose_device("cuda").type == choose_device("auto").type == "cuda"
    else:
        assert choose_device("auto").type == "cpu"
        with pytest.raises(DeviceError, match="PyTorch sees no GPU"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers cannot load"), open_session(settings(tmp_path)):
        pass


def test_answers_fit_the_longest_sequence() -> None:
    assert answer_caps([[1] * 10, [1] * 35], max_new_tokens=24, max_length=40) == [24, 5]
