"""What may differ when a run directory is opened again."""

import dataclasses
from pathlib import Path

from megatron_spin.config.config import Config
from megatron_spin.config.loading import load_config
from megatron_spin.config.parsing import flatten

RESUMABLE = (
    "name",
    "device",
    "parallel",
    "spin.iterations",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.micro_batch_size",
    "generation.batch_size",
    "generation.vllm",
    "evaluation.batch_size",
    "baselines",
    "guards",
)
"""Anything else would contradict what is already there."""


def changes_forbidden(path: Path, config: Config) -> list[str]:
    """Dotted keys, outside :data:`RESUMABLE`, whose value in the resolved file ``path`` differs from ``config``'s."""
    old, new = flatten(dataclasses.asdict(load_config(path))), flatten(dataclasses.asdict(config))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [key for key in differing if not any(key == free or key.startswith(f"{free}.") for free in RESUMABLE)]
