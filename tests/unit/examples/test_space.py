"""SPACE: its loss and gradient against closed form, what the gate expects, and its fixed point by enumeration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples.experiments.enumeration import (
    all_answers,
    answer_logps,
    divergence,
    error,
    flat_gradient,
    minimise,
    random_policy,
    sft_objective,
)
from examples.objectives.space import Space
from megatron_spin.errors import GateError
from megatron_spin.spin.gate import first_loss
from megatron_spin.spin.objective import AnswerLogps

LOGPS = st.floats(-60, -0.1)
MUS = [0.5, 1.0, 3.0, 7.0]
OPPONENT, DATA = random_policy(2, 6, seed=1), random_policy(2, 6, seed=2)
"""Two prompts with six answers each, drawn apart: KL(data || opponent) is 0.45 nats."""


def pair(real: float, generated: float, opponent_real: float, opponent_generated: float) -> AnswerLogps:
    return AnswerLogps(
        policy=torch.tensor([[real, generated]], dtype=torch.float64, requires_grad=True),
        reference=torch.tensor([[opponent_real, opponent_generated]], dtype=torch.float64),
        lengths=torch.ones(1, 2),
        identical=torch.tensor([[True, False]]),
    )


def space_objective(
    policy: Tensor, *, opponent: Tensor, data: Tensor, mu: float, generated: Tensor | None = None
) -> Tensor:
    """The objective without sampling: the mean over real ~ data and generated ~ opponent (or ``generated``)."""
    num_prompts, num_answers = policy.shape
    chosen = all_answers(num_prompts, num_answers, 2)
    prompts, real, other = chosen.T
    noise = opponent if generated is None else generated
    weights = data.exp()[prompts, real] * noise.exp()[prompts, other]
    losses = Space(mu=mu)(answer_logps(policy, opponent, prompts, chosen[:, 1:])).loss
    return (weights * losses).sum() / len(policy)


def minimiser(opponent: Tensor, mu: float, generated: Tensor | None = None) -> Tensor:
    """The policy of a whole, exact iteration on :data:`DATA`."""
    logits = opponent.clone().requires_grad_()
    minimise(
        lambda: space_objective(logits.log_softmax(-1), opponent=opponent, data=DATA, mu=mu, generated=generated),
        [logits],
    )
    return logits.detach().log_softmax(-1)


# ------------------------------------------------------------------------------------------------------- the function


@given(a=LOGPS, b=LOGPS, c=LOGPS, d=LOGPS, mu=st.sampled_from(MUS))
def test_loss_and_gradient(a: float, b: float, c: float, d: float, mu: float) -> None:
    """In probabilities: -log p / (p + mu q) for the real answer, -mu log mu q / (p + mu q) for the generated one."""
    logps = pair(a, b, c, d)
    loss = Space(mu=mu)(logps).loss
    loss.sum().backward()
    real, opponent_real, generated, opponent_generated = math.exp(a), math.exp(c), math.exp(b), math.exp(d)
    real_total, generated_total = real + mu * opponent_real, generated + mu * opponent_generated
    value = math.log1p(mu * opponent_real / real) + mu * math.log1p(generated / (mu * opponent_generated))
    assert loss.item() == pytest.approx(value, rel=1e-8)  # softplus drops exp(-20)
    expected = [-mu * opponent_real / real_total, mu * generated / generated_total]
    assert logps.policy.grad is not None
    assert logps.policy.grad[0].tolist() == pytest.approx(expected, rel=1e-8)


def test_log_ratios_beyond_float_range_keep_a_finite_loss_and_gradient() -> None:
    logps = pair(-1e5, -1.0, -1.0, -1e5)
    loss = Space(mu=3.0)(logps).loss
    loss.sum().backward()
    assert loss.item() == pytest.approx(4e5, rel=1e-3)
    assert logps.policy.grad is not None
    assert logps.policy.grad[0].tolist() == pytest.approx([-1.0, 3.0])


def test_rewards_are_in_units_of_beta_and_the_loss_is_not() -> None:
    outcome = Space(beta=0.1)(pair(-3.0, -9.0, -5.0, -7.0))
    assert outcome.loss.item() == Space(beta=2.0)(pair(-3.0, -9.0, -5.0, -7.0)).loss.item()
    values = {name: value.item() for name, value in outcome.metrics.items()}
    assert values == pytest.approx({"margin": 0.4, "accuracy": 1, "real_reward": 0.2, "generated_reward": -0.2})


@pytest.mark.parametrize("mu", MUS)
def test_the_gate_expects_the_loss_of_equal_policies(mu: float) -> None:
    scores = torch.tensor([[-15.0, -30.0], [-25.0, -12.0]])
    identical = torch.tensor([[True, False], [True, False]])
    logps = AnswerLogps(policy=scores, reference=scores, lengths=torch.ones(2, 2), identical=identical)
    noise = 1e-3
    gate = first_loss(Space(mu=mu), logps, noise)
    assert gate.expected == pytest.approx(math.log(1 + mu) + mu * math.log(1 + 1 / mu), rel=1e-9)
    # A nat of either answer moves the loss by mu / (1 + mu).
    assert gate.tolerance == pytest.approx(2 * noise * mu / (1 + mu), rel=1e-2)
    gate.check(gate.expected + 0.9 * gate.tolerance)
    with pytest.raises(GateError, match="nothing was trained"):
        gate.check(gate.expected + 1.1 * gate.tolerance)


# ------------------------------------------------------------------------------------------------------ by enumeration


@pytest.mark.parametrize("mu", MUS)
def test_gradient_of_the_objective_is_the_papers(mu: float) -> None:
    """-E sum over answers of [mu q / (p + mu q)] (p_data - p) grad log p, where q is the opponent."""
    logits = random_policy(2, 6, seed=3).requires_grad_()
    policy = logits.log_softmax(-1)
    objective = space_objective(policy, opponent=OPPONENT, data=DATA, mu=mu)
    found = flat_gradient(objective, [logits], retain_graph=True)
    p, q = policy.detach().exp(), OPPONENT.exp()
    weights = mu * q / (p + mu * q) * (DATA.exp() - p)
    expected = flat_gradient(-(weights * policy).sum() / len(policy), [logits])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mu", MUS)
def test_first_gradient_is_a_multiple_of_that_of_sft(mu: float) -> None:
    logits = OPPONENT.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    found = flat_gradient(space_objective(policy, opponent=OPPONENT, data=DATA, mu=mu), [logits], retain_graph=True)
    sft = flat_gradient(sft_objective(policy, data=DATA), [logits])
    torch.testing.assert_close(found, mu / (1 + mu) * sft, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("seed", [1, 4])
def test_minimiser_is_the_data_from_any_opponent(seed: int, mu: float) -> None:
    """Theorem 2; SPIN needs beta = 1 for that."""
    opponent = random_policy(2, 6, seed=seed)
    assert divergence(DATA, opponent) > 0.3
    torch.testing.assert_close(minimiser(opponent, mu), DATA, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mu", MUS)
def test_data_is_a_fixed_point(mu: float) -> None:
    """Theorem 3: with the data as opponent it has no gradient, and every other policy costs more."""
    logits = DATA.clone().requires_grad_()
    here = space_objective(logits.log_softmax(-1), opponent=DATA, data=DATA, mu=mu)
    assert flat_gradient(here, [logits]).abs().max() < 1e-15
    for seed in range(100, 120):
        for scale in (0.1, 1.0, 10.0):
            other = (DATA + scale * random_policy(2, 6, seed=seed)).log_softmax(-1)
            assert space_objective(other, opponent=DATA, data=DATA, mu=mu) > here + 1e-6


def test_answers_of_an_earlier_opponent_move_the_minimum() -> None:
    """Half of the generated answers are another model's, as with ``spin.reuse_previous``: the data does not stay."""
    mixture = torch.logaddexp(DATA, OPPONENT) - math.log(2)
    after = error(minimiser(DATA, 1.0, generated=mixture), DATA)
    assert after.abs().max() > 0.3
    assert after.flatten() @ error(OPPONENT, DATA).flatten() < -0.5, "away from the earlier opponent"
