"""How much disk a run takes, from the bytes that its checkpoints have. Pure.

Within an iteration a checkpoint holds the model's weights, the optimizer's fp32 main weights and its moments; the last
one of an iteration holds main weights alone (:mod:`megatron_spin.training.checkpoint`).
"""

import dataclasses

from megatron_spin.config import Config

OVERHEAD = 1.03
"""Padded rows of the vocabulary, tables of contents and checksums, as a factor on the bytes of the tensors."""
BYTES = {"fp32": 4, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class DiskEstimate:
    """Bytes on disk."""

    next_model: int
    """What the next trained model takes at most while it is made."""
    resident: int
    """What the run leaves."""
    peak: int
    """What it takes at most before its end."""


def estimate_disk(config: Config, parameters: int, *, imports: int, models: int) -> DiskEstimate:
    """What is still to be written.

    Args:
        parameters: of the model.
        imports: 1 if the starting model is still to be imported, else 0.
        models: iterations and baselines still to be trained and exported.
    """
    full, last = checkpoint_bytes(config, parameters)
    keep = config.training.keep_checkpoints
    base = imports * int(parameters * BYTES[config.precision.dtype] * OVERHEAD)
    if not models:
        return DiskEstimate(next_model=0, resident=base, peak=base)
    exported = int(parameters * BYTES[config.precision.export_dtype] * OVERHEAD)
    left = (keep - 1) * full + last + exported
    # A new checkpoint is complete before the oldest goes.
    while_training = max((keep + 1) * full, left)
    resident = base + models * left
    return DiskEstimate(next_model=while_training, resident=resident, peak=resident - left + while_training)


def checkpoint_bytes(config: Config, parameters: int) -> tuple[int, int]:
    """Bytes of a checkpoint within an iteration, and of the last one of an iteration."""
    dtype, optimizer = config.precision.dtype, config.training.optimizer
    main_weights = 4
    moments = 8
    if optimizer.get("optimizer") == "sgd":
        moments = 4 if optimizer.get("sgd_momentum", 0.9) else 0
    # SGD's state is never distributed: in fp32 the weights are their own main weights, and are stored once.
    is_main_stored = dtype == "bf16" or optimizer.get("optimizer") != "sgd"
    each = BYTES[dtype] + (main_weights if is_main_stored else 0) + moments
    return int(parameters * each * OVERHEAD), int(parameters * main_weights * OVERHEAD)
