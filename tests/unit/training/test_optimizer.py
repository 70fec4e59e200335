"""Megatron's optimizer and DDP settings, as far as they can be told without a process group."""

from typing import Any

import pytest
import torch

from megatron_spin.errors import ConfigError
from megatron_spin.models.precision import MEGATRON_DTYPES, with_dtypes
from megatron_spin.training.optimizer import optimizer_config, overlaps
from tests.support.configs import build

ON, OFF = True, False


@pytest.mark.parametrize(
    ("device", "optimizer", "ddp", "gradients", "parameters"),
    [
        ("cuda", "adam", {}, ON, ON),
        ("cpu", "adam", {}, OFF, OFF),
        ("cuda", "sgd", {}, ON, OFF),  # its state is not sharded, so there is nothing to gather
        ("cuda", "adam", {"overlap_grad_reduce": False}, ON, OFF),
    ],
)
def test_communication_overlaps_on_gpus(
    device: str, optimizer: str, ddp: dict[str, Any], gradients: bool, parameters: bool
) -> None:
    config = build(training={"optimizer": {"optimizer": optimizer}}, parallel={"ddp": ddp})
    assert overlaps(config, device) == {
        "overlap_grad_reduce": gradients,
        "overlap_param_gather": parameters,
    }


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16"])
def test_dtypes_have_names(name: str) -> None:
    from megatron.core.optimizer import OptimizerConfig

    given = {"exp_avg_dtype": name, "exp_avg_sq_dtype": "fp8", "clip_grad": 1.0, "optimizer": "adam"}
    values = with_dtypes(OptimizerConfig, given, "training.optimizer")
    assert values == {
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.uint8,
        "clip_grad": 1.0,
        "optimizer": "adam",
    }


@pytest.mark.parametrize("name", ["bf17", "torch.nn"])
def test_no_dtype(name: str) -> None:
    given = {"optimizer": "adam", "exp_avg_dtype": name}
    with pytest.raises(ConfigError, match=f"training.optimizer.exp_avg_dtype='{name}' is no dtype: use one of fp32"):
        optimizer_config(build(training={"optimizer": given}), learning_rate=1.0)


def test_low_precision_states_need_transformer_engine_and_say_so() -> None:
    given = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    with pytest.raises(ConfigError, match="use_precision_aware_optimizer=true needs Transformer Engine's FusedAdam"):
        optimizer_config(build(training={"optimizer": given}), learning_rate=1.0)


def test_fp32_states_by_name_are_the_default() -> None:
    given = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype", "main_params_dtype"), "fp32")
    named = optimizer_config(build(training={"optimizer": given}), learning_rate=1.0)
    assert named == optimizer_config(build(), learning_rate=1.0)
    assert MEGATRON_DTYPES["fp32"] is named.exp_avg_dtype
