"""Section ``model``."""

import dataclasses
from typing import Annotated, Any

from megatron_spin.config.values import Positive


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is trained and how Megatron builds it."""

    hf: str
    """Directory of the Hugging Face model that the run begins with (the SFT model); it is never downloaded."""
    provider: str | None = None
    """``package.module:function`` with Megatron's signature ``(pre_process, post_process, vp_stage)``; null builds a
    GPTModel from ``hf``."""
    transformer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Any field of ``TransformerConfig``; overrides what the Hugging Face config gives."""
    make_vocab_size_divisible_by: Annotated[int, Positive] = 128
    """The vocabulary is padded to a multiple of this times the tensor parallel size, as by Megatron's flag; padding
    never counts in the softmax."""
