"""Everything of a Hugging Face model but its weights: config, generation config, tokenizer, chat template. No torch."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_spin.errors import CheckpointError

_PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*", "*.model", "*.model.v*", "*.tiktoken", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template*", "tekken.json",
)  # fmt: skip
_DIRECTORIES = ("additional_chat_templates",)
CHECKPOINT_ASSETS = "hf"
"""Subdirectory of a checkpoint directory with the model's config and tokenizer files: an export needs nothing else."""
_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def copy_assets(source: Path, destination: Path) -> list[str]:
    """Copies config, generation config, tokenizer files and chat templates, byte for byte; returns what it copied, sorted.

    Raises:
        CheckpointError: ``source`` holds no ``config.json``.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} holds no config.json: give a Hugging Face model directory")
    found = {path for pattern in _PATTERNS for path in source.glob(pattern) if path.is_file()}
    found |= {path for directory in _DIRECTORIES for path in (source / directory).glob("*") if path.is_file()}
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(found):
        target = destination / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    return sorted(str(path.relative_to(source)) for path in found)


def stored_dtype(hf_config: dict[str, Any]) -> str:
    """The dtype that keeps every weight as it is: ``bf16`` for a bf16 model, ``fp32`` for any other (fp16 fits into nothing less)."""
    return "bf16" if (hf_config.get("dtype") or hf_config.get("torch_dtype")) == "bfloat16" else "fp32"


def set_dtype(hf_dir: Path, dtype: str) -> None:
    """Writes the dtype (``fp32`` or ``bf16``) into ``config.json`` under the key it uses; everything else, its order too, stays."""
    path = Path(hf_dir) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # Old files say torch_dtype, new ones dtype; every reader of either still understands torch_dtype.
    changed = dict.fromkeys(
        [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"], _HF_DTYPES[dtype]
    )
    if changed.items() <= config.items():
        return
    config |= changed
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
