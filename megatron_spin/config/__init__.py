"""The configuration: YAML into frozen dataclasses, checked in full before anything runs. No torch.

One file per section, each key with its range and its meaning. Sections carry Megatron's own field names where it has
them; ``model.transformer``, ``training.optimizer`` and ``parallel.ddp`` take any field of ``TransformerConfig``,
``OptimizerConfig`` and ``DistributedDataParallelConfig``. docs/configuration.md is generated from these files.
"""

from megatron_spin.config.config import Config, has_evaluation
from megatron_spin.config.data import DataConfig
from megatron_spin.config.evaluation import EvaluationConfig
from megatron_spin.config.generation import Engine, GenerationConfig, Truncated
from megatron_spin.config.guards import GuardsConfig
from megatron_spin.config.loading import from_dict, load_config, to_yaml
from megatron_spin.config.model import ModelConfig
from megatron_spin.config.parallel import ParallelConfig
from megatron_spin.config.precision import PrecisionConfig
from megatron_spin.config.spin import SpinConfig
from megatron_spin.config.training import BaselineConfig, TrainingConfig
from megatron_spin.config.values import PerIteration, at_iteration

__all__ = [
    "BaselineConfig",
    "Config",
    "DataConfig",
    "Engine",
    "EvaluationConfig",
    "GenerationConfig",
    "GuardsConfig",
    "ModelConfig",
    "ParallelConfig",
    "PerIteration",
    "PrecisionConfig",
    "SpinConfig",
    "TrainingConfig",
    "Truncated",
    "at_iteration",
    "from_dict",
    "has_evaluation",
    "load_config",
    "to_yaml",
]
