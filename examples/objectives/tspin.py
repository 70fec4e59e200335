"""T-SPIN, self-play on triplets without a reference (Wang et al., NeurIPS 2025, arXiv 2601.08198), as an objective.

Name it in the configuration:

    spin: {beta: 0.1, parameters: {alpha: 1.0}}
    training: {objective: examples.objectives.tspin:Tspin}
"""

import dataclasses
from typing import Annotated, ClassVar

from megatron_spin.config.values import Positive
from megatron_spin.spin.objective import AnswerLogps, Objective, Outcome
from megatron_spin.spin.pairwise import logistic


@dataclasses.dataclass(frozen=True)
class Tspin(Objective):
    """Equation 7 of the paper.

    With a real answer y, the opponent's answer y' and the answer y0 of the model that the run starts from::

        loss = l(alpha log p(y)/p(y')) + beta l(alpha log p(y')/p(y0)),    l(t) = log(1 + exp(-t))

    The log-probs are sums over tokens. Equation 8 is the gradient. The opponent's log-probs are not in the loss, so
    nothing is scored before training. In iteration 0 the opponent is the model that the run starts from and y0 is y':
    the second term is then the constant beta ln 2.

    The paper states no theorem about a fixed point. The loss is a Bradley-Terry fit of alpha log p. Three facts follow,
    which ``tests/unit/examples/test_tspin.py`` shows by enumeration:

    - The minimum of iteration 0 is (p_data / p_opponent)^(1/alpha), normalised.
    - p_data is not a fixed point. Where the opponent is p_data, the first term pulls the policy towards equal
      probability for all answers.
    - Without the second term, minimised iterations alternate around p_data^(1/(1+alpha)). For alpha = 1 they never
      converge; with the second term they do.

    Metrics: ``margin`` (alpha log p(y)/p(y')), ``accuracy`` (margin > 0; identical answers never count as won) and
    ``history_margin`` (alpha log p(y')/p(y0)). There are no rewards: a reward is relative to the opponent's log-probs,
    which this objective does not need. So the guard ``real_logps_fall`` says that it could not look.
    """

    label: ClassVar[str] = "T-SPIN"
    task: ClassVar[str] = "self-play against the opponent and the initial model"
    answers: ClassVar[tuple[str, ...]] = ("real", "generated", "initial")
    needs_reference: ClassVar[bool] = False

    alpha: Annotated[float, Positive] = 1.0
    """Scale of the log-probs."""
    beta: float = 0.1
    """Weight of the second term, ``spin.beta``."""

    def __call__(self, logps: AnswerLogps) -> Outcome:
        real, generated, initial = logps.policy.unbind(dim=1)
        margin = self.alpha * (real - generated)
        history_margin = self.alpha * (generated - initial)
        loss = logistic(margin) + self.beta * logistic(history_margin)
        won = (margin > 0) & ~logps.identical[:, 1]
        return Outcome(loss, {"margin": margin, "accuracy": won.float(), "history_margin": history_margin})
