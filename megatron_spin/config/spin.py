"""Section ``spin``."""

import dataclasses
from typing import Annotated, Any, Literal

from megatron_spin.config.values import PerIteration, Positive, Range

SftWeight = Range(low=0, hint="0 leaves the likelihood term out")


@dataclasses.dataclass(frozen=True)
class SpinConfig:
    """Self-play and its loss."""

    iterations: Annotated[int, Positive] = 4
    """Rounds of self-play, T."""
    loss: Literal["logistic", "hinge", "exponential", "correlation"] = "logistic"
    """The pairwise loss, convex and decreasing (Assumption 5.1)."""
    beta: Annotated[PerIteration[float], Positive] = 0.1
    """Weight of the log-ratio margin: the paper's lambda, DPO's beta."""
    sft_weight: Annotated[PerIteration[float], SftWeight] = 0.0
    """Adds this times the real answer's negative log-likelihood, in nats per token, to the loss of its pair (also for
    DPO); 0 leaves it out.

    It is the mean over tokens, not the sum: a long answer's sum is hundreds of nats, so that a pair's loss of ln 2
    would vanish beside it, and the weight would mean something else for each length.
    """
    reuse_previous: bool = True
    """From iteration 1 on, add the previous iteration's generations, scored again under the new opponent."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the objective that have no key of their own here; a list gives one value per iteration."""
