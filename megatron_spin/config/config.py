"""The root of the configuration."""

import dataclasses
from typing import Literal

from megatron_spin.config.data import DataConfig
from megatron_spin.config.evaluation import EvaluationConfig
from megatron_spin.config.generation import GenerationConfig
from megatron_spin.config.guards import GuardsConfig
from megatron_spin.config.model import ModelConfig
from megatron_spin.config.parallel import ParallelConfig
from megatron_spin.config.precision import PrecisionConfig
from megatron_spin.config.spin import SpinConfig
from megatron_spin.config.training import BaselineConfig, TrainingConfig, default_baselines
from megatron_spin.config.values import at_iteration


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of self-play, DPO or SFT."""

    name: str
    """Name of the run; the run directory is ``runs/NAME`` unless ``--run-dir`` names another."""
    model: ModelConfig
    data: DataConfig
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU if PyTorch sees one."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Megatron's layer spec; ``auto``: Transformer Engine's for bf16 on a GPU that has it, else the local one.

    Transformer Engine does not take ``precision.dtype: fp32``: it multiplies fp32 matrices in TF32.
    """
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    spin: SpinConfig = dataclasses.field(default_factory=SpinConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    baselines: dict[str, BaselineConfig] = dataclasses.field(default_factory=default_baselines)
    """Continued-SFT baselines by name; ``sft``, the model that the run begins with, is always evaluated."""
    guards: GuardsConfig = dataclasses.field(default_factory=GuardsConfig)

    @property
    def data_files(self) -> dict[str, str]:
        """Paths of all data files, by the key that names each."""
        files = {"data.path": self.data.path}
        if self.evaluation.path is not None:
            files["evaluation.path"] = self.evaluation.path
        for name, path in self.evaluation.likelihood.items():
            files[f"evaluation.likelihood.{name}"] = path
        return files

    @property
    def held_out_cap(self) -> int:
        """Longest held-out answer, real or generated, in tokens: one for all models, so that they can be compared."""
        return self.evaluation.max_new_tokens or at_iteration(self.generation.max_new_tokens, 0)


def has_evaluation(config: Config) -> bool:
    """Whether there are held-out data, hence evaluate phases."""
    return config.evaluation.path is not None or config.evaluation.held_out_fraction > 0
