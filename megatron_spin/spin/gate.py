"""The step-0 gate: before training the policy is the opponent, so the first loss is known up to the noise of scoring.

Pure torch: the gate evaluates the objective itself and knows nothing of any loss.
"""

import dataclasses
import itertools

import torch

from megatron_spin.errors import ConfigError, GateError
from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome

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

    Raises:
        ConfigError: the objective's counts are all zero.
    """
    at_start = _evaluate(objective, logps, logps.policy)
    count = float(len(logps.policy))
    if at_start.count is not None:
        count = float(at_start.count.sum())
    if not count:
        raise ConfigError(
            f"objective {type(objective).__name__} counts nothing in the first batch: its loss has no mean"
        )
    # A convex loss is largest at a corner of the box of scores that noise allows, so its corners bound what noise can
    # do.
    worst = torch.zeros_like(at_start.loss)
    for signs in itertools.product((1.0, -1.0), repeat=logps.policy.shape[1]):
        moved = logps.policy.double() + noise * torch.tensor(signs, dtype=torch.float64)
        change = (_evaluate(objective, logps, moved).loss - at_start.loss).abs()
        worst = torch.maximum(worst, change)
    expected = float(at_start.loss.sum()) / count
    return FirstLoss(expected=expected, tolerance=float(worst.sum()) / count + ROUNDING * abs(expected))


@torch.no_grad()
def _evaluate(objective: Objective, logps: AnswerLogps, policy: torch.Tensor) -> Outcome:
    """The objective in double precision: the gate's own rounding must not count as noise."""
    reference = None if logps.reference is None else logps.reference.double()
    return objective(AnswerLogps(policy.double(), reference, logps.lengths, logps.identical))
