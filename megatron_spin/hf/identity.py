"""The identity of a model: a hash of its weights, however they are stored or sharded. No Megatron."""

import hashlib
import re
from pathlib import Path

import torch

from megatron_spin.hf.assets import read_hf_config
from megatron_spin.hf.files import DTYPES, TensorFiles

_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")


def is_buffer(name: str) -> bool:
    """Whether ``name`` is a buffer that old checkpoints store but that follows from the config."""
    return bool(_BUFFERS.search(name))


def tensor_digest(tensor: torch.Tensor, dtype: str) -> str:
    """sha256 of the bytes of ``tensor`` cast to ``dtype`` (``fp32`` or ``bf16``), row-major; hexadecimal."""
    if tensor.numel() == 0:
        return hashlib.sha256(b"").hexdigest()  # an empty tensor has no bytes to view
    data = tensor.detach().to(device="cpu", dtype=DTYPES[dtype]).contiguous().reshape(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()


class IdentityHasher:
    """Collects tensors in any order and gives the identity of all of them.

    Each tensor adds a line with its name, dtype, shape and digest; the identity is the sha256 of the sorted lines.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Takes in one tensor under its Hugging Face name; returns the digest of its bytes."""
        digest = tensor_digest(tensor, self.dtype)
        shape = "x".join(map(str, tensor.shape))
        self._lines[name] = f"{name}\t{self.dtype}\t{shape}\t{digest}\n"
        return digest

    def hexdigest(self, *, without: str | None = None) -> str:
        """64 hexadecimal digits; the tensor named ``without`` does not count."""
        lines = [self._lines[name] for name in sorted(self._lines) if name != without]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def names(self) -> list[str]:
        """Names of the tensors so far, sorted."""
        return sorted(self._lines)


def has_identity(hf_dir: Path, dtype: str, identity: str) -> bool:
    """Whether the Hugging Face model in ``hf_dir``, cast to ``dtype``, has this identity.

    The files of a tied model may hold a copy of the embedding, which does not count. Only the model's family knows its
    name; here it is the one tensor without which the identity is right.

    Raises:
        CheckpointError: the directory has no readable safetensors.
    """
    hasher = IdentityHasher(dtype)
    files = TensorFiles(hf_dir)
    for name in files.names:
        if not is_buffer(name):
            hasher.add(name, files.read(name))
    if hasher.hexdigest() == identity:
        return True
    tied = bool(read_hf_config(hf_dir).get("tie_word_embeddings", False))
    return tied and any(hasher.hexdigest(without=name) == identity for name in hasher.names)
