"""Nothing that a Hugging Face directory brings is executed: weights in a pickle, code of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import TensorFiles
from megatron_spin.hf.model import load_model
from tests.support.runs import environment
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


LOADERS = {
    "model": "from megatron_spin.hf.model import load_model; load_model(path, dtype='fp32', device=cpu)",
    "streamed": "from megatron_spin.hf.model import streamed_model\n"
    "with streamed_model(path, dtype='fp32', device=cpu): pass",
    "tokenizer": "from megatron_spin.data.templates import load_tokenizer; load_tokenizer(path)",
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_the_directory_is_not_run_whoever_answers(tmp_path: Path, loader: str) -> None:
    """transformers asks on the terminal whether to run such code, unless it is told that it must not."""
    model = tmp_path / "model"
    tiny_model(model)
    executed = tmp_path / "executed"
    (model / "evil.py").write_text(f"open({str(executed)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": classes}))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    program = f"from pathlib import Path; import torch; cpu = torch.device('cpu'); path = Path({str(model)!r})\n"
    program += LOADERS[loader]
    ended = subprocess.run(
        [sys.executable, "-c", program], input="y\n" * 9, capture_output=True, text=True, env=environment(), check=False
    )
    assert not executed.exists()
    assert "Do you wish to run" not in ended.stdout
    assert ended.returncode == 1, ended.stderr
    assert "CheckpointError" in ended.stderr
