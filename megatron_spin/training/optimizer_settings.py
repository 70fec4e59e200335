"""Which optimizers there are, and which settings they refuse. No torch."""

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError

OPTIMIZERS = ("adam", "rmsprop", "sgd")
REFUSED_BY_RMSPROP = ("adam_beta1", "sgd_momentum")
"""Fields of ``OptimizerConfig`` that would be ignored: RMSProp has no momentum here."""
COMMON_FIELDS = {
    "optimizer",
    "clip_grad",
    "weight_decay",
    "decoupled_weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "sgd_momentum",
}
"""Fields that every version of Megatron's ``OptimizerConfig`` has, so that it need not be imported to check them."""


def check_optimizer(config: Config) -> None:
    """Checks ``training.optimizer`` as far as that is possible without Megatron.

    Raises:
        ConfigError: an unknown optimizer, or a field that it ignores.
    """
    given = config.training.optimizer
    if given["optimizer"] not in OPTIMIZERS:
        raise ConfigError(
            f"training.optimizer.optimizer={given['optimizer']!r} is not there: choose one of {', '.join(OPTIMIZERS)}"
        )
    if given.get("store_param_remainders"):
        raise ConfigError(
            "training.optimizer.store_param_remainders=true leaves no main weights that the next iteration could start "
            "from: leave it out and begin a new --run-dir"
        )
    if given.get("optimizer_cpu_offload"):
        # Megatron's HybridDeviceOptimizer keeps copies of its own, which a checkpoint's main weights do not reach.
        raise ConfigError(
            "training.optimizer.optimizer_cpu_offload=true keeps main weights where the next iteration cannot take "
            "them over: leave it out and begin a new --run-dir, with parallel.use_distributed_optimizer=true"
        )
    if given["optimizer"] != "rmsprop":
        return
    for name in REFUSED_BY_RMSPROP:
        if name in given:
            raise ConfigError(
                f"training.optimizer.{name}={given[name]} does not apply to rmsprop: leave it out, or use optimizer: "
                "adam"
            )
