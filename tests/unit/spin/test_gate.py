"""What the step-0 gate expects of the first loss, and what it lets pass."""

import dataclasses
import math

import pytest
import torch

from megatron_spin.errors import GateError
from megatron_spin.spin.gate import first_loss
from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome
from megatron_spin.spin.pairwise import LOSSES, Spin
from megatron_spin.spin.sft import Sft

TOKENS = 10


def scored(*, reference: bool = True) -> AnswerLogps:
    """Two pairs of answers of ten tokens; the real ones cost 2 nats per token."""
    scores = torch.tensor([[-15.0, -30.0], [-25.0, -12.0]])
    return AnswerLogps(
        policy=scores,
        reference=scores if reference else None,
        lengths=torch.full((2, 2), float(TOKENS)),
        identical=torch.tensor([[True, False], [True, False]]),
    )


def test_the_likelihood_term_counts() -> None:
    """The cases: loss(0) without the term; ln 2 + 0.5 * 2 with it; a thousandth too much; the term where none is
    asked for.
    """
    plain, weighted = (first_loss(Spin(beta=0.1, sft_weight=weight), scored(), 1e-5) for weight in (0.0, 0.5))
    assert weighted.expected == pytest.approx(math.log(2) + 0.5 * 2, rel=1e-7)
    plain.check(math.log(2))
    weighted.check(math.log(2) + 1)
    with pytest.raises(GateError, match=r"the first loss is 1\.6941472, but .* gives 1\.6931472 within"):
        weighted.check(math.log(2) + 1.001)
    with pytest.raises(GateError, match=r"the first loss is 1\.6931472, but .* gives 0\.6931472 within"):
        plain.check(math.log(2) + 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_tolerance_is_what_noise_can_do(loss: str) -> None:
    """Both scores of a pair off by the noise, against each other, move the margin by 2 beta times the noise."""
    beta, noise = 0.3, 0.01
    gate = first_loss(Spin(beta=beta, loss=loss), scored(), noise)
    worst = Spin(beta=beta, loss=loss)(
        dataclasses.replace(scored(), policy=scored().policy + noise * torch.tensor([-1.0, 1.0]))
    )
    moved = abs(worst.loss.double().mean().item() - gate.expected)
    assert gate.tolerance == pytest.approx(moved, rel=1e-3)
    gate.check(gate.expected + 0.99 * moved)
    for sign in (1, -1):
        with pytest.raises(GateError, match="nothing was trained"):
            gate.check(gate.expected + sign * 1.1 * moved)


def test_nan_never_passes() -> None:
    with pytest.raises(GateError, match="the first loss is nan"):
        first_loss(Spin(), scored(), 1.0).check(math.nan)


def test_an_objective_without_a_reference_is_expected_to_give_its_own_value() -> None:
    """SFT weighs by tokens: 40 nats over 20 tokens."""
    logps = dataclasses.replace(scored(reference=False))
    assert first_loss(Sft(), logps, 1e-5).expected == pytest.approx(2.0)


@dataclasses.dataclass(frozen=True)
class Constant(Objective):
    """Does not depend on the policy at all."""

    label = "constant"
    task = "nothing"

    def __call__(self, logps: AnswerLogps) -> Outcome:
        return Outcome(torch.full((len(logps.policy),), 3.0))


@dataclasses.dataclass(frozen=True)
class Square(Objective):
    """A loss without slope where the policy is the opponent."""

    label = "square"
    task = "nothing"

    def __call__(self, logps: AnswerLogps) -> Outcome:
        ratios = logps.log_ratios()
        return Outcome((ratios[:, 0] - ratios[:, 1]) ** 2)


def test_noise_counts_where_the_loss_has_no_slope() -> None:
    """Two scores of a pair, each off by 0.01, are 0.02 apart."""
    gate = first_loss(Square(), scored(), 0.01)
    assert gate.expected == 0.0
    assert gate.tolerance == pytest.approx(0.02**2)


def test_an_objective_without_slope_has_no_noise() -> None:
    gate = first_loss(Constant(), scored(), 100.0)
    assert gate.expected == 3.0
    assert gate.tolerance == pytest.approx(3e-6)
