"""The identity of a Megatron model: that of the Hugging Face directory it would be exported to."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_spin.conversion.export import stream_hf
from megatron_spin.hf.identity import IdentityHasher
from megatron_spin.parallel.collectives import gather_objects
from megatron_spin.parallel.dims import ParallelDims


def streamed_identity(
    model: Sequence[torch.nn.Module], hf_config: dict[str, Any], dims: ParallelDims, dtype: str
) -> str:
    """Identity of ``model`` with its weights cast to ``dtype`` (``fp32`` or ``bf16``), on every rank; a collective.

    Args:
        model: this rank's chunks.
        hf_config: the model's ``config.json``.

    Raises:
        CheckpointError: as :func:`megatron_spin.conversion.export.stream_hf`.
    """
    hasher = IdentityHasher(dtype)
    for name, tensor in stream_hf(model, hf_config, dims, dtype):
        hasher.add(name, tensor)
    return gather_objects(hasher.hexdigest(), dims)[0]
