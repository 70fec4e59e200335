"""T-SPIN: loss and gradient against closed form, what the gate expects, and where iterations lead, by enumeration."""

import itertools
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
    flat_gradient,
    minimise,
    random_policy,
)
from examples.objectives.tspin import Tspin
from megatron_spin.errors import GateError
from megatron_spin.spin.gate import first_loss
from megatron_spin.spin.objective import AnswerLogps

LOGPS = st.floats(-60, -0.1)
INITIAL, DATA = random_policy(2, 6, seed=1), random_policy(2, 6, seed=2)
"""Two prompts with six answers each, drawn apart: KL(data || initial) is 0.45 nats."""
UNIFORM = torch.zeros(2, 6, dtype=torch.float64).log_softmax(-1)


def triplet(real: float, generated: float, initial: float) -> AnswerLogps:
    return AnswerLogps(
        policy=torch.tensor([[real, generated, initial]], dtype=torch.float64, requires_grad=True),
        reference=None,
        lengths=torch.ones(1, 3),
        identical=torch.tensor([[True, False, False]]),
    )


def tspin_objective(
    policy: Tensor, *, opponent: Tensor, data: Tensor, initial: Tensor | None, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """Equation 7 without sampling: the mean over real ~ data, generated ~ opponent and initial ~ initial; a scalar.

    Args:
        initial: None in iteration 0, where the initial answer is the generated one.
    """
    num_prompts, num_answers = policy.shape
    if initial is None:
        chosen = all_answers(num_prompts, num_answers, 2)
        chosen = torch.cat([chosen, chosen[:, 2:]], dim=1)
    else:
        chosen = all_answers(num_prompts, num_answers, 3)
    prompts, real, generated, first = chosen.T
    weights = data.exp()[prompts, real] * opponent.exp()[prompts, generated]
    if initial is not None:
        weights = weights * initial.exp()[prompts, first]
    losses = Tspin(alpha=alpha, beta=beta)(answer_logps(policy, opponent, prompts, chosen[:, 1:])).loss
    return (weights * losses).sum() / len(policy)


def minimiser(opponent: Tensor, initial: Tensor | None, *, alpha: float = 1.0, beta: float = 0.1) -> Tensor:
    """The policy of a whole, exact iteration on :data:`DATA`."""
    logits = opponent.clone().requires_grad_()
    minimise(
        lambda: tspin_objective(
            logits.log_softmax(-1), opponent=opponent, data=DATA, initial=initial, alpha=alpha, beta=beta
        ),
        [logits],
    )
    return logits.detach().log_softmax(-1)


def exact_iterations(count: int, *, alpha: float, beta: float) -> list[Tensor]:
    """The initial model and the policies of ``count`` exact iterations."""
    policies = [INITIAL]
    for iteration in range(count):
        initial = INITIAL if iteration else None
        policies.append(minimiser(policies[-1], initial, alpha=alpha, beta=beta))
    return policies


# ------------------------------------------------------------------------------------------------------- the function


@given(a=LOGPS, b=LOGPS, c=LOGPS, alpha=st.sampled_from([0.1, 1.0, 2.0]), beta=st.sampled_from([0.0, 0.1, 1.0]))
def test_loss_and_gradient(a: float, b: float, c: float, alpha: float, beta: float) -> None:
    """Equations 7 and 8."""
    logps = triplet(a, b, c)
    loss = Tspin(alpha=alpha, beta=beta)(logps).loss
    loss.sum().backward()
    margin, history = alpha * (a - b), alpha * (b - c)
    value = math.log1p(math.exp(-margin)) + beta * math.log1p(math.exp(-history))
    assert loss.item() == pytest.approx(value, rel=1e-8)  # softplus drops exp(-20)
    slope, history_slope = -1 / (1 + math.exp(margin)), -beta / (1 + math.exp(history))
    expected = [alpha * slope, alpha * (history_slope - slope), -alpha * history_slope]
    assert logps.policy.grad is not None
    assert logps.policy.grad[0].tolist() == pytest.approx(expected, rel=1e-8, abs=1e-14)


def test_margins_beyond_float_range_keep_a_finite_loss_and_gradient() -> None:
    logps = triplet(-2e5, -1e5, -1.0)
    loss = Tspin(beta=0.1)(logps).loss
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.1e5, rel=1e-3)
    assert logps.policy.grad is not None
    assert logps.policy.grad[0].tolist() == pytest.approx([-1.0, 0.9, 0.1])


def test_equal_generated_and_initial_answers_cost_a_constant() -> None:
    """As in iteration 0: what the one column gains in slope, the other column of the same answer loses."""
    logps = triplet(-3.0, -7.0, -7.0)
    with_history, without = (Tspin(beta=beta)(logps).loss for beta in (0.1, 0.0))
    term = with_history - without
    term.sum().backward()
    assert term.item() == pytest.approx(0.1 * math.log(2), rel=1e-9)
    assert logps.policy.grad is not None
    real, generated, initial = logps.policy.grad[0].tolist()
    assert real == 0
    assert generated + initial == 0


def test_metrics_are_the_two_margins_and_the_share_won() -> None:
    metrics = Tspin(alpha=0.5)(triplet(-3.0, -7.0, -6.0)).metrics
    values = {name: value.item() for name, value in metrics.items()}
    assert values == {"margin": 2.0, "accuracy": 1.0, "history_margin": -0.5}


def test_the_gate_expects_the_loss_of_the_policys_own_scores() -> None:
    """Without a reference the margins of the first batch are not zero."""
    scores = torch.tensor([[-15.0, -12.0, -14.0], [-11.0, -12.0, -12.0]])
    identical = torch.tensor([[True, False, False], [True, False, False]])
    logps = AnswerLogps(policy=scores, reference=None, lengths=torch.ones(2, 3), identical=identical)
    noise = 1e-3
    gate = first_loss(Tspin(), logps, noise)
    expected = (math.log1p(math.exp(3)) + math.log1p(math.exp(-1)) + 0.1 * (math.log1p(math.exp(-2)) + math.log(2))) / 2
    assert gate.expected == pytest.approx(expected, rel=1e-9)
    gate.check(expected)
    with pytest.raises(GateError, match="nothing was trained"):
        gate.check(expected + 3 * noise)


# ------------------------------------------------------------------------------------------------------ by enumeration


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_minimiser_of_iteration_0(alpha: float) -> None:
    """Not the data: SPIN's minimum at the same scale has a factor p_opponent, which only a reference brings in."""
    expected = ((DATA - INITIAL) / alpha).log_softmax(-1)
    torch.testing.assert_close(minimiser(INITIAL, None, alpha=alpha), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_data_is_no_fixed_point(alpha: float) -> None:
    """With the data as opponent the gradient is alpha E[tanh(alpha u / 2) grad log p(y)] for u = log p(y)/p(y')."""
    logits = DATA.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    found = flat_gradient(
        tspin_objective(policy, opponent=DATA, data=DATA, initial=None, alpha=alpha), [logits], retain_graph=True
    )
    differences = DATA[:, :, None] - DATA[:, None, :]
    weights = DATA.exp()[:, :, None] * DATA.exp()[:, None, :] * (alpha * differences / 2).tanh()
    expected = flat_gradient(alpha * (weights * policy[:, :, None]).sum() / len(policy), [logits])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert found.norm() > 0.02
    torch.testing.assert_close(minimiser(DATA, None, alpha=alpha), UNIFORM, rtol=0, atol=1e-6)


def test_data_of_equal_probabilities_is_a_fixed_point_of_the_first_term() -> None:
    logits = UNIFORM.clone().requires_grad_()
    objective = tspin_objective(logits.log_softmax(-1), opponent=UNIFORM, data=UNIFORM, initial=None)
    assert flat_gradient(objective, [logits]).abs().max() < 1e-15


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_without_history_iterations_alternate_around_a_flattened_data(alpha: float) -> None:
    """An exact iteration multiplies the difference to that policy by -1/alpha; it is p_data^(1/(1+alpha))."""
    rest = (DATA / (1 + alpha)).log_softmax(-1)
    torch.testing.assert_close(minimiser(rest, INITIAL, alpha=alpha, beta=0.0), rest, rtol=0, atol=1e-6)
    policies = exact_iterations(2, alpha=alpha, beta=0.0)
    expected = (rest + (INITIAL - rest) / alpha**2).log_softmax(-1)
    torch.testing.assert_close(policies[2], expected, rtol=0, atol=1e-6)


def moves(policies: list[Tensor]) -> list[float]:
    """How far each iteration moves the policy: the largest change of a log-prob."""
    return [(after - before).abs().max().item() for before, after in itertools.pairwise(policies)]


def test_history_lets_iterations_come_to_rest() -> None:
    """At alpha = 1, where they would alternate between two policies; the rest is near the square root of the data."""
    alternating, slow, fast = (exact_iterations(8, alpha=1.0, beta=beta) for beta in (0.0, 0.1, 0.5))
    assert moves(alternating) == pytest.approx([moves(alternating)[0]] * 8, abs=1e-5)
    assert all(after < 0.95 * before for before, after in itertools.pairwise(moves(slow)))
    assert moves(fast)[-1] < 0.02 * moves(fast)[0]
    root = (DATA / 2).log_softmax(-1)
    assert divergence(root, fast[-1]) < 0.02
    assert divergence(DATA, fast[-1]) > 0.04
