"""The identity of a model, from its Hugging Face directory or from the Megatron model: the same for the same weights.

Names, shapes and bytes count; buffers, a tied copy of the embedding and the layout of files and ranks do not.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from megatron_spin.conversion.stream import HfStream
from megatron_spin.hf.assets import read_hf_config
from megatron_spin.hf.files import TensorFiles
from megatron_spin.hf.identity import IdentityHasher, is_buffer
from megatron_spin.models.families import families
from megatron_spin.models.family import HfConfig
from megatron_spin.parallel.collectives import gather_objects
from megatron_spin.parallel.dims import ParallelDims


def identity(hf_dir: Path, dtype: str) -> str:
    """Identity of the Hugging Face model in ``hf_dir`` with its weights cast to ``dtype`` (``fp32`` or ``bf16``).

    A model of no known family has an identity, too; of such a model every tensor counts.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: the directory has no readable safetensors.
    """
    return identities(hf_dir, [dtype])[dtype]


def identities(hf_dir: Path, dtypes: Collection[str]) -> dict[str, str]:
    """:func:`identity` in each of ``dtypes``, from one pass over the files. Raises as that."""
    hf_config = read_hf_config(hf_dir)
    tied = bool(hf_config.get("tie_word_embeddings", False))
    family = families().get(hf_config.get("model_type", ""))
    hashers = {dtype: IdentityHasher(dtype) for dtype in dtypes}
    files = TensorFiles(hf_dir)
    for name in files.names:
        is_copy = family is not None and family.is_tied_copy(name, tied=tied)
        if is_copy or is_buffer(name):
            continue
        tensor = files.read(name)
        for hasher in hashers.values():
            hasher.add(name, tensor)
    return {dtype: hasher.hexdigest() for dtype, hasher in hashers.items()}


def streamed_identity(model: Sequence[torch.nn.Module], hf_config: HfConfig, dims: ParallelDims, dtype: str) -> str:
    """Identity of a Megatron model with its weights cast to ``dtype``, on every rank; a collective.

    Args:
        model: this rank's chunks.
        hf_config: the model's ``config.json``.
        dtype: ``fp32`` or ``bf16``.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: as :func:`megatron_spin.conversion.stream.HfStream`.
    """
    hasher = IdentityHasher(dtype)
    for name, tensor in HfStream(model, hf_config, dims, dtype):
        hasher.add(name, tensor)
    return gather_objects(hasher.hexdigest(), dims)[0]
