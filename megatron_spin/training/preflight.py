"""What training refuses before anything is started."""

import torch

from megatron_spin.config import Config
from megatron_spin.parallel.setup import check_config, choose_device
from megatron_spin.spin.objective import build_objective, num_iterations


def check_training(config: Config, *, world_size: int) -> torch.device:
    """Checks device, formats, layout, batch, optimizer and objective; returns the device, ready for Megatron's import.

    Raises:
        DeviceError: the device is not there, or cannot run the layer spec or the FP8 format.
        ConfigError: the model or the batch cannot be cut over ``world_size`` processes, the optimizer is not there, or
            the objective reports a metric under a name that is taken.
        CheckpointError: ``model.hf`` has no readable config.json.
    """
    device = choose_device(config.device)  # before Megatron is imported, below
    check_config(config, device, world_size=world_size)
    from megatron_spin.training.forward_step import reported_names
    from megatron_spin.training.optimizer import optimizer_config

    optimizer_config(config, learning_rate=1.0)
    for iteration in range(num_iterations(config)):
        reported_names(build_objective(config, iteration))  # calls it once
    return device
