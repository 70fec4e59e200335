"""Section ``precision``."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """The number formats of training and of exported models."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute dtype; main weights and optimizer state are fp32 either way."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 format of Transformer Engine; not supported yet, so only null is accepted."""
    export: Literal["fp32", "bf16"] | None = None
    """Dtype of the exported model, hence of the opponent; null: the compute dtype."""

    @property
    def export_dtype(self) -> Literal["fp32", "bf16"]:
        """``export``, or the compute dtype."""
        return self.export or self.dtype

    @property
    def shared_dtype(self) -> Literal["fp32", "bf16"]:
        """The dtype in which a policy and the model that it was exported as or imported from have equal weights: the
        coarser of the two.
        """
        return "bf16" if "bf16" in (self.dtype, self.export_dtype) else "fp32"
