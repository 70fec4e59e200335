"""The pairwise losses of SPIN: pure functions of the four log-probs of a pair."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of response tokens, in nats, each of shape [b]."""

    policy_real: Tensor
    policy_generated: Tensor
    opponent_real: Tensor
    opponent_generated: Tensor

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """``beta * log(p_theta / p_opponent)`` of the real and of the generated answers, [b] each."""
        return beta * (self.policy_real - self.opponent_real), beta * (self.policy_generated - self.opponent_generated)

    def margin(self, beta: float) -> Tensor:
        """The argument t of the pairwise loss (equation 4.7): real minus generated reward, [b]."""
        real, generated = self.rewards(beta)
        return real - generated


def logistic(margin: Tensor) -> Tensor:
    """log(1 + exp(-t)), computed without overflow."""
    return torch.nn.functional.softplus(-margin)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - t)."""
    return torch.clamp(1 - margin, min=0)


def exponential(margin: Tensor) -> Tensor:
    """exp(-t); unbounded for pairs the policy gets wrong."""
    return torch.exp(-margin)


def correlation(margin: Tensor) -> Tensor:
    """1 - t; unbounded below: it never stops pushing, choose few steps."""
    return 1 - margin


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {f.__name__: f for f in (logistic, hinge, exponential, correlation)}
"""Convex, decreasing functions of the margin (Assumption 5.1)."""


def spin_loss(logps: PairLogps, *, beta: float, loss: str) -> Tensor:
    """The SPIN objective of each pair (equation 4.7), [b]; ``loss`` is a key of :data:`LOSSES`."""
    return LOSSES[loss](logps.margin(beta))


def likelihood_term(policy_real: Tensor, tokens: Tensor, *, weight: float) -> Tensor:
    """``weight * (-log p_theta(y|x)) / |y|``, [b]: what ``spin.sft_weight`` adds to each pair.

    Args:
        policy_real: summed log-probs of the real answers, in nats, [b].
        tokens: their numbers of tokens, [b].
    """
    return -weight * policy_real / tokens


def loss_at_zero(loss: str) -> float:
    """loss(0): what every pair costs while the policy still is the opponent (ln 2 for logistic, 1 for the others)."""
    return math.log(2) if loss == "logistic" else 1.0
