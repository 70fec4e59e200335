"""Import and export with their gates: what the two conversion tools do once their arguments are read."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_spin.config import Config
from megatron_spin.conversion.export import export_hf, stream_hf
from megatron_spin.conversion.load import load_hf
from megatron_spin.conversion.parity import BOUNDS, PROBE_FILE, Probe, check_parity, megatron_probe, random_sequences
from megatron_spin.errors import CheckpointError, GateError
from megatron_spin.hf.assets import copy_assets, set_dtype
from megatron_spin.hf.files import read_config
from megatron_spin.hf.identity import IdentityHasher, identity
from megatron_spin.models.provider import build_model
from megatron_spin.parallel.collectives import raised_everywhere
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.training.checkpoint import latest_step, load_checkpoint, save_checkpoint

ASSETS = "hf"
"""Subdirectory of a checkpoint directory with the model's config and tokenizer files: export needs nothing else."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion did, for the log and for ``state.json``."""

    identity: str
    dtype: str
    step: int
    parity: dict[str, float]

    def __str__(self) -> str:
        return f"{self.dtype}, identity {self.identity[:16]}, log-probs within {self.parity['largest_difference']:.2g} nats"


def import_model(config: Config, checkpoint: Path, *, dims: ParallelDims) -> Converted:
    """Writes the Hugging Face model ``config.model.hf`` as the checkpoint of step 0, in ``config.precision.dtype``; a collective.

    Two gates come before anything is written: streaming the loaded model back must give the very bytes of the files (their identity), and
    its log-probs must be those of transformers.

    Raises:
        CheckpointError: the model cannot be read or is of another architecture, or ``checkpoint`` already holds training.
        GateError: the loaded model is not the same function.
    """
    source, dtype = Path(config.model.hf), config.precision.dtype
    with raised_everywhere(dims):
        hf_config = read_config(source)
        if latest_step(checkpoint):
            raise CheckpointError(
                f"{checkpoint} holds a checkpoint of step {latest_step(checkpoint)}: import into another directory"
            )
    model = build_model(config, dims)
    load_hf(model, source, dims)
    hasher = IdentityHasher(dtype)
    for name, tensor in stream_hf(model, hf_config, dims, dtype):
        hasher.add(name, tensor)
    probe = megatron_probe(model, random_sequences(hf_config), dims=dims)
    parity: dict[str, float] = {}
    with raised_everywhere(dims):
        if dims.rank == 0:
            expected = identity(source, dtype)
            if hasher.hexdigest() != expected:
                raise GateError(
                    f"the model loaded from {source} streams back with identity {hasher.hexdigest()}, not {expected}: weights were lost"
                )
            parity = check_parity(source, probe, dtype=dtype, bound=BOUNDS[dtype], device=dims.device)
            copy_assets(source, checkpoint / ASSETS)
            set_dtype(checkpoint / ASSETS, dtype)
    save_checkpoint(checkpoint, 0, model, dims=dims)
    return Converted(hasher.hexdigest(), dtype, 0, parity)


def export_model(config: Config, checkpoint: Path, out_dir: Path, *, dims: ParallelDims, dtype: str) -> Converted:
    """Writes the latest checkpoint as a Hugging Face directory in ``dtype``, computing in ``config.precision.dtype``; a collective.

    The gate compares the finished temporary directory with the trainer's own log-probs (``probe.safetensors`` in ``checkpoint``), or, where
    it left none, with those of the loaded model on random tokens; only then is the directory renamed into place.

    Raises:
        CheckpointError: the checkpoint or its ``hf/`` files are missing, corrupted or of another model.
        GateError: the export is not the same function.
    """
    assets, compute = checkpoint / ASSETS, config.precision.dtype
    with raised_everywhere(dims):
        hf_config = read_config(assets)
        stored = Probe.load(checkpoint / PROBE_FILE) if (checkpoint / PROBE_FILE).is_file() else None
    model = build_model(config, dims)
    step = int(load_checkpoint(checkpoint, model, dims=dims)["step"])
    probe = stored or megatron_probe(model, random_sequences(hf_config), dims=dims)
    bound = BOUNDS["fp32" if compute == dtype == "fp32" else "bf16"]
    parity: dict[str, float] = {}

    def verify(directory: Path) -> dict[str, Any]:
        parity.update(check_parity(directory, probe, dtype=compute, bound=bound, device=dims.device))
        return {"step": step, **parity}

    digits = export_hf(model, assets, out_dir, dims, dtype, verify=verify)
    return Converted(digits, dtype, step, parity)
