"""What SPIN's objective does to a policy, by enumeration: section 5 of the paper, and what follows for a run. Told in
docs/concepts.md.

The losses are the package's own, the arithmetic is fp64, minima are found by L-BFGS. "Tabular" is a softmax over free
logits, one for each answer; "Llama" is transformers' model with 4,816 parameters (vocabulary 4) over all its answers.
"""

import itertools
import math

import pytest
import torch

from examples.experiments.enumeration import (
    EnumeratedLlama,
    best_response,
    divergence,
    draw_pairs,
    error,
    flat_gradient,
    gradient_path,
    mean_margin,
    minimise,
    pairs_objective,
    random_policy,
    sft_objective,
    spin_objective,
    theorem_5_4,
)
from megatron_spin.spin.pairwise import LOSSES

AT_ZERO = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}

BETAS = [0.1, 0.3, 0.5, 1.0, 5.0]
SLOPE_AT_ZERO = {"logistic": -0.5, "hinge": -1.0, "exponential": -1.0, "correlation": -1.0}
OPPONENT, DATA = random_policy(2, 6, seed=1), random_policy(2, 6, seed=2)
"""Two prompts with six answers each, drawn apart: KL(data || opponent) is 0.45 nats."""


def llama(*, vocabulary: int = 4, longest: int = 3) -> EnumeratedLlama:
    return EnumeratedLlama(prompts=[[1, 2], [2, 2, 1]], vocabulary=vocabulary, longest=longest)


# --------------------------------------------------------------------------------------- the minimum of one iteration


@pytest.mark.parametrize("beta", BETAS)
def test_minimiser_is_that_of_theorem_5_4(beta: float) -> None:
    torch.testing.assert_close(
        best_response(OPPONENT, DATA, beta), theorem_5_4(OPPONENT, DATA, beta), rtol=0, atol=1e-6
    )


def test_minimiser_of_a_llama_is_that_of_theorem_5_4() -> None:
    """It has parameters enough to be any distribution over its 7 answers to 2 prompts, so the theorem's condition
    holds.
    """
    model, beta = llama(vocabulary=3, longest=2), 0.7
    opponent = model.logps().detach()
    data = random_policy(*opponent.shape, seed=3)
    minimise(lambda: spin_objective(model.logps(), opponent=opponent, data=data, beta=beta), model.parameters())
    assert divergence(data, opponent) > 0.5
    torch.testing.assert_close(model.logps().detach(), theorem_5_4(opponent, data, beta), rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_minimiser_of_the_exponential_loss_takes_half_the_step(beta: float) -> None:
    torch.testing.assert_close(
        best_response(OPPONENT, DATA, beta, "exponential"), theorem_5_4(OPPONENT, DATA, 2 * beta), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("difference", [0.5, 1e-3])
def test_minimiser_of_the_hinge_moves_by_one_over_beta_however_small_the_difference(difference: float) -> None:
    """Two answers: the best margin between them is 1 as soon as the data prefers one of them, so that iterations do
    not come to rest.
    """
    beta = 0.3
    opponent = torch.zeros(1, 2, dtype=torch.float64).log_softmax(-1)
    data = torch.tensor([[difference, 0.0]], dtype=torch.float64).log_softmax(-1)
    margins = torch.linspace(-2, 2, 401, dtype=torch.float64)
    policies = [(opponent + torch.tensor([[margin / beta, 0.0]])).log_softmax(-1) for margin in margins]
    costs = torch.stack(
        [spin_objective(policy, opponent=opponent, data=data, beta=beta, loss="hinge") for policy in policies]
    )
    assert margins[costs.argmin()].item() == pytest.approx(1)
    moved = error(policies[costs.argmin()], data)[0]
    assert (moved[0] - moved[1]).item() == pytest.approx(1 / beta - difference)


# --------------------------------------------------------------------------------------------- iterations in sequence


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.7, 1.0, 5.0])
def test_exact_iteration_multiplies_the_error_by_one_minus_one_over_beta(beta: float) -> None:
    opponent = (DATA + random_policy(2, 6, seed=4, scale=0.2)).log_softmax(-1)
    after = error(best_response(opponent, DATA, beta), DATA)
    torch.testing.assert_close(after, (1 - 1 / beta) * error(opponent, DATA), rtol=0, atol=1e-6)


def exact_iterations(beta: float, count: int) -> list[float]:
    """KL(data || policy) before and after each of ``count`` exact iterations."""
    policy, path = OPPONENT, [divergence(DATA, OPPONENT)]
    for _ in range(count):
        policy = best_response(policy, DATA, beta)
        path.append(divergence(DATA, policy))
    return path


def test_exact_iterations_converge_above_one_half_and_diverge_below() -> None:
    converging, slow, diverging = exact_iterations(0.7, 12), exact_iterations(5.0, 12), exact_iterations(0.3, 3)
    assert converging[-1] < 1e-7
    assert all(after < before for before, after in itertools.pairwise(slow)) and slow[-1] < 0.02 * slow[0]
    assert all(after > before for before, after in itertools.pairwise(diverging)) and diverging[-1] > 20 * diverging[0]


def test_exact_iteration_at_one_lands_on_the_data() -> None:
    torch.testing.assert_close(best_response(OPPONENT, DATA, 1.0), DATA, rtol=0, atol=1e-6)


def test_exact_iterations_at_one_half_go_round_in_circles() -> None:
    once = best_response(OPPONENT, DATA, 0.5)
    torch.testing.assert_close(error(once, DATA), -error(OPPONENT, DATA), rtol=0, atol=1e-6)
    torch.testing.assert_close(best_response(once, DATA, 0.5), OPPONENT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_small_beta_passes_the_data_early_and_ends_beyond_it(beta: float) -> None:
    """Gradient descent with SFT's effective rate of 1: eleven or thirteen steps come near the data, 300 are far worse
    than none.
    """
    path = [divergence(DATA, policy) for policy in gradient_path(OPPONENT, DATA, beta, rate=2 / beta, steps=300)]
    nearest = min(range(len(path)), key=path.__getitem__)
    assert 5 <= nearest <= 20
    assert path[nearest] < 0.1 * path[0]
    assert path[300] > 3 * path[0]


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_only_the_real_log_probs_tell_that_the_data_is_passed(beta: float) -> None:
    """Their mean is minus KL(data || policy) and a constant. Loss and margin improve to the end, where real answers
    are less likely than at first.
    """
    path = gradient_path(OPPONENT, DATA, beta, rate=2 / beta, steps=100)
    losses = [spin_objective(policy, opponent=OPPONENT, data=DATA, beta=beta).item() for policy in path]
    margins = [mean_margin(policy, opponent=OPPONENT, data=DATA, beta=beta) for policy in path]
    real = [-sft_objective(policy, data=DATA).item() for policy in path]
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert all(after > before for before, after in itertools.pairwise(margins))
    assert real[-1] < real[0] - 0.5 and max(real) > real[0] + 0.4
    entropy = sft_objective(DATA, data=DATA).item()
    assert real == pytest.approx([-entropy - divergence(DATA, policy) for policy in path])


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_small_beta_converges_over_iterations_of_few_steps(beta: float) -> None:
    policy, path = OPPONENT, [divergence(DATA, OPPONENT)]
    for _ in range(6):
        policy = gradient_path(policy, DATA, beta, rate=1 / beta, steps=10)[-1]
        path.append(divergence(DATA, policy))
    assert all(after < before for before, after in itertools.pairwise(path))
    assert path[-1] < 0.02 * path[0]


def test_pull_at_the_data_is_still_there_when_beta_is_small() -> None:
    """Where SFT's gradient is zero: nothing but the margins, which are small when beta is, tells the policy to stop."""

    def pull(beta: float, policy: torch.Tensor) -> float:
        logits = policy.clone().requires_grad_()
        return (
            flat_gradient(spin_objective(logits.log_softmax(-1), opponent=OPPONENT, data=DATA, beta=beta), [logits])
            .norm()
            .item()
        )

    left = {beta: pull(beta, DATA) / pull(beta, OPPONENT) for beta in (0.1, 0.3, 1.0)}
    assert left[0.1] > 0.85 and 0.5 < left[0.3] < left[0.1]
    assert left[1.0] < 1e-12


# ------------------------------------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize("loss", LOSSES)
def test_data_is_a_fixed_point(loss: str) -> None:
    """Theorem 5.2: no gradient where the opponent is the data, and no policy costs less."""
    logits = DATA.clone().requires_grad_()

    def objective(policy: torch.Tensor) -> torch.Tensor:
        return spin_objective(policy, opponent=DATA, data=DATA, beta=0.3, loss=loss)

    here = objective(logits.log_softmax(-1))
    assert here.item() == pytest.approx(AT_ZERO[loss], rel=1e-12)
    assert flat_gradient(here, [logits]).abs().max() < 1e-15
    costs = torch.stack(
        [
            objective(random_policy(2, 6, seed=seed, scale=scale))
            for seed in range(100, 120)
            for scale in (0.1, 1.0, 10.0)
        ]
    )
    assert costs.min() >= here - 1e-12
    near = objective((DATA + 0.1 * random_policy(2, 6, seed=0)).log_softmax(-1)) - here
    if loss in ("logistic", "exponential"):
        assert near > 1e-6 and costs.min() > here + 1e-6
    else:
        assert near.abs() < 1e-12, "hinge and correlation have more minima than the data"


@pytest.mark.parametrize("loss", LOSSES)
def test_data_is_a_fixed_point_of_a_llama(loss: str) -> None:
    model = llama()
    data = model.logps().detach()
    objective = spin_objective(model.logps(), opponent=data, data=data, beta=0.3, loss=loss)
    assert flat_gradient(objective, model.parameters()).abs().max() < 1e-14


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_converged_sft_model_stays_where_it_is_even_if_it_is_not_the_data(loss: str, beta: float) -> None:
    """Both prompts share one row of logits, so that no policy is the data. The objective is convex in the logits: no
    gradient, so a minimum.
    """
    data = random_policy(2, 6, seed=3, scale=2.0)
    shared = data.exp().mean(0, keepdim=True).log().requires_grad_()

    def policy(logits: torch.Tensor) -> torch.Tensor:
        return logits.expand(2, 6).log_softmax(-1)

    sft = policy(shared.detach())
    assert flat_gradient(sft_objective(policy(shared), data=data), [shared]).abs().max() < 1e-15, "SFT has converged"
    assert divergence(data, sft) > 0.1

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return spin_objective(policy(logits), opponent=sft, data=data, beta=beta, loss=loss)

    here = objective(shared)
    assert flat_gradient(here, [shared]).abs().max() < 1e-15
    others = [
        shared.detach() + scale * random_policy(1, 6, seed=seed) for seed in range(20) for scale in (0.01, 1.0, 10.0)
    ]
    assert min(objective(other).item() for other in others) >= here.item() - 1e-9


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_other_sampling_moves_the_fixed_point(temperature: float) -> None:
    """Answers sampled at a temperature: at rest, what is sampled is the data, and the policy itself is not."""

    def sampled(policy: torch.Tensor) -> torch.Tensor:
        return (policy / temperature).log_softmax(-1)

    rest = (temperature * DATA).log_softmax(-1)
    torch.testing.assert_close(best_response(rest, DATA, 0.5, generated=sampled(rest)), rest, rtol=0, atol=1e-6)
    assert error(best_response(DATA, DATA, 0.5, generated=sampled(DATA)), DATA).abs().max() > 0.5


def test_pairs_of_an_earlier_iteration_push_beyond_the_data() -> None:
    """Half of the answers are an earlier opponent's: the policy that is the data already moves away from that
    opponent.
    """
    mixture = torch.logaddexp(DATA, OPPONENT) - math.log(2)
    after = best_response(DATA, DATA, 1.0, generated=mixture)
    torch.testing.assert_close(error(after, DATA), error(DATA, mixture), rtol=0, atol=1e-6)
    assert error(after, DATA).flatten() @ error(OPPONENT, DATA).flatten() < -0.5


# ------------------------------------------------------------------------------------------------------------- bounds


def test_correlation_loss_alone_is_unbounded_below() -> None:
    """Along the straight line that its own gradient points to, it falls for ever and never more slowly."""
    beta, direction = 0.3, DATA.exp() - OPPONENT.exp()
    far = {
        loss: [
            spin_objective(
                (OPPONENT + s * direction).log_softmax(-1), opponent=OPPONENT, data=DATA, beta=beta, loss=loss
            ).item()
            for s in (0, 1e2, 1e4, 1e6)
        ]
        for loss in ("logistic", "hinge", "correlation")
    }
    slope = beta * (direction**2).sum().item() / 2  # of two prompts
    assert far["correlation"] == pytest.approx([1 - slope * s for s in (0, 1e2, 1e4, 1e6)], rel=1e-9)
    assert far["correlation"][-1] < -1e4
    assert min(far["logistic"]) >= 0 and min(far["hinge"]) >= 0
    steep = spin_objective(
        (OPPONENT + direction).log_softmax(-1), opponent=OPPONENT, data=DATA, beta=beta, loss="exponential"
    )
    assert 0 < steep < 1


# ------------------------------------------------------------------------------------ the first step is a step of SFT


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_first_gradient_is_that_of_sft_tabular(loss: str, beta: float) -> None:
    logits = OPPONENT.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    spin = flat_gradient(
        spin_objective(policy, opponent=OPPONENT, data=DATA, beta=beta, loss=loss), [logits], retain_graph=True
    )
    sft = flat_gradient(sft_objective(policy, data=DATA), [logits])
    torch.testing.assert_close(spin, -SLOPE_AT_ZERO[loss] * beta * sft, rtol=1e-12, atol=1e-15)


def test_first_gradient_is_that_of_sft_llama() -> None:
    model, beta = llama(), 0.3
    policy, parameters = model.logps(), model.parameters()
    opponent = policy.detach()
    torch.testing.assert_close(opponent.exp().sum(-1), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)
    data = random_policy(*opponent.shape, seed=3)
    score = flat_gradient((opponent.exp() * policy).sum(), parameters, retain_graph=True)  # E over y' of grad log p(y')
    assert score.abs().max() < 1e-13
    sft = flat_gradient(sft_objective(policy, data=data), parameters, retain_graph=True)
    for loss, slope in SLOPE_AT_ZERO.items():
        spin = flat_gradient(
            spin_objective(policy, opponent=opponent, data=data, beta=beta, loss=loss), parameters, retain_graph=True
        )
        torch.testing.assert_close(spin, -slope * beta * sft, rtol=0, atol=1e-13)


def test_first_gradient_is_that_of_sft_sampled() -> None:
    """64 batches of 256 sampled pairs: the mean is beta/2 times the SFT gradient, and the generated half adds its own
    noise and nothing else.
    """
    model, beta, batches, size = llama(), 0.3, 64, 256
    policy, parameters = model.logps(), model.parameters()
    opponent = policy.detach()
    data = random_policy(*opponent.shape, seed=3)
    expected = beta / 2 * flat_gradient(sft_objective(policy, data=data), parameters, retain_graph=True)
    generator = torch.Generator().manual_seed(0)
    samples = [draw_pairs(data, opponent, size, generator) for _ in range(batches)]
    gradients = torch.stack(
        [
            flat_gradient(pairs_objective(policy, pairs, opponent=opponent, beta=beta), parameters, retain_graph=True)
            for pairs in samples
        ]
    )

    along = gradients @ (expected / expected.norm())
    standard_error = along.std() / math.sqrt(batches)
    assert (along.mean() - expected.norm()).abs() < 3 * standard_error
    assert standard_error < 0.05 * expected.norm(), "too few samples to tell beta/2 from another factor"

    centred = gradients - gradients.mean(0)
    spectrum = torch.linalg.eigvalsh(
        centred @ centred.T / (batches - 1)
    )  # of the covariance of all parameters' gradients
    noise, spread = spectrum.sum(), (2 * (spectrum**2).sum()).sqrt()
    deviation = (
        batches * ((gradients.mean(0) - expected) ** 2).sum()
    )  # has mean `noise` and standard deviation `spread`
    assert deviation < noise + 4 * spread

    squares = torch.stack(
        [(flat_gradient(logp, parameters, retain_graph=True) ** 2).sum() for logp in policy.flatten()]
    ).view_as(opponent)
    real = (beta / 2) ** 2 * (data.exp() * squares).sum() / len(data) - (expected**2).sum()
    generated = (beta / 2) ** 2 * (opponent.exp() * squares).sum() / len(data)
    assert (noise - (real + generated) / size).abs() < 4 * spread / math.sqrt(batches - 1)
    assert generated > 4 * spread / math.sqrt(batches - 1) * size, "too few batches to see the generated half"


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_first_step_raises_the_real_log_probs(size: float) -> None:
    """By rate * beta/2 * |SFT gradient|^2 on the mean, to first order: a fall at the start is sampling noise or too
    large a step.
    """
    model, beta = llama(), 0.3
    policy, parameters = model.logps(), model.parameters()
    opponent = policy.detach()
    data = random_policy(*opponent.shape, seed=3)
    sft = flat_gradient(sft_objective(policy, data=data), parameters, retain_graph=True)
    steps = torch.autograd.grad(spin_objective(policy, opponent=opponent, data=data, beta=beta), parameters)
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter -= size * step
        gain = (sft_objective(opponent, data=data) - sft_objective(model.logps(), data=data)).item()
    assert gain == pytest.approx(size * beta / 2 * (sft**2).sum().item(), rel=100 * size)


# ------------------------------------------------------------------------------------------- a finite number of pairs


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_of_equal_answers_only_dilute(loss: str) -> None:
    """Where generated and real answer are the same the margin is zero whatever the policy does: loss(0), and no
    gradient.
    """
    pairs = torch.tensor([[0, 1, 2], [1, 0, 5], [0, 3, 3], [1, 2, 2], [1, 4, 4], [0, 0, 0]])
    logits = random_policy(2, 6, seed=7).requires_grad_()

    def gradient(chosen: torch.Tensor) -> torch.Tensor:
        return flat_gradient(
            pairs_objective(logits.log_softmax(-1), chosen, opponent=OPPONENT, beta=0.3, loss=loss), [logits]
        )

    same = pairs_objective(logits.log_softmax(-1), pairs[2:], opponent=OPPONENT, beta=0.3, loss=loss)
    assert same.item() == pytest.approx(AT_ZERO[loss], rel=1e-12)
    assert gradient(pairs[2:]).abs().max() == 0
    torch.testing.assert_close(gradient(pairs), gradient(pairs[:2]) / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_minimum_over_finite_pairs_counts_who_beat_whom(beta: float) -> None:
    """A Bradley-Terry fit: real a beat generated b three times and lost once, so their log-ratio moves by log(3) /
    beta.
    """
    opponent = random_policy(1, 3, seed=5)
    pairs = torch.tensor([[0, 0, 1]] * 3 + [[0, 1, 0]])
    logits = opponent.clone().requires_grad_()
    minimise(lambda: pairs_objective(logits.log_softmax(-1), pairs, opponent=opponent, beta=beta), [logits])
    moved = (logits.detach().log_softmax(-1) - opponent)[0]
    assert (moved[0] - moved[1]).item() == pytest.approx(math.log(3) / beta, abs=1e-6)


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
def test_one_sided_pairs_have_no_minimum(loss: str) -> None:
    """One pair a prompt, as in a run: the loss goes to zero only with the generated answer's probability, never at a
    policy.
    """
    pairs, opponent = torch.tensor([[0, 0, 1], [1, 2, 3]]), random_policy(2, 6, seed=5)
    path = []
    for lift in (0.0, 10.0, 100.0, 1000.0):
        logits = opponent.clone()
        logits[pairs[:, 0], pairs[:, 2]] -= lift
        policy = logits.log_softmax(-1)
        path.append(
            (pairs_objective(policy, pairs, opponent=opponent, beta=0.1, loss=loss).item(), policy[0, 1].item())
        )
    losses, generated = zip(*path, strict=True)
    assert list(losses) == sorted(losses, reverse=True) and 0 < losses[-1] < 1e-40
    assert generated[-1] < -999
