"""The identity of a model depends on names, shapes and bytes; not on files, buffers, order or a tied copy."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_spin.conversion.identity import identity
from megatron_spin.errors import CheckpointError
from megatron_spin.hf.files import write_safetensors
from megatron_spin.hf.identity import IdentityHasher

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3) / 7,
    "lm_head.weight": torch.arange(12, 24, dtype=torch.float32).reshape(4, 3) / 7,
    "model.norm.weight": torch.ones(3),
}


def write(
    directory: Path, tensors: dict[str, torch.Tensor], *, tied: bool = False, max_shard_bytes: int = 10**9
) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    [dtype] = {tensor.dtype for tensor in tensors.values()}
    write_safetensors(
        tensors.items(),
        directory,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        max_shard_bytes=max_shard_bytes,
    )
    return directory


def test_identity_is_the_documented_hash(tmp_path: Path) -> None:
    """Old runs keep it in their files: it must not change under our feet."""
    data = hashlib.sha256(struct.pack("<3f", 1, 1, 1)).hexdigest()
    expected = hashlib.sha256(f"model.norm.weight\tfp32\t3\t{data}\n".encode()).hexdigest()
    assert identity(write(tmp_path / "a", {"model.norm.weight": torch.ones(3)}), "fp32") == expected


def test_file_layout_order_and_buffers_do_not_count(tmp_path: Path) -> None:
    expected = identity(write(tmp_path / "one", TENSORS), "fp32")
    sharded = write(tmp_path / "sharded", TENSORS, max_shard_bytes=50)
    assert len(list(sharded.glob("model-*-of-00003.safetensors"))) == 3
    assert identity(sharded, "fp32") == expected
    assert identity(write(tmp_path / "reversed", dict(reversed(TENSORS.items()))), "fp32") == expected
    with_buffer = {**TENSORS, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert identity(write(tmp_path / "buffer", with_buffer), "fp32") == expected


def test_a_tied_output_layer_does_not_count_and_an_untied_one_does(tmp_path: Path) -> None:
    without = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    tied, untied = write(tmp_path / "tied", TENSORS, tied=True), write(tmp_path / "untied", TENSORS)
    assert identity(tied, "fp32") == identity(write(tmp_path / "without", without, tied=True), "fp32")
    assert identity(untied, "fp32") != identity(tied, "fp32")


def test_the_last_bit_a_name_a_shape_and_the_dtype_count(tmp_path: Path) -> None:
    original = identity(write(tmp_path / "original", TENSORS), "fp32")
    bit = {name: tensor.clone() for name, tensor in TENSORS.items()}
    bit["model.norm.weight"].view(torch.int32)[2] += 1
    renamed = {name.replace("norm", "gnorm"): tensor for name, tensor in TENSORS.items()}
    reshaped = {**TENSORS, "lm_head.weight": TENSORS["lm_head.weight"].reshape(3, 4)}
    digits = {identity(write(tmp_path / str(i), tensors), "fp32") for i, tensors in enumerate((bit, renamed, reshaped))}
    digits.add(identity(tmp_path / "original", "bf16"))
    assert len(digits | {original}) == 5


def test_cast_files_have_the_identity_of_the_cast(tmp_path: Path) -> None:
    cast = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    assert identity(write(tmp_path / "bf16", cast), "bf16") == identity(write(tmp_path / "fp32", TENSORS), "bf16")


def test_strides_do_not_count() -> None:
    hashers = IdentityHasher("fp32"), IdentityHasher("fp32")
    matrix = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    hashers[0].add("w", matrix)
    hashers[1].add("w", matrix.T.contiguous().T)
    assert hashers[0].hexdigest() == hashers[1].hexdigest()


def test_a_corrupted_directory_is_an_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        identity(tmp_path, "fp32")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        identity(tmp_path, "fp32")
    with pytest.raises(CheckpointError, match="is not a directory"):
        identity(tmp_path / "nowhere", "fp32")
