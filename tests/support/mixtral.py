"""Mixtral, a family that only the tests know: what the one file of a mixture of experts holds, and its ranks' work."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_spin.errors import CheckpointError
from megatron_spin.models.families import families, llama
from megatron_spin.models.family import Family, HfConfig, refuse_missing
from megatron_spin.models.rules import Direct, GateUp, Geometry, RowParallel, Rule

NUM_EXPERTS = 4


def refuse(hf_config: HfConfig) -> None:
    llama.refuse(hf_config)
    refuse_missing(hf_config, "num_local_experts", "num_experts_per_tok")


def geometry(hf_config: HfConfig) -> Geometry:
    return dataclasses.replace(Geometry.from_hf(hf_config), num_experts=hf_config["num_local_experts"])


def transformer_fields(hf_config: HfConfig) -> dict[str, Any]:
    return {
        **llama.transformer_fields(hf_config),
        "num_moe_experts": hf_config["num_local_experts"],
        "moe_router_topk": hf_config["num_experts_per_tok"],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }


EXPERT = "decoder.layers.{layer}.mlp.experts.local_experts.{expert}."
GROUPED = "decoder.layers.{layer}.mlp.experts."
HF_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
EXPERT_RULES: dict[str, Rule] = {
    "decoder.layers.{layer}.mlp.router.weight": Direct(("model.layers.{layer}.block_sparse_moe.gate.weight",)),
    f"{EXPERT}linear_fc1.weight": GateUp((f"{HF_EXPERT}w1.weight", f"{HF_EXPERT}w3.weight")),
    f"{EXPERT}linear_fc2.weight": RowParallel((f"{HF_EXPERT}w2.weight",)),
    # Transformer Engine's grouped GEMM numbers the weights of one module.
    f"{GROUPED}linear_fc1.weight{{expert}}": GateUp((f"{HF_EXPERT}w1.weight", f"{HF_EXPERT}w3.weight")),
    f"{GROUPED}linear_fc2.weight{{expert}}": RowParallel((f"{HF_EXPERT}w2.weight",)),
}
DENSE_RULES = {name: rule for name, rule in llama.RULES.items() if ".mlp." not in name and not name.endswith(".bias")}

FAMILY = Family(
    model_types=("mixtral",),
    refuse=refuse,
    transformer_fields=transformer_fields,
    gpt_arguments=llama.gpt_arguments,
    rules={**DENSE_RULES, **EXPERT_RULES},
    geometry=geometry,
)


def tiny_mixtral(directory: Path, *, seed: int = 0) -> Path:
    """Writes a randomly initialized Mixtral of 4 layers with 4 experts each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = MixtralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        sliding_window=None,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):  # ones would hide a norm that is mapped to the wrong place
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def build(
    hf_dir: Path, *, tp_size: int = 1, pp_size: int = 1, ep_size: int = 1, **transformer: Any
) -> tuple[list[Any], Any]:
    """(model filled with NaN, dims) of this rank, with the family registered.

    Expert parallel groups are made here, since the section ``parallel`` has no size for them.
    """
    from megatron_spin.parallel.setup import choose_device, initialize
    from tests.support.ranks import tiny_config

    families()["mixtral"] = FAMILY
    config = tiny_config(
        hf_dir,
        parallel={"tensor_model_parallel_size": tp_size, "pipeline_model_parallel_size": pp_size},
        model={"transformer": {"expert_model_parallel_size": ep_size, **transformer}},
    )
    device = choose_device("cpu")
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_spin.models.provider import build_model
    from megatron_spin.parallel.cpu_device import megatron_region

    dims = initialize(config.parallel, device)
    if ep_size > 1:
        parallel_state.destroy_model_parallel()
        with megatron_region():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp_size,
                pipeline_model_parallel_size=pp_size,
                expert_model_parallel_size=ep_size,
            )
        dims = dataclasses.replace(
            dims,
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
            ep_size=parallel_state.get_expert_model_parallel_world_size(),
            expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    model = build_model(config, dims)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    return list(model), dims


def roundtrip(
    hf_dir: Path, out_dir: Path, *, tp_size: int = 1, pp_size: int = 1, ep_size: int = 1
) -> tuple[str, list[str]]:
    """Loads and exports again; (identity, parameters of this rank by Megatron's own names) on every rank."""
    model, dims = build(hf_dir, tp_size=tp_size, pp_size=pp_size, ep_size=ep_size)
    from megatron_spin.conversion.export import export_hf
    from megatron_spin.conversion.load import load_hf

    load_hf(model, hf_dir, dims)
    names = []
    for name, parameter in model[0].named_parameters():
        assert not parameter.isnan().any(), name
        names.append(name)
    return export_hf(model, hf_dir, out_dir, dims, "fp32").identity, names


def lost_expert_error(hf_dir: Path, out_dir: Path) -> str:
    """What an export says on this rank of two expert parallel ranks if rank 1 has lost its last expert of layer 2."""
    model, dims = build(hf_dir, ep_size=2)
    from megatron_spin.conversion.export import export_hf
    from megatron_spin.conversion.load import load_hf

    load_hf(model, hf_dir, dims)
    if dims.ep_rank == 1:
        del model[0].decoder.layers[2].mlp.experts.local_experts[-1]
    try:
        export_hf(model, hf_dir, out_dir, dims, "fp32")
    except CheckpointError as error:
        return str(error)
    return ""


def token_logps(hf_dir: Path, input_ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``-forward(labels=)`` of a single process, [b, s]."""
    # The other dispatcher uses CUDA streams, which the CPU adapter does not have yet.
    model, dims = build(hf_dir, moe_token_dispatcher_type="allgather")
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.parallel.cpu_device import megatron_region

    load_hf(model, hf_dir, dims)
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 forgets the name where there is no Transformer Engine
        moe_utils.te_general_gemm = None
    ids = torch.from_numpy(input_ids)
    with megatron_region(), torch.no_grad():
        losses = model[0](ids, torch.arange(ids.shape[1]).expand_as(ids), None, labels=torch.from_numpy(labels))
    return (-losses).numpy()
