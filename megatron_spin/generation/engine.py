"""What generates: token ids in, token ids out. One interface over the engines, one engine start for many calls. No Megatron, no torch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Progress = Callable[[int, int], None]
"""Called with the number of prompts finished and of tokens generated since the last call."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated answer."""

    token_ids: list[int]
    """With the end token, once and last, if ``finish_reason`` is ``stop``; without one if it is ``length``."""
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with."""

    engine: Literal["vllm", "hf"]
    hf_dir: Path
    """Hugging Face directory; only config and weights are read."""
    dtype: Literal["fp32", "bf16"]
    end_token_id: int
    """Generation stops on this token and on no other."""
    max_length: int
    """Longest prompt and answer together, in tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = 256
    """Prompts a batch of the ``hf`` engine."""
    vllm: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further vLLM engine arguments."""
    log: Path | None = None
    """File for the log of the vLLM process; None: a temporary one. Its end is quoted when the process fails."""


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
        """One answer a prompt, in order.

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
    """Starts an engine; it ends, and gives its memory back, with the block.

    Raises:
        DeviceError: the engine cannot run this model on this device; names the remedy.
        CheckpointError: ``hf_dir`` holds no readable model.
    """
    if settings.engine == "vllm":
        from megatron_spin.generation.vllm_engine import VllmSession  # each engine imports what only it needs

        with VllmSession(settings) as session:
            yield session
    else:
        from megatron_spin.generation.hf_engine import HfSession

        yield HfSession(settings)


def generate(
    prompts: Sequence[Sequence[int]],
    *,
    engine: Literal["vllm", "hf"],
    hf_dir: Path,
    dtype: Literal["fp32", "bf16"],
    end_token_id: int,
    max_length: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int = 256,
) -> list[Completion]:
    """One start, one call; see :class:`EngineSettings` and :meth:`Session.generate`."""
    settings = EngineSettings(
        engine=engine,
        hf_dir=hf_dir,
        dtype=dtype,
        end_token_id=end_token_id,
        max_length=max_length,
        device=device,
        batch_size=batch_size,
    )
    with open_session(settings) as session:
        caps = answer_caps(prompts, max_new_tokens=max_new_tokens, max_length=max_length)
        return session.generate(prompts, max_new_tokens=caps, temperature=temperature, top_p=top_p, seed=seed)


def answer_caps(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, max_length: int) -> list[int]:
    """Longest answer of each prompt: ``max_new_tokens``, less where prompt and answer would exceed ``max_length``."""
    return [min(max_new_tokens, max_length - len(prompt)) for prompt in prompts]
