"""The hash of a model's weights that does not depend on how they are stored or sharded: its identity. No Megatron."""

import hashlib
import re
from pathlib import Path

import torch

from megatron_spin.hf.files import DTYPES, TensorFiles, read_hf_config

_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")


def is_buffer(name: str) -> bool:
    """Whether ``name`` is a buffer that old checkpoints store but that follows from the config."""
    return bool(_BUFFERS.search(name))


def tensor_digest(tensor: torch.Tensor, dtype: str) -> str:
    """sha256 of the bytes of ``tensor`` cast to ``dtype`` (``fp32`` or ``bf16``), row-major, hexadecimal."""
    data = tensor.detach().to(device="cpu", dtype=DTYPES[dtype]).contiguous().reshape(-1)
    # An empty tensor has no bytes to view.
    return hashlib.sha256(data.view(torch.uint8).numpy().data if data.numel() else b"").hexdigest()


class IdentityHasher:
    """Collects tensors in any order and gives their common identity."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._entries: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Takes in one tensor under its Hugging Face name; returns the digest of its bytes."""
        digest = tensor_digest(tensor, self.dtype)
        self._entries[name] = f"{name}\t{self.dtype}\t{'x'.join(map(str, tensor.shape))}\t{digest}\n"
        return digest

    def hexdigest(self, *, without: str | None = None) -> str:
        """64 hexadecimal digits; the tensor named ``without`` does not count."""
        entries = [self._entries[name] for name in sorted(self._entries) if name != without]
        return hashlib.sha256("".join(entries).encode()).hexdigest()

    @property
    def names(self) -> list[str]:
        """Names of the tensors so far, sorted."""
        return sorted(self._entries)


def has_identity(hf_dir: Path, dtype: str, identity: str) -> bool:
    """Whether the Hugging Face model in ``hf_dir``, cast to ``dtype``, has this identity.

    The files of a tied model may hold a copy of the embedding, which does not count. Only the model's family knows its
    name; here it is the one tensor without which the identity is right.

    Raises:
        CheckpointError: the directory has no readable safetensors.
    """
    hasher = IdentityHasher(dtype)
    with TensorFiles(hf_dir) as files:
        for name in files.names:
            if not is_buffer(name):
                hasher.add(name, files.read(name))
    if hasher.hexdigest() == identity:
        return True
    tied = bool(read_hf_config(hf_dir).get("tie_word_embeddings", False))
    return tied and any(hasher.hexdigest(without=name) == identity for name in hasher.names)
