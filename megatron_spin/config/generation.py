"""Section ``generation``."""

import dataclasses
from typing import Annotated, Any, Literal, TypeAlias

from megatron_spin.config.values import PerIteration, Positive, Range

Engine: TypeAlias = Literal["vllm", "hf"]
Truncated: TypeAlias = Literal["keep", "drop"]

Temperature = Range(low=0, above_low=True, hint="self-play samples the opponent, and 1.0 is the method's")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How the opponent answers the prompts."""

    engine: PerIteration[Engine] = "vllm"
    """``vllm``, or ``hf`` for transformers' generate, which is faster for tiny models on a CPU."""
    temperature: Annotated[PerIteration[float], Temperature] = 1.0
    """Sampling temperature; 1.0 samples from the opponent itself, which is the method."""
    top_p: Annotated[PerIteration[float], Range(low=0, high=1, above_low=True)] = 1.0
    """Nucleus sampling: only the most probable tokens with this total probability are drawn from; 1.0: all."""
    max_new_tokens: Annotated[PerIteration[int], Positive] = 1024
    """Longest generated answer, and the cap of real answers, in tokens; the end token counts."""
    samples: Annotated[PerIteration[int], Positive] = 1
    """Answers that the opponent gives to each prompt; each makes a pair with the real one."""
    truncated: PerIteration[Truncated] = "keep"
    """What to do with pairs whose generated answer did not end."""
    shard_size: Annotated[PerIteration[int], Positive] = 2048
    """Prompts per shard; an interrupted shard is regenerated from the start."""
    batch_size: Annotated[PerIteration[int], Positive] = 256
    """Prompts per batch of the ``hf`` engine."""
    workers: Annotated[int | None, Positive] = None
    """Engines that generate at a time, each on GPUs of its own; null: as many as the GPUs allow, on a CPU one. The
    answers do not depend on it."""
    seed: PerIteration[int] = 0
    """Seed of the sampling."""
    vllm: PerIteration[dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Any vLLM engine argument, for example ``{tensor_parallel_size: 2, gpu_memory_utilization: 0.9}``."""
