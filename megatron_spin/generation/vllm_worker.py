"""The process that runs vLLM. It reads JSON lines from stdin, writes JSON lines to stdout, and logs what vLLM prints.

vLLM gives its memory back only when its process ends, so it gets its own. The process must end with its parent, however
the parent ends: on Linux the kernel kills it, and on every system the end of stdin stops it.

The first line in is the settings (see :func:`_start`), then one line per call: ``{prompts, max_tokens, temperature,
top_p, seed}``. The first line out is ``{"ready": true}``, then per call ``{"finished": [[index, token_ids, reason],
...]}`` as answers end, and ``{"done": true}``. After ``{"error": "...", "kind": "device" | "config" | "failure"}`` the
process ends.
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

from megatron_spin.errors import DeviceError
from megatron_spin.machine import visible_gpus
from megatron_spin.processes import die_with_parent
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


class _RefusedError(Exception):
    """A request that cannot be fulfilled; ``kind`` says which error the parent raises."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def main() -> None:
    die_with_parent()
    # The channel takes over the real stdout. vLLM and its libraries print to descriptor 1, which becomes the log.
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
    except DeviceError as error:
        send({"error": str(error), "kind": "device"})
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        send({"error": f"{type(error).__name__}: {_root(error)}", "kind": "failure"})
    # Skips destructors: vLLM's may wait for its helper processes, which end with this process anyway.
    sys.stdout.flush()
    os._exit(0)


def _listen(stdin: TextIO, requests: "queue.Queue[str | None]", idle: threading.Event) -> None:
    for line in stdin:
        idle.clear()
        requests.put(line)
    if not idle.is_set():
        os._exit(1)  # the parent is gone or has given up: nobody reads the answers
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
    """Starts the engine.

    ``settings`` has hf_dir, dtype (fp32 or bf16), end_token_id, max_length, device and vllm (engine arguments).
    """
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
        raise _RefusedError(
            f"vLLM cannot be imported ({error}): run `make setup`, or use generation.engine=hf", "device"
        ) from None

    on_cpu = bool(current_platform.is_cpu())
    runs_on, other_device = ("the CPU", "cuda") if on_cpu else ("GPUs", "cpu")
    if settings["device"] == other_device:
        raise _RefusedError(
            f"device={other_device}, but the vLLM installed here runs on {runs_on}: use the other device, "
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
        raise _RefusedError(
            f"generation.vllm={settings['vllm']}: {error}; see vLLM's EngineArgs for the arguments it has", "config"
        ) from None
    return LLMEngine.from_engine_args(engine_arguments)


def _environment(settings: dict[str, Any], model: dict[str, Any]) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    # A scheduler in another process batches by timing, and then the same seed does not give the same answers.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    heads = model.get("num_key_value_heads") or model["num_attention_heads"]
    bytes_per_value = 4 if settings["dtype"] == "fp32" else 2
    bytes_per_token = 2 * model["num_hidden_layers"] * heads * _head_size(model) * bytes_per_value
    wanted_gib = -(-bytes_per_token * settings["max_length"] * KV_SEQUENCES // 2**30)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, min(wanted_gib, memory_gib // 4))))


def _head_size(model: dict[str, Any]) -> int:
    return int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])


def _check_head_size(model: dict[str, Any]) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = _head_size(model)
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise _RefusedError(
            f"vLLM on a CPU has no attention for the model's head size {size} (it has "
            f"{', '.join(map(str, supported))}): set generation.engine=hf",
            "device",
        )


def _answer(engine: "LLMEngine", end: int, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
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
            send({"finished": finished})
    send({"done": True})


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
