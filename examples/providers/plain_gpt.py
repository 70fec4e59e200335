"""A user's own model provider: a plain Megatron-Core GPTModel, built by hand, that is trained with the SPIN loss.

The signature is Megatron's, so the provider of an existing Megatron-LM script works in the same way. Name it in the
configuration:

    model:
      hf: path/to/model                      # where the weights, the tokenizer and config.json are
      provider: examples.providers.plain_gpt:model_provider

Nothing here knows about SPIN. Only the shape must be that of ``model.hf``; here it is a Llama with two layers and
hidden size 64.
"""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

VOCABULARY = 100


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPTModel:
    """This pipeline stage's part of the model."""
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=2,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        add_bias_linear=False,
        hidden_dropout=0.0,  # scoring and training must be the same function
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=-(-VOCABULARY // tensor_parallel) * tensor_parallel,
        max_sequence_length=256,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=10000,
        vp_stage=vp_stage,
    )
