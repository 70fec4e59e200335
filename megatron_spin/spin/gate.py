"""The step-0 gate: before training the policy is the opponent, so the first loss is known up to the noise of scoring.

Pure torch: the gate evaluates the objective itself and knows nothing of any loss.
"""

import dataclasses

import torch

from megatron_spin.errors import GateError
from megatron_spin.spin.objective import AnswerLogps, Objective

ROUNDING = 1e-6
"""Relative rounding of a mean of fp32 losses."""


@dataclasses.dataclass(frozen=True)
class FirstLoss:
    """What the first batch's loss must be."""

    expected: float
    """Mean loss at policy = reference."""
    tolerance: float
    """How far noise of the scores alone can move it."""

    def check(self, value: float) -> None:
        """Compares the loss of the first step.

        Raises:
            GateError: it is further from the expected one than noise explains.
        """
        # Written so that NaN fails.
        if not abs(value - self.expected) <= self.tolerance:
            raise GateError(
                f"the first loss is {value:.7f}, but the objective at policy = opponent gives {self.expected:.7f} "
                f"within {self.tolerance:.1e}: scoring and training do not compute the same function; nothing was "
                "trained"
            )


def first_loss(objective: Objective, logps: AnswerLogps, noise: float) -> FirstLoss:
    """The first loss of ``objective`` for the scored first batch.

    Args:
        logps: of all pairs of the first batch; the policy's are the scores of the same weights.
        noise: nats by which two computations of one score may differ.
    """
    policy = logps.policy.detach().double().requires_grad_()
    mean = _mean_loss(objective, logps, policy)
    expected = mean.item()
    direction = torch.zeros_like(policy)
    if mean.requires_grad:  # a constant does not
        (slope,) = torch.autograd.grad(mean, policy)
        direction = slope.sign()
    # The worst that noise can do: every score off by its bound, in the direction that raises, or lowers, the loss.
    corners = []
    for sign in (1.0, -1.0):
        moved = policy.detach() + sign * noise * direction
        corners.append(_mean_loss(objective, logps, moved).item())
    spread = max(abs(corner - expected) for corner in corners)
    return FirstLoss(expected=expected, tolerance=spread + ROUNDING * abs(expected))


def _mean_loss(objective: Objective, logps: AnswerLogps, policy: torch.Tensor) -> torch.Tensor:
    reference = None if logps.reference is None else logps.reference.double()
    outcome = objective(AnswerLogps(policy, reference, logps.lengths, logps.identical))
    if outcome.weight is None:
        return outcome.loss.mean()
    return outcome.loss.sum() / outcome.weight.sum()
