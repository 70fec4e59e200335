"""Optimizer settings that are refused before Megatron is imported."""

from pathlib import Path

import pytest

from megatron_spin.errors import ConfigError
from megatron_spin.training.optimizer_settings import OPTIMIZERS, check_optimizer
from tests.support.ranks import tiny_config


def test_main_weights_that_no_iteration_can_start_from_are_refused() -> None:
    optimizer = {"optimizer": "adam", "use_precision_aware_optimizer": True}
    check_optimizer(tiny_config(Path("model"), optimizer=optimizer))
    with pytest.raises(ConfigError, match=r"store_param_remainders=true leaves no main weights .* leave it out"):
        check_optimizer(tiny_config(Path("model"), optimizer={**optimizer, "store_param_remainders": True}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_offloaded_main_weights_are_refused(name: str) -> None:
    check_optimizer(tiny_config(Path("model"), optimizer={"optimizer": name, "optimizer_cpu_offload": False}))
    with pytest.raises(ConfigError, match=r"optimizer_cpu_offload=true keeps main weights .* leave it out"):
        check_optimizer(tiny_config(Path("model"), optimizer={"optimizer": name, "optimizer_cpu_offload": True}))
