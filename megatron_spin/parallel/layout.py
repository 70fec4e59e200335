"""How a model and a batch are cut over processes: the rules, checked before any process starts. No torch."""

from typing import Any

from megatron_spin.config import Config
from megatron_spin.config.values import as_list
from megatron_spin.errors import ConfigError

REQUIRED = ("num_attention_heads", "num_hidden_layers", "intermediate_size")
"""Keys of the model's config.json that the rules need."""


def alignment(config: Config) -> int:
    """The multiple to which the sequence length of a microbatch is rounded up, in tokens.

    8, because tensor cores process 16-bit matrices in blocks of 8 rows, and 8 must divide the number of rows of
    Transformer Engine's FP8 products. Sequence parallelism cuts each sequence over the tensor parallel ranks; there
    each rank's part is a multiple of 8.
    """
    if config.parallel.sequence_parallel:
        return 8 * config.parallel.tensor_model_parallel_size
    return 8


def check_layout(config: Config, hf_config: dict[str, Any], *, world_size: int) -> None:
    """Refuses a model or a batch that cannot be cut as configured; needs no process group.

    Raises:
        ConfigError: everything that :func:`layout_errors` found, in one line.
    """
    errors = layout_errors(config, hf_config, world_size=world_size)
    if errors:
        raise ConfigError("; ".join(errors))


def layout_errors(config: Config, hf_config: dict[str, Any], *, world_size: int) -> list[str]:
    """All reasons why the model and the batch cannot be cut over ``world_size`` processes; each names every factor."""
    missing = [name for name in REQUIRED if not hf_config.get(name)]
    if missing:
        return [f"the model's config.json lacks {key}: write it with transformers' save_pretrained" for key in missing]
    return [*_model_errors(config, hf_config), *_batch_errors(config, world_size)]


def _model_errors(config: Config, hf_config: dict[str, Any]) -> list[str]:
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    errors = []
    for name in ("num_attention_heads", "intermediate_size"):
        if hf_config[name] % tp:
            errors.append(
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {name}={hf_config[name]}: "
                "choose a divisor"
            )
    groups = hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]
    if groups % tp and tp % groups:
        errors.append(
            f"parallel.tensor_model_parallel_size={tp} and the model's num_key_value_heads={groups} do not divide "
            "each other: choose a divisor or a multiple"
        )
    layers = hf_config["num_hidden_layers"]
    if layers % pp:
        errors.append(
            f"parallel.pipeline_model_parallel_size={pp} does not divide the model's num_hidden_layers={layers}: "
            "choose a divisor"
        )
    return errors


def _batch_errors(config: Config, world_size: int) -> list[str]:
    parallel, training = config.parallel, config.training
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    replica = parallel.replica_size
    if world_size % replica:
        return [
            f"{world_size} processes are not a multiple of the {replica} of one replica (tensor {tp} x pipeline {pp} "
            f"x context {cp}): start a multiple of {replica}, or change the parallel sizes"
        ]
    dp, micro = world_size // replica, training.micro_batch_size
    errors = []
    for batch in as_list(training.global_batch_size):
        if batch % (micro * dp):
            errors.append(
                f"training.global_batch_size={batch} is not a multiple of training.micro_batch_size={micro} x {dp} "
                f"data parallel ranks ({world_size} processes / tensor {tp} / pipeline {pp} / context {cp}): "
                "change one of them"
            )
    return errors
