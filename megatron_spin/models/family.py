"""What a model family is: how a Hugging Face ``config.json`` and its tensors become ``megatron.core``'s GPTModel."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from megatron_spin.errors import CheckpointError, ConfigError
from megatron_spin.models.rules import Geometry, Rule

HfConfig: TypeAlias = dict[str, Any]
"""The contents of a ``config.json``."""


@dataclasses.dataclass(frozen=True)
class RuleMatch:
    """A Megatron parameter in a family's table."""

    pattern: str
    """The parameter's name with ``{layer}`` and ``{expert}`` for its numbers: the key of the table."""
    position: int
    """Row of the table."""
    layer: int | None
    """The number in the name; None where the name has no ``{layer}``."""
    expert: int | None
    """The number in the name; None where the name has no ``{expert}``."""
    rule: Rule


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face architecture in terms of GPTModel.

    Each file of ``models/families/`` describes one, as ``FAMILY``. Its functions take the contents of ``config.json``;
    those other than ``refuse`` and ``geometry`` are called after ``refuse``.
    """

    model_types: tuple[str, ...]
    """Values of ``model_type`` in ``config.json``; the first one names the family."""
    refuse: Callable[[HfConfig], None]
    """Raises ConfigError for everything that is missing or that GPTModel would silently leave out."""
    transformer_fields: Callable[[HfConfig], dict[str, Any]]
    """The fields of Megatron's TransformerConfig that define what the model computes."""
    gpt_arguments: Callable[[HfConfig], dict[str, Any]]
    """The further arguments of GPTModel: position embedding and maximum length."""
    rules: Mapping[str, Rule]
    """Megatron parameter to rule, in the order of export.

    ``{layer}`` is the layer's number in the whole model and ``{expert}`` the expert's number in its layer, both from 0.
    A parameter has one row, or two where the local layer spec and Transformer Engine's fused modules name it
    differently.
    """
    geometry: Callable[[HfConfig], Geometry] = Geometry.from_hf
    embedding: str = "embedding.word_embeddings.weight"
    final_norm: str = "decoder.final_layernorm.weight"
    output: str = "output_layer.weight"

    def find(self, parameter: str, *, tied: bool) -> RuleMatch:
        """The row of the table for a Megatron parameter.

        Args:
            parameter: Megatron's name.
            tied: the output layer is the embedding.

        Raises:
            CheckpointError: the table has no such name, so converting would lose the parameter.
        """
        for position, (pattern, expression) in enumerate(self._expressions.items()):
            match = expression.fullmatch(parameter)
            if match is None:
                continue
            numbers = {name: int(number) for name, number in match.groupdict().items()}
            # A tied model has an output matrix only where the pipeline puts it on another rank than the embedding, as a
            # copy of the embedding.
            source = self.embedding if tied and pattern == self.output else pattern
            return RuleMatch(pattern, position, numbers.get("layer"), numbers.get("expert"), self.rules[source])
        raise CheckpointError(
            f"Megatron parameter {parameter} has no Hugging Face counterpart in family {self.model_types[0]}, so "
            "converting would lose it: add a rule to the family's file in megatron_spin/models/families/, or change "
            "the model.transformer setting that creates it"
        )

    def is_tied_copy(self, tensor: str, *, tied: bool) -> bool:
        """Whether the Hugging Face ``tensor`` is the output layer of a model that uses its embedding there."""
        return tied and tensor in self.rules[self.output].hf

    @functools.cached_property
    def _expressions(self) -> dict[str, re.Pattern[str]]:
        expressions = {}
        for pattern in self.rules:
            expression = re.escape(pattern)
            for placeholder in ("layer", "expert"):
                expression = expression.replace(re.escape(f"{{{placeholder}}}"), rf"(?P<{placeholder}>\d+)")
            expressions[pattern] = re.compile(expression)
        return expressions


def refuse_missing(hf_config: HfConfig, *names: str) -> None:
    """Refuses a ``config.json`` that leaves out one of ``names``: the defaults of transformers are no safe guess.

    Raises:
        ConfigError: with the first name that is missing.
    """
    for name in names:
        if name not in hf_config:
            raise ConfigError(f"the model's config.json lacks {name}: write it with transformers' save_pretrained")
