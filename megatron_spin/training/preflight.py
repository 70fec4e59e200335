"""What training refuses, checked before anything is started. No torch, unless there is a GPU or an unusual setting."""

from megatron_spin.config import Config
from megatron_spin.config.training import OBJECTIVES
from megatron_spin.parallel.check import check_config, check_version
from megatron_spin.run.devices import gpus_of
from megatron_spin.spin.objective import build_objective, num_iterations
from megatron_spin.training.optimizer_settings import COMMON_FIELDS, check_optimizer


def check_training(config: Config, *, world_size: int) -> None:
    """Checks device, formats, layout, batch, optimizer and objective, by rules that training itself checks again.

    Raises:
        DeviceError: the device is not there, or cannot run the layer spec.
        ConfigError: the model or the batch cannot be cut over ``world_size`` processes, the optimizer is not there, or
            the objective reports a metric under a name that is taken.
        CheckpointError: ``model.hf`` has no readable config.json.
    """
    check_version()
    on_gpu = len(gpus_of(config).names) > 0
    check_config(config, "cuda" if on_gpu else "cpu", world_size=world_size)
    check_optimizer(config)
    objectives = [build_objective(config, iteration) for iteration in range(num_iterations(config))]
    has_unusual_fields = not config.training.optimizer.keys() <= COMMON_FIELDS
    if not on_gpu and not has_unusual_fields and config.training.objective in OBJECTIVES:
        return
    from megatron_spin.parallel.setup import choose_device

    choose_device(config.device)  # before Megatron is imported, by the next lines
    from megatron_spin.training.forward_step import reported_names
    from megatron_spin.training.optimizer import optimizer_config

    optimizer_config(config, learning_rate=1.0)
    for objective in objectives:
        reported_names(objective)  # calls it once
