import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A configuration whose files exist, for a model of 4 heads and 2 layers on the CPU."""
    (tmp_path / "model").mkdir()
    shape = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
    }
    shape |= {"hidden_size": 8, "vocab_size": 16}
    (tmp_path / "model/config.json").write_text(json.dumps(shape))
    (tmp_path / "model/model.safetensors").write_bytes(bytes(100))
    (tmp_path / "data.jsonl").write_text("{}\n")
    return {
        "name": "planned",
        "device": "cpu",
        "model": {"hf": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "data.jsonl")},
        "evaluation": {"held_out_fraction": 0.1},
        "generation": {"engine": "hf"},
        "spin": {"iterations": 2},
        "baselines": {"more": {"steps": 3}},
    }
