"""Comparing a Hugging Face directory with an identity that was recorded."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_spin.conversion.identity import identity
from megatron_spin.hf.identity import has_identity

WEIGHTS = {"model.embed_tokens.weight": torch.arange(6.0).reshape(3, 2), "model.norm.weight": torch.ones(2)}


def write(directory: Path, tensors: dict[str, torch.Tensor], *, tied: bool) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_the_same_weights(tmp_path: Path) -> None:
    recorded = identity(write(tmp_path / "a", WEIGHTS, tied=False), "fp32")
    assert has_identity(write(tmp_path / "b", WEIGHTS, tied=False), "fp32", recorded)
    other = {**WEIGHTS, "model.norm.weight": torch.tensor([1.0, 1.0000001])}
    assert not has_identity(write(tmp_path / "c", other, tied=False), "fp32", recorded)


def test_a_copy_of_the_embedding_counts_only_if_the_model_is_not_tied(tmp_path: Path) -> None:
    copied = {**WEIGHTS, "lm_head.weight": WEIGHTS["model.embed_tokens.weight"].clone()}
    recorded = identity(write(tmp_path / "a", WEIGHTS, tied=True), "fp32")
    assert has_identity(write(tmp_path / "b", copied, tied=True), "fp32", recorded)
    assert not has_identity(write(tmp_path / "c", copied, tied=False), "fp32", recorded)
