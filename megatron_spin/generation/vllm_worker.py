"""The process that runs vLLM; see :mod:`megatron_spin.generation.worker`.

vLLM gives its memory back only when its process ends, so it gets its own.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spin.errors import ConfigError, DeviceError
from megatron_spin.generation.worker import Answer, Message, Send, serve
from megatron_spin.machine import visible_gpus
from megatron_spin.run.devices import check_vllm, installed_vllm

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

KV_SEQUENCES = 64
"""Sequences of full length that the KV cache on a CPU has room for."""


class SeedExtension:
    """vLLM adds it to its workers, which are then seeded before each call: a shard's answers depend on its own seed."""

    def set_sampling_seed(self, seed: int) -> None:
        from vllm.utils.torch_utils import set_random_seed

        set_random_seed(seed)


def start(settings: Message) -> Answer:
    """Starts the engine; ``settings`` are those of :class:`megatron_spin.generation.engine.EngineSettings`."""
    engine = _engine(settings)
    return lambda request, send: _answer(engine, settings["end_token_id"], request, send)


def _engine(settings: Message) -> "LLMEngine":
    installed = installed_vllm()
    if installed:
        check_vllm(settings["device"], visible_gpus(), installed)
    model = json.loads((Path(settings["hf_dir"]) / "config.json").read_text())
    _environment(settings, model)

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise DeviceError(f"vLLM cannot be imported ({error}): run `make setup`, or use generation.engine=hf") from None

    on_cpu = bool(current_platform.is_cpu())
    runs_on, other_device = ("the CPU", "cuda") if on_cpu else ("GPUs", "cpu")
    if settings["device"] == other_device:
        raise DeviceError(
            f"device={other_device}, but the vLLM installed here runs on {runs_on}: use the other device, "
            "or generation.engine=hf"
        )
    if on_cpu:
        _check_head_size(model)
    arguments = {
        "model": settings["hf_dir"],
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings["dtype"]],
        "max_model_len": settings["max_length"],
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        # A prompt answered from a cached prefix is rounded differently, so a resumed run would differ.
        "enable_prefix_caching": False,
        "enforce_eager": on_cpu,
        "disable_log_stats": True,
        "seed": 0,
        # The full name, because this module runs as __main__.
        "worker_extension_cls": "megatron_spin.generation.vllm_worker.SeedExtension",
    }
    try:
        engine_arguments = EngineArgs(**{**arguments, **settings["vllm"]})
    except TypeError as error:
        raise ConfigError(
            f"generation.vllm={settings['vllm']}: {error}; see vLLM's EngineArgs for the arguments it has"
        ) from None
    return LLMEngine.from_engine_args(engine_arguments)


def _environment(settings: Message, model: dict[str, Any]) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    # A scheduler in another process batches by timing, and then the same seed does not give the same answers.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    heads = model.get("num_key_value_heads") or model["num_attention_heads"]
    bytes_per_value = 4 if settings["dtype"] == "fp32" else 2
    bytes_per_token = 2 * model["num_hidden_layers"] * heads * _head_size(model) * bytes_per_value
    wanted_gib = -(-bytes_per_token * settings["max_length"] * KV_SEQUENCES // 2**30)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    os.environ.setdefault(
        "VLLM_CPU_KVCACHE_SPACE", str(max(1, min(wanted_gib, memory_gib // 4 // settings["processes"])))
    )


def _head_size(model: dict[str, Any]) -> int:
    return int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])


def _check_head_size(model: dict[str, Any]) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = _head_size(model)
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise DeviceError(
            f"vLLM on a CPU has no attention for the model's head size {size} (it has "
            f"{', '.join(map(str, supported))}): set generation.engine=hf"
        )


def _answer(engine: "LLMEngine", end: int, request: Message, send: Send) -> None:
    from vllm import SamplingParams

    engine.collective_rpc("set_sampling_seed", args=(request["seed"],))
    for index, (prompt, max_tokens) in enumerate(zip(request["prompts"], request["max_tokens"], strict=True)):
        # ignore_eos: only the end token stops, whatever else the model's config calls EOS.
        parameters = SamplingParams(
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=max_tokens,
            stop_token_ids=[end],
            ignore_eos=True,
            detokenize=False,
        )
        engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
    while engine.has_unfinished_requests():
        finished = []
        for output in engine.step():
            if output.finished:
                answer = output.outputs[0]
                finished.append([int(output.request_id), list(answer.token_ids), answer.finish_reason])
        if finished:
            send({"finished": finished, "progress": [len(finished), sum(len(ids) for _, ids, _ in finished)]})


if __name__ == "__main__":
    serve(start)
