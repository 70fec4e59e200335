"""What a conversion measured and did, for the log and for the run directory. No torch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Parity:
    """Absolute differences of a token's log-prob between the Hugging Face and the Megatron model, in nats."""

    mean_difference: float
    largest_difference: float


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written into a Hugging Face directory; equal on every rank."""

    identity: str
    parity: Parity | None
    """What the gate measured; None without a gate."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """What the import or the export phase did; equal on every rank."""

    identity: str
    dtype: str
    """``fp32`` or ``bf16``, of the written weights."""
    step: int
    """Training step of the checkpoint."""
    parity: Parity

    def __str__(self) -> str:
        return (
            f"{self.dtype}, identity {self.identity[:16]}, log-probs within {self.parity.largest_difference:.2g} nats"
        )
