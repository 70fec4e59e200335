"""How many steps at which learning rates: pure functions of the step."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of one iteration or baseline."""

    total: int
    """Steps."""
    peak: float
    """Highest learning rate."""
    decay: str
    """``linear``, ``cosine`` or ``constant``."""
    warmup_fraction: float
    """Share of the steps in which the rate rises."""

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step ``step`` (from 0): linear warm-up that reaches the peak, then decay to zero.

        The first step already moves (a rate of zero would waste it), and so does the last.
        """
        warmup = math.ceil(self.warmup_fraction * self.total)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total - warmup)
        if self.decay == "linear":
            return self.peak * (1 - progress)
        if self.decay == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak
