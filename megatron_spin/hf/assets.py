"""Everything of a Hugging Face model but its weights: config, generation config, tokenizer, chat template. No torch."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_spin.errors import CheckpointError

CHECKPOINT_ASSETS = "hf"
"""Subdirectory of a checkpoint directory with the model's config and tokenizer files: an export needs nothing else."""

_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "tekken.json",
)
_CHAT_TEMPLATES = "additional_chat_templates/*"
_DTYPE_KEYS = ("dtype", "torch_dtype")
_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def read_hf_config(hf_dir: Path) -> dict[str, Any]:
    """The plain contents of ``config.json``.

    Raises:
        CheckpointError: the directory or the file is missing, or the file is not a JSON object.
    """
    hf_dir = Path(hf_dir)
    check_directory(hf_dir)
    return read_json_object(hf_dir / "config.json")


def check_directory(hf_dir: Path) -> None:
    """Raises :class:`CheckpointError`: it is no directory."""
    if not hf_dir.is_dir():
        raise CheckpointError(
            f"{hf_dir} is not a directory: give a Hugging Face model directory with config.json and *.safetensors"
        )


def tokenizer_files(hf_dir: Path) -> list[Path]:
    """Files in ``hf_dir`` itself that define the tokenizer, sorted by name."""
    return _matching(hf_dir, _TOKENIZER_FILES)


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        found.update(path for path in directory.glob(pattern) if path.is_file())
    return sorted(found)


def copy_assets(source: Path, destination: Path) -> list[str]:
    """Copies config, generation config, tokenizer files and chat templates, byte for byte.

    Returns:
        The copied paths, relative and sorted.

    Raises:
        CheckpointError: ``source`` holds no ``config.json``.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} holds no config.json: give a Hugging Face model directory")
    names = []
    for path in _matching(source, (*_CONFIG_FILES, *_TOKENIZER_FILES, _CHAT_TEMPLATES)):
        name = path.relative_to(source)
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        names.append(str(name))
    return sorted(names)


def stored_dtype(hf_config: dict[str, Any]) -> str:
    """The dtype that keeps every weight as it is: ``bf16`` for a bf16 model, ``fp32`` for any other.

    fp16 weights need fp32: bf16 has fewer bits of mantissa.
    """
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return "bf16" if dtype == "bfloat16" else "fp32"


def set_dtype(hf_dir: Path, dtype: str) -> None:
    """Writes the dtype (``fp32`` or ``bf16``) into ``config.json`` under the key that it uses; nothing else changes.

    Raises:
        CheckpointError: as :func:`read_json_object`.
    """
    path = Path(hf_dir) / "config.json"
    hf_config = read_json_object(path)
    # transformers 4 wrote torch_dtype, transformers 5 writes dtype; every version still reads torch_dtype.
    present = [key for key in _DTYPE_KEYS if key in hf_config]
    changed = dict.fromkeys(present or ["torch_dtype"], _HF_DTYPES[dtype])
    if changed.items() <= hf_config.items():
        return
    text = json.dumps(hf_config | changed, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads one of a model's JSON files.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: give a Hugging Face model directory with config.json and *.safetensors"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): copy the model again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy the model again")
    return value
