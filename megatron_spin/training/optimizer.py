"""Megatron's optimizer, built from the configuration."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError
from megatron_spin.models.precision import with_dtypes
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.training import rmsprop
from megatron_spin.training.optimizer_settings import check_optimizer

OVERLAPS = ("overlap_grad_reduce", "overlap_param_gather")
"""Fields of Megatron's DistributedDataParallelConfig that hide communication behind computation."""
BUCKET_SIZE = 40_000_000
"""Parameters per bucket where communication overlaps. Megatron's default, but for all sizes of the data parallel group:
an optimizer state that is stored by buckets must fit when that size changes."""


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Sets ``rate`` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)


def distributed_optimizer(config: Config) -> bool:
    """Whether the optimizer state is sharded: as configured, but not for SGD, which Megatron's DistributedOptimizer
    does not take.
    """
    return config.parallel.use_distributed_optimizer and config.training.optimizer["optimizer"] != "sgd"


def overlaps(config: Config, device_type: str) -> dict[str, bool]:
    """Which communication overlaps computation unless ``parallel.ddp`` says otherwise: all that can, on GPUs.

    One data parallel rank has nothing to overlap, but only with overlaps Megatron makes buckets, and an optimizer state
    that is stored by buckets must fit when the number of ranks changes.
    """
    overlap_gradients = device_type == "cuda"
    # Megatron starts the gather of parameters from its hooks of gradients, so the one needs the other.
    overlap_gradients_given = config.parallel.ddp.get("overlap_grad_reduce", overlap_gradients)
    return {
        "overlap_grad_reduce": overlap_gradients,
        "overlap_param_gather": overlap_gradients and overlap_gradients_given and distributed_optimizer(config),
    }


def optimizer_config(config: Config, *, learning_rate: float) -> OptimizerConfig:
    """``training.optimizer`` as Megatron's OptimizerConfig.

    Raises:
        ConfigError: an unknown field, an unknown optimizer, or a field that the optimizer ignores.
    """
    check_optimizer(config)
    given = dict(config.training.optimizer)
    if given["optimizer"] == "rmsprop":
        given = {"adam_beta2": rmsprop.ALPHA, "adam_eps": rmsprop.EPS, **given, **rmsprop.AS_ADAM}
    if given.get("use_precision_aware_optimizer") and not HAVE_TE:
        raise ConfigError(
            "training.optimizer.use_precision_aware_optimizer=true needs Transformer Engine's FusedAdam, which is not "
            "here: install Transformer Engine on a machine with a GPU, or leave the field out"
        )
    bf16 = config.precision.dtype == "bf16"
    ours = {"lr": learning_rate, "bf16": bf16, "params_dtype": torch.bfloat16 if bf16 else torch.float32}
    defaults = {
        "min_lr": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "store_param_remainders": False,
        "use_distributed_optimizer": distributed_optimizer(config),
    }
    return _megatron_config(OptimizerConfig, {**defaults, **given, **ours}, "training.optimizer")


def wrap_and_optimize(
    model: Sequence[MegatronModule], config: Config, *, dims: ParallelDims, learning_rate: float
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Megatron's DistributedDataParallel around each chunk, and the optimizer of its gradients.

    Sets the hooks without which sequence-parallel norms and tied embeddings silently get wrong gradients.
    """
    with megatron_region():
        given = {
            "grad_reduce_in_fp32": True,
            **overlaps(config, dims.device.type),
            "bucket_size": BUCKET_SIZE,
            **config.parallel.ddp,
            "use_distributed_optimizer": distributed_optimizer(config),
        }
        ddp_config = _megatron_config(DistributedDataParallelConfig, given, "parallel.ddp")
        wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in model]
        settings = optimizer_config(config, learning_rate=learning_rate)
        optimizer = get_megatron_optimizer(settings, wrapped)
        if config.training.optimizer["optimizer"] == "rmsprop":
            rmsprop.replace_adam(optimizer, settings)
        # Norms and biases do not decay. Megatron's own scheduler, which is not used here, would apply this factor.
        for group in optimizer.param_groups:
            group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
        for chunk in wrapped:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.no_sync_func = wrapped[0].no_sync
            if len(wrapped) > 1:
                chunk.config.no_sync_func = [part.no_sync for part in wrapped]
            chunk.config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def _megatron_config(kind: Any, values: dict[str, Any], section: str) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{section}.{name} is not a field of Megatron's {kind.__name__}: check its spelling")
    try:
        return kind(**with_dtypes(kind, values, section))
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{section}: Megatron's {kind.__name__} refuses it: {error}") from error
