"""Model families: which Megatron parameter is made of which Hugging Face tensors, by which rule. Tables, no code per family.

To add a family, write its table and put it into :data:`FAMILIES` under the ``model_type`` of its ``config.json``.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from megatron_spin.errors import CheckpointError
from megatron_spin.models.rules import Direct, GateUp, Geometry, QueryKeyValue, RowParallel, Rule, VocabParallel

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face architecture in terms of ``megatron.core``'s GPTModel."""

    name: str
    rules: Mapping[str, Rule]
    """Megatron parameter (``{layer}``: the layer's number in the whole model, from 0) to rule, in the order of export."""
    embedding: str = "embedding.word_embeddings.weight"
    final_norm: str = "decoder.final_layernorm.weight"
    output: str = "output_layer.weight"

    def find(self, parameter: str, geometry: Geometry) -> tuple[int, int, Rule]:
        """(layer number or -1, position in the table, rule) of a Megatron parameter name.

        Raises:
            CheckpointError: the table has no such name: converting would lose the parameter.
        """
        match = _LAYER.search(parameter)
        layer = int(match[0]) if match else -1
        pattern = _LAYER.sub("{layer}", parameter)
        if pattern not in self.rules:
            raise CheckpointError(
                f"Megatron parameter {parameter} has no Hugging Face counterpart in family {self.name}, so converting would lose it: "
                "add a rule in megatron_spin/models/families.py, or change the model.transformer setting that creates it"
            )
        position = list(self.rules).index(pattern)
        # A tied model has an output matrix only where the pipeline puts it on another rank than the embedding, as a copy.
        rule = self.rules[self.embedding if pattern == self.output and geometry.tied else pattern]
        return layer, position, rule


# Llama's names; a parameter has one row, or two where the local layer spec and Transformer Engine's fused modules name it differently.
_LLAMA: dict[str, Rule] = {
    "embedding.word_embeddings.weight": VocabParallel(("model.embed_tokens.weight",)),
    "decoder.layers.{layer}.input_layernorm.weight": Direct(("model.layers.{layer}.input_layernorm.weight",)),
    "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight": Direct(
        ("model.layers.{layer}.input_layernorm.weight",)
    ),
    "decoder.layers.{layer}.self_attention.linear_qkv.weight": QueryKeyValue(
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv")
    ),
    "decoder.layers.{layer}.self_attention.linear_qkv.bias": QueryKeyValue(
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.bias" for part in "qkv")
    ),
    "decoder.layers.{layer}.self_attention.linear_proj.weight": RowParallel(
        ("model.layers.{layer}.self_attn.o_proj.weight",)
    ),
    "decoder.layers.{layer}.self_attention.linear_proj.bias": Direct(("model.layers.{layer}.self_attn.o_proj.bias",)),
    "decoder.layers.{layer}.pre_mlp_layernorm.weight": Direct(
        ("model.layers.{layer}.post_attention_layernorm.weight",)
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight": Direct(
        ("model.layers.{layer}.post_attention_layernorm.weight",)
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.weight": GateUp(
        tuple(f"model.layers.{{layer}}.mlp.{part}_proj.weight" for part in ("gate", "up"))
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.bias": GateUp(
        tuple(f"model.layers.{{layer}}.mlp.{part}_proj.bias" for part in ("gate", "up"))
    ),
    "decoder.layers.{layer}.mlp.linear_fc2.weight": RowParallel(("model.layers.{layer}.mlp.down_proj.weight",)),
    "decoder.layers.{layer}.mlp.linear_fc2.bias": Direct(("model.layers.{layer}.mlp.down_proj.bias",)),
    "decoder.final_layernorm.weight": Direct(("model.norm.weight",)),
    "output_layer.weight": VocabParallel(("lm_head.weight",)),
}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _LLAMA),
    # Mistral's tensors carry Llama's names; biases do not exist there, the sliding window is not a parameter.
    "mistral": Family("mistral", {name: rule for name, rule in _LLAMA.items() if not name.endswith(".bias")}),
}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a ``config.json``.

    Raises:
        CheckpointError: there is no table for its ``model_type``, or its weights are quantized.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} in config.json is none of {', '.join(FAMILIES)}: use one of these families"
        )
    if "quantization_config" in config:
        raise CheckpointError("quantization_config in config.json: quantized models are not supported, use a full one")
    return FAMILIES[model_type]
