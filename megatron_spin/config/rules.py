"""Rules that join several values, or that no range can express; ranges of single values are beside their fields."""

import re
from collections.abc import Callable

from megatron_spin.config.config import Config
from megatron_spin.config.named import is_name
from megatron_spin.config.training import OBJECTIVES
from megatron_spin.config.values import as_list
from megatron_spin.errors import ConfigError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Names that become parts of file and phase names."""


def check(config: Config) -> None:
    """Checks every rule that needs no other file.

    Raises:
        ConfigError: the first rule that is broken: value, rule, remedy.
    """
    for rule in RULES:
        problem = rule(config)
        if problem is not None:
            raise ConfigError(problem)


def _objective(config: Config) -> str | None:
    objective = config.training.objective
    if objective in OBJECTIVES or is_name(objective):
        return None
    return (
        f"training.objective={objective!r} is neither one of {', '.join(OBJECTIVES)} nor package.module:Class: "
        "choose one, or name a class of a module that Python can import"
    )


def _whole_microbatches(config: Config) -> str | None:
    micro = config.training.micro_batch_size
    for batch in as_list(config.training.global_batch_size):
        if batch % micro:
            return (
                f"training.global_batch_size={batch} is not a multiple of training.micro_batch_size={micro}: "
                "change one of them"
            )
    return None


def _room_for_an_answer(config: Config) -> str | None:
    prompt, total = config.data.prompt_limit, config.data.max_length
    if prompt < total:
        return None
    return (
        f"data.max_prompt_length={prompt} leaves no room for an answer in data.max_length={total}: "
        "lower the one or raise the other"
    )


def _no_context_parallelism(config: Config) -> str | None:
    size = config.parallel.context_parallel_size
    if size == 1:
        return None
    return f"parallel.context_parallel_size={size} needs packed sequences, which do not exist yet: use 1"


def _sequence_parallel_needs_tensor_parallel(config: Config) -> str | None:
    if not config.parallel.sequence_parallel or config.parallel.tensor_model_parallel_size > 1:
        return None
    return "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1, which is 1: set it to false"


def _whole_replicas(config: Config) -> str | None:
    """A node holds whole replicas, or a replica whole nodes."""
    processes, replica = config.parallel.nproc_per_node, config.parallel.replica_size
    if processes is None or processes % replica == 0 or replica % processes == 0:
        return None
    return (
        f"parallel.nproc_per_node={processes} and the {replica} ranks of a model replica do not divide each other: "
        "change one of them"
    )


def _no_fp8(config: Config) -> str | None:
    """Megatron's layers can compute in FP8, but what is around them here cannot yet.

    Delayed scaling moves its scales in passes with gradients only, so the opponent would be scored at other scales than
    the policy trains with; the export gate would compare FP8 with bf16; and FP8 products need 8, 16 or 32 tokens.
    """
    if config.precision.fp8 is None:
        return None
    return (
        f"precision.fp8={config.precision.fp8} is not supported yet: scores and training would use different scales, "
        "the export gate compares with bf16, and sequences are not cut to FP8's block sizes: set precision.fp8 to null"
    )


def _patterns(config: Config) -> str | None:
    patterns = dict(config.evaluation.patterns)
    if config.evaluation.answer_pattern is not None:
        patterns["answer_pattern"] = config.evaluation.answer_pattern
    for name, pattern in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            return f"evaluation pattern {name}={pattern!r} is not a regular expression: {error}"
    return None


def _one_group(config: Config) -> str | None:
    pattern = config.evaluation.answer_pattern
    if pattern is None:
        return None
    groups = re.compile(pattern).groups
    if groups == 1:
        return None
    return f"evaluation.answer_pattern={pattern!r} has {groups} groups: it needs exactly one, around the answer"


def _likelihood_names(config: Config) -> str | None:
    for name in config.evaluation.likelihood:
        if not NAME.fullmatch(name):
            return (
                f"evaluation.likelihood.{name}: the name must begin with a letter and continue with letters, digits, "
                "'_' or '-'"
            )
    return None


def _baseline_names(config: Config) -> str | None:
    for name in config.baselines:
        if name == "sft" or not NAME.fullmatch(name):
            return (
                f"baselines.{name}: the name must begin with a letter, continue with letters, digits, '_' or '-', "
                "and not be sft"
            )
    return None


RULES: tuple[Callable[[Config], str | None], ...] = (
    _objective,
    _whole_microbatches,
    _room_for_an_answer,
    _no_context_parallelism,
    _sequence_parallel_needs_tensor_parallel,
    _whole_replicas,
    _no_fp8,
    _patterns,
    _one_group,
    _likelihood_names,
    _baseline_names,
)
"""In order; ``_one_group`` needs the pattern to be one. Each gives what is wrong, or None."""
