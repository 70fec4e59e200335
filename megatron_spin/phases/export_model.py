"""The export phase: the latest checkpoint becomes a Hugging Face directory, behind the parity gate."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from megatron_spin.config import Config
from megatron_spin.conversion.export import export_hf
from megatron_spin.conversion.parity import (
    BOUNDS,
    PROBE_FILE,
    ParitySample,
    check_parity,
    parity_sample,
    random_sequences,
)
from megatron_spin.conversion.records import Converted
from megatron_spin.hf.assets import CHECKPOINT_ASSETS, read_hf_config
from megatron_spin.log import logger
from megatron_spin.models.provider import build_model
from megatron_spin.parallel.check import check_config
from megatron_spin.parallel.collectives import on_rank_zero
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.layout import alignment
from megatron_spin.parallel.setup import choose_device, initialize
from megatron_spin.processes import world_size
from megatron_spin.training.checkpoint import load_checkpoint


class ExportModel:
    """The phase, also without a run: the latest step of ``checkpoint`` becomes ``out_dir``."""

    def __init__(self, config: Config, checkpoint: Path, out_dir: Path, *, dtype: str) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.out_dir = out_dir
        self.dtype = dtype

    def check(self) -> None:
        """Raises DeviceError, ConfigError, CheckpointError: device, layout or config.json are not as needed."""
        self._device = choose_device(self.config.device, deterministic=self.config.training.deterministic)
        check_config(self.config, self._device.type, world_size=world_size())

    def run(self) -> dict[str, Any]:
        """Exports. Raises as :func:`export_model`."""
        dims = initialize(self.config.parallel, self._device)
        result = export_model(self.config, self.checkpoint, self.out_dir, dims=dims, dtype=self.dtype)
        logger.info(f"export: {self.checkpoint} -> {self.out_dir}, {result}")
        details = {"identity": result.identity, "dtype": result.dtype, "step": result.step}
        return {**details, **dataclasses.asdict(result.parity)}


def _stored_sample(path: Path) -> ParitySample | None:
    return ParitySample.load(path) if path.is_file() else None


def export_model(config: Config, checkpoint: Path, out_dir: Path, *, dims: ParallelDims, dtype: str) -> Converted:
    """Writes the latest checkpoint as a Hugging Face directory in ``dtype``; a collective.

    The model computes in ``config.precision.dtype``. The gate compares the finished temporary directory with the
    trainer's own log-probs (``probe.safetensors`` in ``checkpoint``) or, if the trainer left none, with those of the
    loaded model on random tokens. Only then is the directory renamed into place.

    Raises:
        CheckpointError: the checkpoint or its ``hf/`` files are missing, corrupted or of another model.
        GateError: the export is not the same function.
    """
    assets = checkpoint / CHECKPOINT_ASSETS
    compute = config.precision.dtype
    hf_config = on_rank_zero(dims, lambda: read_hf_config(assets))
    stored = on_rank_zero(dims, lambda: _stored_sample(checkpoint / PROBE_FILE))
    model = build_model(config, dims)
    step = int(load_checkpoint(checkpoint, model, dims=dims)["step"])
    sample = stored or parity_sample(model, random_sequences(hf_config), alignment=alignment(config), dims=dims)
    bound = BOUNDS["fp32" if compute == dtype == "fp32" else "bf16"]
    verify = functools.partial(check_parity, sample=sample, dtype=compute, bound=bound, device=dims.device)
    export = export_hf(model, assets, out_dir, dims, dtype, step=step, verify=verify)
    assert export.parity is not None  # verify measured it
    return Converted(identity=export.identity, dtype=dtype, step=step, parity=export.parity)
