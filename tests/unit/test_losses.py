"""The pairwise losses and their gradients against closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spin.spin.losses import LOSSES, PairLogps, likelihood_term, loss_at_zero, spin_loss

CLOSED_FORM = {
    "logistic": (lambda t: math.log1p(math.exp(-abs(t))) + max(-t, 0), lambda t: -1 / (1 + math.exp(t))),
    "hinge": (lambda t: max(0.0, 1 - t), lambda t: -1.0 if t < 1 else 0.0),
    "exponential": (lambda t: math.exp(-t), lambda t: -math.exp(-t)),
    "correlation": (lambda t: 1 - t, lambda t: -1.0),
}
LOGPS = st.floats(-60, -0.1)


def pair(*values: float) -> PairLogps:
    return PairLogps(*(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values))


@pytest.mark.parametrize("name", LOSSES)
@given(a=LOGPS, b=LOGPS, c=LOGPS, d=LOGPS, beta=st.sampled_from([0.05, 0.1, 0.3, 1.0]))
def test_loss_and_gradient(name, a, b, c, d, beta):
    logps = pair(a, b, c, d)
    margin = beta * ((a - c) - (b - d))
    value, slope = (f(margin) for f in CLOSED_FORM[name])
    if name == "hinge" and abs(margin - 1) < 1e-9:
        return  # no gradient at the kink
    loss = spin_loss(logps, beta=beta, loss=name)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    signs = {"policy_real": 1, "policy_generated": -1, "opponent_real": -1, "opponent_generated": 1}
    for field, sign in signs.items():
        assert getattr(logps, field).grad.item() == pytest.approx(sign * beta * slope, rel=1e-9, abs=1e-12)


@given(logp=LOGPS, tokens=st.integers(1, 50), weight=st.floats(0.01, 2))
def test_likelihood_term(logp, tokens, weight):
    real = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    term = likelihood_term(real, torch.tensor([tokens]), weight=weight)
    term.sum().backward()
    assert term.item() == pytest.approx(-weight * logp / tokens, rel=1e-12)
    assert real.grad.item() == pytest.approx(-weight / tokens, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_at_zero(name):
    assert spin_loss(pair(-3.0, -7.0, -3.0, -7.0), beta=0.3, loss=name).item() == pytest.approx(
        loss_at_zero(name), rel=1e-12
    )


@pytest.mark.parametrize("name", LOSSES)
@given(first=st.floats(-20, 20), second=st.floats(-20, 20), weight=st.floats(0, 1))
def test_convex_and_decreasing(name, first, second, weight):
    """Assumption 5.1 of the paper."""
    low, high = sorted((first, second))
    f = LOSSES[name]
    at = [f(torch.tensor(t, dtype=torch.float64)).item() for t in (low, high, weight * low + (1 - weight) * high)]
    assert at[0] >= at[1]
    assert at[2] <= weight * at[0] + (1 - weight) * at[1] + 1e-12 * max(1.0, *map(abs, at))


def test_margin_beyond_float_range_keeps_a_finite_loss_and_gradient():
    margin = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = LOSSES["logistic"](margin)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1e4, 0.0])
    assert margin.grad.tolist() == pytest.approx([-1.0, 0.0])
