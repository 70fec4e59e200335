"""The process that holds vLLM: JSON lines in on stdin, JSON lines out on what stdout was, everything vLLM prints into the log.

vLLM gives memory back only when its process ends, hence a process. It must not outlive its parent by a second, however that ends: on Linux
the kernel kills it then, and everywhere the end of stdin stops it.

First line in: the settings (see :func:`_start`). Then one line a call: ``{prompts, max_tokens, temperature, top_p, seed}``.
Lines out: ``{"ready": true}``, then for each call ``{"finished": [[index, token_ids, reason], ...]}`` as answers end and
``{"done": true}``; or ``{"error": "...", "kind": "device" | "config" | "failure"}`` and the end.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_spin.processes import die_with_parent

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

KV_SEQUENCES = 64
"""Sequences of full length that the KV cache on a CPU should hold at once."""


class SeedExtension:
    """Added by vLLM to its workers, so that each of them can be seeded between calls: one seed a shard, whatever ran before."""

    def set_sampling_seed(self, seed: int) -> None:
        from vllm.utils.torch_utils import set_random_seed

        set_random_seed(seed)


class _RefusedError(Exception):
    """What was asked for cannot be; ``kind`` says whose error it becomes."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def main() -> None:
    die_with_parent()
    # The channel keeps the real stdout for itself: vLLM and its libraries print to descriptor 1, which becomes the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message, separators=(",", ":")) + "\n")
        channel.flush()

    requests: queue.Queue[str | None] = queue.Queue()
    idle = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin, requests, idle), daemon=True).start()
    try:
        _serve(requests, idle, send)
    except _RefusedError as error:
        send({"error": str(error), "kind": error.kind})
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        send({"error": f"{type(error).__name__}: {_root(error)}", "kind": "failure"})
    # Not by way of destructors: vLLM's may wait for its own helpers, which end with this process anyway.
    sys.stdout.flush()
    os._exit(0)


def _listen(stdin: TextIO, requests: "queue.Queue[str | None]", idle: threading.Event) -> None:
    for line in stdin:
        idle.clear()
        requests.put(line)
    if not idle.is_set():
        os._exit(1)  # the parent is gone or has given up: nobody wants the answers
    requests.put(None)


def _serve(requests: "queue.Queue[str | None]", idle: threading.Event, send: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads(requests.get() or "{}")
    engine = _start(settings)
    send({"ready": True})
    while True:
        idle.set()
        line = requests.get()
        idle.clear()
        if line is None:
            return
        _answer(engine, settings["end_token_id"], json.loads(line), send)


def _start(settings: dict[str, Any]) -> "LLMEngine":
    """Starts the engine. ``settings``: hf_dir, dtype (fp32 or bf16), end_token_id, max_length, device, vllm (engine arguments)."""
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
        raise _RefusedError(
            f"vLLM cannot be imported ({error}): run `make setup`, or use generation.engine=hf", "device"
        ) from None

    on_cpu = bool(current_platform.is_cpu())
    if settings["device"] == ("cuda" if on_cpu else "cpu"):
        raise _RefusedError(
            f"device={settings['device']}, but the vLLM installed here runs on {'the CPU' if on_cpu else 'GPUs'}: use the other device, "
            "or generation.engine=hf",
            "device",
        )
    if on_cpu:
        _check_head_size(model)
    arguments = {
        "model": settings["hf_dir"],
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings["dtype"]],
        "max_model_len": settings["max_length"],
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        # A prompt answered from a cached prefix rounds otherwise than one computed whole: a resumed run would differ.
        "enable_prefix_caching": False,
        "enforce_eager": on_cpu,
        "disable_log_stats": True,
        "seed": 0,
        "worker_extension_cls": "megatron_spin.generation.vllm_worker.SeedExtension",  # in full: here the module is __main__
    }
    try:
        engine_arguments = EngineArgs(**{**arguments, **settings["vllm"]})
    except TypeError as error:
        raise _RefusedError(
            f"generation.vllm={settings['vllm']}: {error}; see vLLM's EngineArgs for what there is", "config"
        ) from None
    return LLMEngine.from_engine_args(engine_arguments)


def _environment(settings: dict[str, Any], model: dict[str, Any]) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    # In this process: the scheduler in a process of its own would batch by timing, and the same seed would not give the same answers.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    heads = model.get("num_key_value_heads") or model["num_attention_heads"]
    per_token = 2 * model["num_hidden_layers"] * heads * _head_size(model) * (4 if settings["dtype"] == "fp32" else 2)
    wanted = -(-per_token * settings["max_length"] * KV_SEQUENCES // 2**30)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, min(wanted, memory // 4))))


def _head_size(model: dict[str, Any]) -> int:
    return int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])


def _check_head_size(model: dict[str, Any]) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, supported = _head_size(model), CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise _RefusedError(
            f"vLLM on a CPU has no attention for the model's head size {size} (it has {', '.join(map(str, supported))}): set generation.engine=hf",
            "device",
        )


def _answer(engine: "LLMEngine", end: int, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    from vllm import SamplingParams

    engine.collective_rpc("set_sampling_seed", args=(request["seed"],))
    for index, (prompt, max_tokens) in enumerate(zip(request["prompts"], request["max_tokens"], strict=True)):
        # ignore_eos: the end token alone stops, not what else the model's config may call EOS.
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
            send({"finished": finished})
    send({"done": True})


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
