"""Mistral: Llama with a sliding window and without biases."""

from typing import Any

from megatron_spin.models.families import llama
from megatron_spin.models.family import Family, HfConfig, refuse_missing


def refuse(hf_config: HfConfig) -> None:
    """Raises ConfigError for what is missing and for what GPTModel would silently leave out."""
    llama.refuse(hf_config)
    # Their defaults in transformers are 8 heads and a window of 4096, which most Mistrals do not have.
    refuse_missing(hf_config, "num_key_value_heads", "sliding_window")


def transformer_fields(hf_config: HfConfig) -> dict[str, Any]:
    """A ``config.json`` as fields of TransformerConfig."""
    fields = llama.transformer_fields(hf_config)
    window = hf_config["sliding_window"]
    if window:
        # Hugging Face counts the position itself, Megatron the positions before it.
        fields["window_size"] = (window - 1, 0)
    return fields


FAMILY = Family(
    model_types=("mistral",),
    refuse=refuse,
    transformer_fields=transformer_fields,
    gpt_arguments=llama.gpt_arguments,
    rules={name: rule for name, rule in llama.RULES.items() if not name.endswith(".bias")},
)
