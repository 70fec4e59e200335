"""The interface of the generation engines: token ids in, token ids out. No Megatron, no torch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_spin.config import Config, Engine, at_iteration

Progress = Callable[[int, int], None]
"""Called with the numbers of prompts finished and of tokens generated since the last call."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated answer."""

    token_ids: list[int]
    """If ``finish_reason`` is ``stop``, the end token is the last one and occurs once; if ``length``, there is none."""
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with."""

    engine: Engine
    hf_dir: Path
    """Hugging Face directory; only config and weights are read."""
    dtype: str
    """``fp32`` or ``bf16``."""
    end_token_id: int
    """Generation stops on this token and on no other."""
    max_length: int
    """Longest prompt and answer together, in tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = 256
    """Prompts per batch of the ``hf`` engine."""
    vllm: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further vLLM engine arguments."""
    gpus: tuple[str, ...] = ()
    """The GPUs of the engine, as CUDA_VISIBLE_DEVICES names them; none: all that this process sees, or the CPU."""
    processes: int = 1
    """Engines that run at a time; on a CPU each gets its share of the cores and of the memory."""
    log: Path | None = None
    """File for the log of the engine's process, or None for a temporary one. An error quotes its end."""


def engine_settings(
    config: Config, iteration: int, *, hf_dir: Path, end_token_id: int, log: Path | None = None
) -> EngineSettings:
    """Settings with which the model in ``hf_dir`` generates in ``iteration``."""
    return EngineSettings(
        engine=at_iteration(config.generation.engine, iteration),
        hf_dir=hf_dir,
        dtype=config.precision.export_dtype,
        end_token_id=end_token_id,
        max_length=config.data.max_length,
        device=config.device,
        batch_size=at_iteration(config.generation.batch_size, iteration),
        vllm=at_iteration(config.generation.vllm, iteration),
        log=log,
    )


class Session(Protocol):
    """A started engine."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """One answer per prompt, in order.

        Args:
            prompts: token ids, BOS included; none empty.
            max_new_tokens: longest answer of each prompt, the end token counted; at least 1.
            temperature: 0 is greedy.
            top_p: share of the probability that sampling chooses from.
            seed: the same seed, prompts and settings give the same answers on the same machine.

        Raises:
            DeviceError: the engine cannot run this model here, or its process died.
        """
        ...


@contextlib.contextmanager
def open_session(settings: EngineSettings) -> Iterator[Session]:
    """Starts an engine; at the end of the block it ends and gives its memory back.

    Raises:
        DeviceError: the engine cannot run this model on this device; names the remedy.
        CheckpointError: ``hf_dir`` holds no readable model.
    """
    # Each engine imports what only it needs.
    if settings.engine == "vllm":
        from megatron_spin.generation.process_engine import ProcessSession

        with ProcessSession(settings) as process_session:
            yield process_session
    else:
        from megatron_spin.generation.hf_engine import HfSession

        with HfSession(settings) as hf_session:
            yield hf_session


def answer_caps(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, max_length: int) -> list[int]:
    """Longest answer of each prompt: ``max_new_tokens``, or less so that prompt and answer fit ``max_length``."""
    return [min(max_new_tokens, max_length - len(prompt)) for prompt in prompts]
