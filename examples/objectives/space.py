"""SPACE, self-play by noise contrastive estimation (Wang et al., NeurIPS 2025, arXiv 2512.07175), as an objective.

Name it in the configuration:

    spin: {reuse_previous: false, parameters: {mu: 1.0}}
    training: {objective: examples.objectives.space:Space}
"""

import dataclasses
import math
from typing import Annotated, ClassVar

from megatron_spin.config.values import Positive
from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome
from megatron_spin.spin.pairwise import logistic


@dataclasses.dataclass(frozen=True)
class Space(Objective):
    """The paper's objective, in its noise contrastive form.

    With ``r(u) = log p_theta(u|x) - log p_opponent(u|x)``, a real answer y and a generated one y'::

        loss = -log s(r(y), mu) - mu log s(-r(y'), 1/mu),    s(a, m) = 1 / (1 + m exp(-a))

    Each answer has a term of its own; SPIN's loss depends on their difference only. By theorems 2 and 3 the minimum is
    p_data for any opponent, and p_data is kept. Both are about answers drawn from the opponent alone, which
    ``spin.reuse_previous: false`` and ``generation.temperature: 1`` give.

    At ``policy = opponent`` the loss is ``log(1 + mu) + mu log(1 + 1/mu)``, 2 ln 2 for mu = 1, and the expected
    gradient is mu / (1 + mu) times that of SFT.

    Metrics: as SPIN's, ``margin`` (real less generated reward), ``accuracy``, ``real_reward`` and ``generated_reward``.
    """

    label: ClassVar[str] = "SPACE"
    task: ClassVar[str] = "self-play by noise contrast"

    mu: Annotated[float, Positive] = 1.0
    """The noise ratio: generated answers per real one. The paper trains with 1 and compares 1, 3 and 7."""
    beta: float = 1.0
    """``spin.beta``, for the metrics alone: the loss has no such factor.

    Everywhere else a reward is beta times a log-ratio: the guard ``real_logps_fall`` divides by ``spin.beta`` to get
    the log-ratio, and the plot's title says so.
    """

    def __call__(self, logps: AnswerLogps) -> Outcome:
        real, generated = logps.log_ratios().unbind(dim=1)
        log_mu = math.log(self.mu)
        # -log s(a, m) = log(1 + exp(log m - a)), in the form that does not overflow.
        loss = logistic(real - log_mu) + self.mu * logistic(log_mu - generated)
        margin = self.beta * (real - generated)
        won = (margin > 0) & ~logps.identical[:, 1]
        metrics = {
            "margin": margin,
            "accuracy": won.float(),
            "real_reward": self.beta * real,
            "generated_reward": self.beta * generated,
        }
        return Outcome(loss, metrics)
