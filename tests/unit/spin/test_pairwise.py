"""The pairwise losses and their gradients against closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spin.spin.objective import AnswerLogps
from megatron_spin.spin.pairwise import LOSSES, Dpo, Spin

CLOSED_FORM = {
    "logistic": (lambda t: math.log1p(math.exp(-abs(t))) + max(-t, 0), lambda t: -1 / (1 + math.exp(t))),
    "hinge": (lambda t: max(0.0, 1 - t), lambda t: -1.0 if t < 1 else 0.0),
    "exponential": (lambda t: math.exp(-t), lambda t: -math.exp(-t)),
    "correlation": (lambda t: 1 - t, lambda t: -1.0),
}
LOGPS = st.floats(-60, -0.1)


def pair(
    real: float, generated: float, opponent_real: float, opponent_generated: float, tokens: int = 1
) -> AnswerLogps:
    return AnswerLogps(
        policy=torch.tensor([[real, generated]], dtype=torch.float64, requires_grad=True),
        reference=torch.tensor([[opponent_real, opponent_generated]], dtype=torch.float64, requires_grad=True),
        lengths=torch.full((1, 2), float(tokens)),
        identical=torch.tensor([[True, False]]),
    )


@pytest.mark.parametrize("name", LOSSES)
@given(a=LOGPS, b=LOGPS, c=LOGPS, d=LOGPS, beta=st.sampled_from([0.05, 0.1, 0.3, 1.0]))
def test_loss_and_gradient(name: str, a: float, b: float, c: float, d: float, beta: float) -> None:
    logps = pair(a, b, c, d)
    margin = beta * ((a - c) - (b - d))
    value, slope = (f(margin) for f in CLOSED_FORM[name])
    if name == "hinge" and abs(margin - 1) < 1e-9:
        return  # no gradient at the kink
    loss = Spin(beta=beta, loss=name)(logps).loss
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    expected = [beta * slope, -beta * slope]
    assert logps.policy.grad is not None
    assert logps.reference is not None
    assert logps.reference.grad is not None
    assert logps.policy.grad[0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert logps.reference.grad[0].tolist() == pytest.approx([-value for value in expected], rel=1e-9, abs=1e-12)


@given(logp=LOGPS, tokens=st.integers(1, 50), weight=st.floats(0.01, 2))
def test_likelihood_term(logp: float, tokens: int, weight: float) -> None:
    logps = pair(logp, -7.0, logp, -7.0, tokens)
    plain, weighted = (Spin(sft_weight=value)(logps).loss for value in (0.0, weight))
    term = weighted - plain
    term.sum().backward()
    assert term.item() == pytest.approx(-weight * logp / tokens, rel=1e-12, abs=1e-14)
    assert logps.policy.grad is not None
    assert logps.policy.grad[0, 0].item() == pytest.approx(-weight / tokens, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_at_zero(name: str) -> None:
    at_zero = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}
    outcome = Spin(beta=0.3, loss=name)(pair(-3.0, -7.0, -3.0, -7.0))
    assert outcome.loss.item() == pytest.approx(at_zero[name], rel=1e-12)


def test_dpo_is_the_same_function() -> None:
    logps = pair(-3.0, -7.0, -4.0, -5.0)
    assert Dpo(beta=0.3)(logps).loss.item() == Spin(beta=0.3)(logps).loss.item()


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="loss='huber' is none of logistic, hinge, exponential, correlation"):
        Spin(loss="huber")


@pytest.mark.parametrize("name", LOSSES)
@given(first=st.floats(-20, 20), second=st.floats(-20, 20), weight=st.floats(0, 1))
def test_convex_and_decreasing(name: str, first: float, second: float, weight: float) -> None:
    """Assumption 5.1 of the paper."""
    low, high = sorted((first, second))
    f = LOSSES[name]
    at = [f(torch.tensor(t, dtype=torch.float64)).item() for t in (low, high, weight * low + (1 - weight) * high)]
    assert at[0] >= at[1]
    assert at[2] <= weight * at[0] + (1 - weight) * at[1] + 1e-12 * max(1.0, *map(abs, at))


def test_margin_beyond_float_range_keeps_a_finite_loss_and_gradient() -> None:
    margin = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = LOSSES["logistic"](margin)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1e4, 0.0])
    assert margin.grad is not None
    assert margin.grad.tolist() == pytest.approx([-1.0, 0.0])
