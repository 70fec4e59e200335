"""Section ``guards``: what is looked at after each iteration, before the policy becomes the opponent.

Each guard is one dataclass: what it measures, why its default is what it is, and what to do when it trips.
:mod:`megatron_spin.evaluation.guards` measures and judges. A difference must exceed its threshold by more than two
standard errors where they are known, so that noise does not trip a guard.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal, TypeAlias

from megatron_spin.config.values import NotNegative, Range, Share

Action: TypeAlias = Literal["off", "warn", "stop", "rollback"]


@dataclasses.dataclass(frozen=True)
class Guard:
    """What all guards share."""

    action: Action = "warn"
    """``off`` does not look; ``warn`` prints a warning and continues; ``stop`` ends the run before the policy becomes
    the opponent; ``rollback`` makes the previous iteration (or the SFT model) the result and runs no later
    iteration."""
    threshold: float = 0.0
    """The measure above which the guard trips; each guard has its own unit and default."""

    remedy: ClassVar[str]
    """What to do when it trips."""


@dataclasses.dataclass(frozen=True)
class RealLogpsFall(Guard):
    """The real answers lose probability while the margin rises: the generated ones lose more, and the loss sees no more
    than that.

    Measured on the training pairs, over the last tenth of the steps: how far the negative log-likelihood of the real
    answers rose above the opponent's of the same answers, as a share of the opponent's. The two are equal at step 1, so
    this is the fall from the first to the last step without the noise of which answers are in which batch.
    """

    threshold: Annotated[float, NotNegative] = 0.1
    """A healthy iteration begins along the SFT gradient, so the real answers gain. Data with a habit that self-play
    pushes out (the quickstart: a quarter, on seed 7) lose on it by design: set more there."""

    remedy: ClassVar[str] = "take fewer steps or a lower training.learning_rate, or a higher spin.beta"


@dataclasses.dataclass(frozen=True)
class NllRise(Guard):
    """The held-out answers lose probability.

    Measured: negative log-likelihood per token of the held-out answers above the opponent's, as a share of the
    opponent's. The standard errors of the two are added as if they were independent, which trips the guard less often
    than it could (both are of the same answers).
    """

    threshold: Annotated[float, NotNegative] = 0.05
    """5%: far above what a gentle iteration does, far below a collapse."""

    remedy: ClassVar[str] = "take fewer steps or a lower training.learning_rate"


@dataclasses.dataclass(frozen=True)
class EndOfAnswer(Guard):
    """Answers stop ending.

    Measured: share of held-out answers that are cut before their end token, minus the opponent's share; sampled or
    greedy, whichever is worse. Greedy counts because samples can hide a collapse: a 135M model whose greedy answers
    ended in 4% of cases after an iteration (51% before it) still ended 74% of its samples, with a lower NLL, a loss of
    0.001 and an accuracy of 1.0.
    """

    threshold: Annotated[float, Share] = 0.1
    """Ten percentage points."""

    remedy: ClassVar[str] = (
        "read samples.jsonl; lower training.learning_rate, or see that the real answers end within "
        "generation.max_new_tokens"
    )


@dataclasses.dataclass(frozen=True)
class Length(Guard):
    """Answers collapse to a few words or run on.

    Measured: by which factor sampled answers are, on average, longer than both the real and the opponent's answers, or
    shorter than both. A length between the opponent's and the real one's never trips.
    """

    threshold: Annotated[float, Range(low=1)] = 1.5
    """Half as long again as either: self-play overshoots the data somewhat if beta is below 1, but not by that much."""

    remedy: ClassVar[str] = "read samples.jsonl; lower training.learning_rate or raise spin.beta"


@dataclasses.dataclass(frozen=True)
class Repetition(Guard):
    """Answers repeat themselves.

    Measured: share of 4-grams that occurred earlier in the same answer, above the real answers' own share or the
    opponent's, whichever is higher; sampled or greedy, whichever is worse.
    """

    threshold: Annotated[float, Share] = 0.1
    """Ten percentage points: text with lists and formulas repeats a few 4-grams, a model in a loop nearly all of
    them."""

    remedy: ClassVar[str] = "read samples.jsonl; lower training.learning_rate or take fewer steps"


@dataclasses.dataclass(frozen=True)
class Converged(Guard):
    """The opponent already gives the real answers: there is nothing left to learn.

    Measured: share of the training pairs whose generated answer equals the real one, token for token.
    """

    threshold: Annotated[float, Share] = 0.95
    """Of 64 pairs per step, three are left to learn from."""

    remedy: ClassVar[str] = "self-play has reached its end on these data: take the previous iteration, or other data"


@dataclasses.dataclass(frozen=True)
class Saturated(Guard):
    """The opponent is beaten at once: the loss is near zero for the rest of the iteration and says nothing any more.

    Measured: the first step from which on the policy wins all pairs of three steps in a row and 99% of all that follow;
    pairs of equal answers do not count.
    """

    threshold: Annotated[int, NotNegative] = 5
    """A 135M model as published, on data in another style than its own, was there after 4 steps. That is not a failure
    (the iteration lowered the NLL), but from there on only the other guards tell a good policy from a collapsed one."""

    remedy: ClassVar[str] = (
        "watch NLL and answers, not loss and accuracy; take fewer steps per iteration, or a higher spin.beta with a "
        "lower rate"
    )


@dataclasses.dataclass(frozen=True)
class GuardsConfig:
    """What is looked at after each iteration, before the policy becomes the opponent; see docs/guards.md."""

    real_logps_fall: RealLogpsFall = RealLogpsFall()
    nll_rise: NllRise = NllRise()
    end_of_answer: EndOfAnswer = EndOfAnswer()
    length: Length = Length()
    repetition: Repetition = Repetition()
    converged: Converged = Converged()
    saturated: Saturated = Saturated()

    def by_name(self) -> dict[str, Guard]:
        """Each guard's settings, in order."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
