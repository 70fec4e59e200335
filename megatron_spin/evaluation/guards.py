"""Guards between iterations: is what was just trained fit to become the opponent? Settings, measures and judgement; pure, no torch.

Each guard is one dataclass: a section ``guards.NAME`` of the configuration, what it measures, why its default is what it is, and what to do
when it trips. A difference must exceed its threshold by more than two standard errors where one is known, so that noise does not trip it;
a measure that is not a number always does.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

Action: TypeAlias = Literal["off", "warn", "stop", "rollback"]
Outcome: TypeAlias = Literal["pass", "warn", "rollback", "stop"]
ORDER: tuple[Outcome, ...] = ("pass", "warn", "rollback", "stop")
"""What a phase of several verdicts comes to is the last of these: where one guard stops, nobody but the user decides."""

WINDOW = 0.1
"""Share of an iteration's steps, and at least ``STREAK`` of them, that "the last steps" means."""
STREAK = 3
"""Steps in a row that must agree before one speaks of a state and not of a batch."""
WON = 0.99
"""Share of different pairs that must be won from then on to call an opponent beaten."""
NLL_FLOOR = 0.01
"""Nats a token (0.1: nats an answer) below which a likelihood is good enough for its relative changes not to matter."""
ERRORS = 2.0
"""Standard errors that a difference must exceed its threshold by."""


class UnseenError(Exception):
    """A guard could not look: what it measures is not there. The message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Measures:
    """What one iteration left to look at."""

    beta: float
    """The iteration's ``spin.beta``."""
    steps: Sequence[Mapping[str, Any]]
    """Rows of ``metrics.jsonl``."""
    pairs: Mapping[str, Any]
    """``manifest.json`` of the training pairs."""
    policy: Mapping[str, Any] | None = None
    """``eval.json`` of the iteration; None where there is no evaluation."""
    opponent: Mapping[str, Any] | None = None
    """``eval.json`` of its opponent: the previous iteration, or the SFT model."""

    def evaluated(self, key: str) -> tuple[float, float]:
        """``key`` of the policy and of the opponent.

        Raises:
            UnseenError: one of the two has no such number.
        """
        if self.policy is None or self.opponent is None:
            raise UnseenError("there is no evaluation: give evaluation.path or evaluation.held_out_fraction")
        found = self.policy.get(key), self.opponent.get(key)
        if found[0] is None or found[1] is None:
            raise UnseenError(f"eval.json has no {key}")
        return float(found[0]), float(found[1])

    def column(self, key: str) -> list[float]:
        """``key`` of every step.

        Raises:
            UnseenError: it is not reported.
        """
        values = [row.get(key) for row in self.steps]
        if not values or any(value is None for value in values):
            raise UnseenError(f"metrics.jsonl has no {key}")
        return [float(value) for value in values if value is not None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a guard saw."""

    value: float | None
    """The measure, in the threshold's unit; None where it was never reached."""
    tripped: bool
    said: str
    """The measure in words, with what it is compared to."""


@dataclasses.dataclass(frozen=True)
class Guard:
    """What all guards share."""

    action: Action = "warn"
    """``off`` does not look, ``warn`` says it and goes on, ``stop`` ends the run before the policy becomes the opponent, ``rollback`` makes
    the previous iteration (or the SFT model) the result and runs no later iteration."""

    limits: ClassVar[tuple[float, float]] = (0.0, math.inf)
    """Between which values a threshold makes sense."""
    remedy: ClassVar[str]

    def look(self, measures: Measures) -> Reading:
        """The reading of ``measures``.

        Raises:
            UnseenError: what it measures is not there.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RealLogpsFall(Guard):
    """The real answers lose probability while the margin rises: the generated ones lose more, which is all that the loss sees.

    Measured on the training pairs: how far the negative log-likelihood of the real answers rose above the opponent's of the same answers, in
    the last tenth of the steps, as a share of the opponent's. At step 1 the two are equal, so this is the fall from first to last step
    without the noise of which answers stand in which batch.
    """

    threshold: float = 0.1
    """A healthy iteration begins along the SFT gradient, so the real answers gain. Data that hold a habit which self-play pushes out
    (the quickstart: a quarter, on seed 7) lose on it by design: set more there."""

    remedy: ClassVar[str] = "take fewer steps or a lower training.learning_rate, or a higher spin.beta"

    def look(self, measures: Measures) -> Reading:
        rewards, margins = measures.column("real_reward"), measures.column("margin")
        last = _last(len(rewards))
        changes = [reward / measures.beta for reward in rewards[last:]]
        opponent = _mean(
            [logps - change for logps, change in zip(measures.column("real_logps")[last:], changes, strict=True)]
        )
        base = max(-opponent, 10 * NLL_FLOOR)
        rise, noise = -_mean(changes) / base, ERRORS * _error(changes) / base
        margin = _mean(margins[last:])
        risen = not margin <= margins[0]
        said = f"log-probs of the real training answers went from {opponent:.4g} to {opponent + _mean(changes):.4g} nats, the margin to {margin:.3g}"
        return Reading(rise, risen and _exceeds(rise - noise, self.threshold), said)


@dataclasses.dataclass(frozen=True)
class NllRise(Guard):
    """The held-out answers lose probability.

    Measured: negative log-likelihood a token of the held-out answers above the opponent's, as a share of the opponent's. The standard errors
    of the two are added as if they were independent, which errs on the quiet side (both are of the same answers).
    """

    threshold: float = 0.05
    """5%: far above what a gentle iteration does, far below a collapse."""

    remedy: ClassVar[str] = "take fewer steps or a lower training.learning_rate"

    def look(self, measures: Measures) -> Reading:
        nll, opponent = measures.evaluated("nll_per_token")
        errors = [
            float((side or {}).get("nll_per_token_error") or 0.0) for side in (measures.policy, measures.opponent)
        ]
        base = max(opponent, NLL_FLOOR)
        rise, noise = (nll - opponent) / base, ERRORS * math.hypot(*errors) / base
        said = f"held-out NLL a token is {nll:.4f}, the opponent's {opponent:.4f} ({rise:+.0%})"
        return Reading(rise, _exceeds(rise - noise, self.threshold), said)


@dataclasses.dataclass(frozen=True)
class EndOfAnswer(Guard):
    """Answers stop ending.

    Measured: share of held-out answers that are cut before their end token, minus the opponent's share; sampled and greedy, the worse of the
    two. Greedy counts because a collapse can hide from samples: a 135M model whose greedy answers ended in 4% of cases after an iteration
    (51% before it) still ended 74% of its samples, with a lower NLL, a loss of 0.001 and an accuracy of 1.0.
    """

    threshold: float = 0.1
    """Ten points in a hundred."""

    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)
    remedy: ClassVar[str] = (
        "read samples.jsonl; lower training.learning_rate, or see that the real answers end within generation.max_new_tokens"
    )

    def look(self, measures: Measures) -> Reading:
        worst = max(
            (_share_rise(measures, key) for key in ("truncated_fraction", "truncated_fraction_greedy")),
            key=lambda rise: _rank(rise[0] - rise[1]),
        )
        rise, noise, kind, share, opponent = worst
        said = f"{share:.1%} of {kind} answers do not end, of the opponent's {opponent:.1%}"
        return Reading(rise, _exceeds(rise - noise, self.threshold), said)


@dataclasses.dataclass(frozen=True)
class Length(Guard):
    """Answers collapse to a few words or run on.

    Measured: by which factor sampled answers are, on average, longer than both the real and the opponent's answers, or shorter than both.
    An answer on the way from the opponent's length to the real one's is never outside.
    """

    threshold: float = 1.5
    """Half as long again as either: self-play overshoots the data somewhat for a beta below 1, but not by that much."""

    limits: ClassVar[tuple[float, float]] = (1.0, math.inf)
    remedy: ClassVar[str] = "read samples.jsonl; lower training.learning_rate or raise spin.beta"

    def look(self, measures: Measures) -> Reading:
        length, opponent = measures.evaluated("mean_response_tokens")
        real, _ = measures.evaluated("mean_real_tokens")
        tiny = 1e-9  # an answer of no tokens
        factor = max(length / max(real, opponent, tiny), min(real, opponent) / max(length, tiny))
        said = f"sampled answers have {length:.1f} tokens, real ones {real:.1f}, the opponent's {opponent:.1f}"
        return Reading(factor, _exceeds(factor, self.threshold), said)


@dataclasses.dataclass(frozen=True)
class Repetition(Guard):
    """Answers repeat themselves.

    Measured: share of 4-grams that stood in the same answer before, above the real answers' own share or the opponent's, whichever is
    higher; sampled and greedy, the worse of the two.
    """

    threshold: float = 0.1
    """Ten points: text with lists and formulas repeats a few 4-grams, a model in a loop nearly all of them."""

    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)
    remedy: ClassVar[str] = "read samples.jsonl; lower training.learning_rate or take fewer steps"

    def look(self, measures: Measures) -> Reading:
        real, _ = measures.evaluated("repeated_fraction_real")
        keys = ("repeated_fraction", "repeated_fraction_greedy")
        worst = max((_share_rise(measures, key, least=real) for key in keys), key=lambda rise: _rank(rise[0] - rise[1]))
        rise, noise, kind, share, opponent = worst
        said = f"{share:.1%} of the 4-grams of {kind} answers are repetitions, of the opponent's {opponent:.1%}, of the real ones' {real:.1%}"
        return Reading(rise, _exceeds(rise - noise, self.threshold), said)


@dataclasses.dataclass(frozen=True)
class Converged(Guard):
    """The opponent gives the real answers back: there is nothing to learn from it.

    Measured: share of the training pairs whose generated answer equals the real one, token for token.
    """

    threshold: float = 0.95
    """Of 64 pairs a step, three are left to learn from."""

    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)
    remedy: ClassVar[str] = "self-play has come to its end on these data: take the previous iteration, or other data"

    def look(self, measures: Measures) -> Reading:
        identical, count = measures.pairs["counts"]["identical"], measures.pairs["num_pairs"]
        value = identical / count
        return Reading(
            value,
            _exceeds(value, self.threshold),
            f"{identical} of {count} generated answers equal the real ones ({value:.1%})",
        )


@dataclasses.dataclass(frozen=True)
class Saturated(Guard):
    """The opponent is beaten at once: the loss is near zero for the rest of the iteration and says nothing any more.

    Measured: the first step from which on the policy wins all pairs of three steps in a row and 99% of all that follow; pairs of equal
    answers do not count.
    """

    threshold: int = 5
    """A 135M model as it came, on data in another style than its own, was there after 4 steps. It is not a failure (that iteration lowered
    the NLL), but from there on only the other guards tell a good policy from a collapsed one."""

    remedy: ClassVar[str] = (
        "watch NLL and answers, not loss and accuracy; take fewer steps an iteration, or a higher spin.beta with a lower rate"
    )

    def look(self, measures: Measures) -> Reading:
        accuracy, identical, pairs = (measures.column(key) for key in ("accuracy", "identical", "pairs"))
        numbers = measures.column("step")
        # Steps with nothing but equal pairs tell nothing.
        steps = [row for row in zip(numbers, accuracy, identical, pairs, strict=True) if row[2] < 1]
        won = [right > 1 - equal - 0.5 / count for _, right, equal, count in steps]
        for i in range(len(steps) - STREAK + 1):
            rest = steps[i:]
            if all(won[i : i + STREAK]) and sum(right for _, right, _, _ in rest) >= WON * sum(
                1 - equal for _, _, equal, _ in rest
            ):
                step = int(steps[i][0])
                return Reading(
                    step, step <= self.threshold, f"from step {step} of {len(accuracy)} on the policy won every pair"
                )
        return Reading(None, False, f"in {len(accuracy)} steps the policy never won every pair for good")


@dataclasses.dataclass(frozen=True)
class GuardsConfig:
    """What is looked at after each iteration of self-play, before the policy becomes the opponent; see docs/guards.md."""

    real_logps_fall: RealLogpsFall = RealLogpsFall()
    """Real training answers lose probability while the margin rises."""
    nll_rise: NllRise = NllRise()
    """Held-out answers lose probability."""
    end_of_answer: EndOfAnswer = EndOfAnswer()
    """Answers stop ending."""
    length: Length = Length()
    """Answers collapse or run on."""
    repetition: Repetition = Repetition()
    """Answers repeat themselves."""
    converged: Converged = Converged()
    """Generated answers equal the real ones."""
    saturated: Saturated = Saturated()
    """The opponent is beaten within a few steps."""

    def by_name(self) -> dict[str, Any]:
        """Each guard's settings (a :class:`Guard` with a ``threshold``), in order."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one guard has to say of an iteration."""

    guard: str
    action: Action
    threshold: float
    tripped: bool | None
    """None: it could not look."""
    value: float | None
    """The measure, in the threshold's unit."""
    said: str
    """The measure in words, or why it could not look."""

    @property
    def line(self) -> str:
        """For the user: what was measured, the threshold, what to do."""
        remedy = getattr(GuardsConfig(), self.guard).remedy
        return f"{self.said}; guards.{self.guard}.threshold is {self.threshold:g}: {remedy}"


def judge(guards: GuardsConfig, measures: Measures) -> list[Verdict]:
    """The verdict of every guard that is not ``off``, tripped or not."""
    verdicts = []
    for name, guard in guards.by_name().items():
        if guard.action == "off":
            continue
        try:
            reading = guard.look(measures)
        except UnseenError as missing:
            verdicts.append(Verdict(name, guard.action, guard.threshold, None, None, str(missing)))
            continue
        verdicts.append(Verdict(name, guard.action, guard.threshold, reading.tripped, reading.value, reading.said))
    return verdicts


def outcome(verdicts: Sequence[Verdict]) -> Outcome:
    """What the verdicts come to: the gravest action of a guard that tripped."""
    tripped = {verdict.action for verdict in verdicts if verdict.tripped}
    return next((grave for grave in reversed(ORDER) if grave in tripped), "pass")


def _exceeds(value: float, threshold: float) -> bool:
    return not value <= threshold  # so that NaN does


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _last(count: int) -> int:
    """Where the last steps begin."""
    return max(0, count - max(STREAK, math.ceil(count * WINDOW)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # not fsum, nor a power above: they raise where a sum is simply inf or NaN


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value, of which none is known."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) * (value - mean) for value in values) / (len(values) - 1) / len(values))


def _share_rise(measures: Measures, key: str, *, least: float = 0.0) -> tuple[float, float, str, float, float]:
    """(rise above the greater of the opponent's share and ``least``, noise, "sampled" or "greedy", share, opponent's share)."""
    share, opponent = measures.evaluated(key)
    count, _ = measures.evaluated("num_prompts")
    # Of all quantities between 0 and 1 a yes or no has the greatest variance.
    noise = ERRORS * math.sqrt(sum(max(p * (1 - p), 0.0) for p in (share, opponent)) / max(count, 1))
    return share - max(opponent, least), noise, "greedy" if key.endswith("_greedy") else "sampled", share, opponent
