"""The import phase: a Hugging Face directory becomes the checkpoint of step 0, behind two gates."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_spin.config import Config
from megatron_spin.conversion.identity import identities, streamed_identity
from megatron_spin.conversion.identity_record import RECORD, file_states, keep_identities
from megatron_spin.conversion.load import load_hf
from megatron_spin.conversion.parity import BOUNDS, check_parity, parity_sample, random_sequences
from megatron_spin.conversion.records import Converted, Parity
from megatron_spin.errors import CheckpointError, GateError
from megatron_spin.hf.assets import CHECKPOINT_ASSETS, copy_assets, read_hf_config, set_dtype
from megatron_spin.log import logger
from megatron_spin.models.family import HfConfig
from megatron_spin.models.provider import build_model
from megatron_spin.parallel.check import check_config
from megatron_spin.parallel.collectives import gather_objects, on_rank_zero, raised_everywhere
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.layout import alignment
from megatron_spin.parallel.setup import choose_device, initialize
from megatron_spin.parallel.stack import resolve_stack
from megatron_spin.processes import world_size
from megatron_spin.run.resume import STACK
from megatron_spin.training.checkpoint import save_checkpoint
from megatron_spin.training.tracker import latest_step


class ImportModel:
    """The phase, also without a run: ``config.model.hf`` becomes ``checkpoint``."""

    def __init__(self, config: Config, checkpoint: Path) -> None:
        self.config = config
        self.checkpoint = checkpoint

    def check(self) -> None:
        """Raises DeviceError, ConfigError, CheckpointError: device, layout or config.json are not as needed."""
        self._device = choose_device(self.config.device, deterministic=self.config.training.deterministic)
        check_config(self.config, self._device.type, world_size=world_size())

    def run(self) -> dict[str, Any]:
        """Imports. Raises as :func:`import_model`."""
        dims = initialize(self.config.parallel, self._device)
        result = import_model(self.config, self.checkpoint, dims=dims)
        logger.info(f"import: {self.config.model.hf} -> {self.checkpoint}, {result}")
        details = {"identity": result.identity, "dtype": result.dtype, **dataclasses.asdict(result.parity)}
        return {**details, STACK: resolve_stack(self.config, self._device).as_record()}


def _source_config(source: Path, checkpoint: Path) -> HfConfig:
    """The model's config.json, if ``checkpoint`` holds no training."""
    step = latest_step(checkpoint)
    if step:
        raise CheckpointError(f"{checkpoint} holds a checkpoint of step {step}: import into another directory")
    return read_hf_config(source)


def import_model(config: Config, checkpoint: Path, *, dims: ParallelDims) -> Converted:
    """Writes the Hugging Face model ``config.model.hf`` as the checkpoint of step 0; a collective.

    The checkpoint is in ``config.precision.dtype``. Two gates run before anything is written: streaming the loaded
    model back must give the bytes of the files (equal identities), and its log-probs must be those of transformers.

    Raises:
        CheckpointError: the model cannot be read or has another architecture, or ``checkpoint`` already holds training.
        GateError: the loaded model is not the same function.
    """
    source = Path(config.model.hf)
    dtype = config.precision.dtype
    hf_config = on_rank_zero(dims, lambda: _source_config(source, checkpoint))
    model = build_model(config, dims)
    load_hf(model, source, dims)
    found = streamed_identity(model, hf_config, dims, dtype)
    sample = parity_sample(model, random_sequences(hf_config), alignment=alignment(config), dims=dims)
    parity: Parity | None = None
    with raised_everywhere(dims):
        if dims.rank == 0:
            before = file_states(source, checkpoint / RECORD)
            known = identities(source, {dtype, config.precision.export_dtype})
            expected = known[dtype]
            if found != expected:
                raise GateError(
                    f"the model loaded from {source} streams back with identity {found}, not {expected}: "
                    "weights were lost"
                )
            parity = check_parity(source, sample, dtype=dtype, bound=BOUNDS[dtype], device=dims.device)
            copy_assets(source, checkpoint / CHECKPOINT_ASSETS)
            set_dtype(checkpoint / CHECKPOINT_ASSETS, dtype)
            keep_identities(source, known, checkpoint / RECORD, before=before)
    save_checkpoint(checkpoint, 0, model, dims=dims)
    parity = gather_objects(parity, dims)[0]
    assert parity is not None  # rank 0 measured it
    return Converted(identity=found, dtype=dtype, step=0, parity=parity)
