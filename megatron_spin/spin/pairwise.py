"""SPIN and DPO: a convex loss of the margin between the real and the generated answer (equation 4.7)."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome

if TYPE_CHECKING:
    from torch import Tensor


def logistic(margin: "Tensor") -> "Tensor":
    """log(1 + exp(-t)), computed without overflow."""
    from torch.nn.functional import softplus

    return softplus(-margin)


def hinge(margin: "Tensor") -> "Tensor":
    """max(0, 1 - t)."""
    return (1 - margin).clamp(min=0)


def exponential(margin: "Tensor") -> "Tensor":
    """exp(-t); unbounded for pairs that the policy gets wrong."""
    return (-margin).exp()


def correlation(margin: "Tensor") -> "Tensor":
    """1 - t; unbounded below, so it never stops pushing: take few steps."""
    return 1 - margin


LOSSES: "dict[str, Callable[[Tensor], Tensor]]" = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}
"""Convex, decreasing functions of the margin (Assumption 5.1)."""


@dataclasses.dataclass(frozen=True)
class Spin(Objective):
    """SPIN: ``loss(margin)``, with an optional likelihood term on the real answer.

    Metrics: ``margin`` (t), ``accuracy`` (t > 0; identical answers never count as won), ``real_reward`` and
    ``generated_reward`` (beta times the log-ratio to the opponent).
    """

    label: ClassVar[str] = "SPIN"
    task: ClassVar[str] = "self-play against the opponent"

    beta: float = 0.1
    """The paper's lambda: weight of the log-ratios in the margin."""
    loss: str = "logistic"
    """A key of :data:`LOSSES`."""
    sft_weight: float = 0.0
    """Weight of the real answer's negative log-likelihood per token."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is none of {', '.join(LOSSES)}")

    def rewards(self, logps: AnswerLogps) -> "tuple[Tensor, Tensor]":
        """``beta * log(p_theta / p_opponent)`` of the real and of the generated answers, [b] each."""
        ratios = logps.log_ratios()
        return self.beta * ratios[:, 0], self.beta * ratios[:, 1]

    def __call__(self, logps: AnswerLogps) -> Outcome:
        real_reward, generated_reward = self.rewards(logps)
        margin = real_reward - generated_reward
        losses = LOSSES[self.loss](margin)
        if self.sft_weight:
            # The mean over tokens, not the sum: a long answer's sum is hundreds of nats, which would drown ln 2.
            losses = losses + -self.sft_weight * logps.policy[:, 0] / logps.lengths[:, 0]
        won = (margin > 0) & ~logps.identical[:, 1]
        metrics = {
            "margin": margin,
            "accuracy": won.float(),
            "real_reward": real_reward,
            "generated_reward": generated_reward,
        }
        return Outcome(losses, metrics)


@dataclasses.dataclass(frozen=True)
class Dpo(Spin):
    """DPO: the same loss on given preference rows; the reference is the model that the run starts from."""

    label: ClassVar[str] = "DPO"
    task: ClassVar[str] = "prefer the chosen answers to the rejected ones"
    start_label: ClassVar[str] = "start"  # any model, a SPIN export for example
    generates: ClassVar[bool] = False

    @classmethod
    def title(cls, iteration: int) -> str:
        """DPO has one iteration."""
        return cls.label
