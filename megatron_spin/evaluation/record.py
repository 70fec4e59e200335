"""``eval.json`` as a record: what was measured of one model on the held-out prompts. No torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over prompts with its standard error; both are None over no prompts, the error also over a single one."""

    value: float | None
    error: float | None


@dataclasses.dataclass(frozen=True)
class PatternMeasures:
    """How often an expression of ``evaluation.patterns`` is found, and what follows from it."""

    sampled: float | None
    """Share of the sampled answers in which it is found."""
    real: float | None
    """Share of the real answers."""
    exact_match_with: float | None
    """Exact match among the sampled answers with it; None if there are none."""
    exact_match_without: float | None
    """Exact match among the sampled answers without it."""


@dataclasses.dataclass(frozen=True)
class AnswerMeasures:
    """What the answers tell, without log-probs."""

    exact_match_sampled: Mean
    exact_match_greedy: Mean
    mean_response_tokens: float | None
    """Tokens of a sampled answer."""
    mean_real_tokens: float | None
    truncated_fraction: float | None
    """Share of the sampled answers that were cut before their end token."""
    truncated_fraction_greedy: float | None
    repeated_fraction: float | None
    """Share of the 4-grams of a sampled answer that occur earlier in it."""
    repeated_fraction_greedy: float | None
    repeated_fraction_real: float | None
    identical_fraction: float | None
    """Share of the sampled answers that equal the real one, token for token."""
    patterns: dict[str, PatternMeasures]

    def to_json(self) -> dict[str, Any]:
        return {
            **_mean_to_json("exact_match_sampled", self.exact_match_sampled),
            **_mean_to_json("exact_match_greedy", self.exact_match_greedy),
            "mean_response_tokens": self.mean_response_tokens,
            "mean_real_tokens": self.mean_real_tokens,
            "truncated_fraction": self.truncated_fraction,
            "truncated_fraction_greedy": self.truncated_fraction_greedy,
            "repeated_fraction": self.repeated_fraction,
            "repeated_fraction_greedy": self.repeated_fraction_greedy,
            "repeated_fraction_real": self.repeated_fraction_real,
            "identical_fraction": self.identical_fraction,
            "patterns": {name: dataclasses.asdict(measures) for name, measures in self.patterns.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AnswerMeasures":
        patterns = {}
        for name, measures in values.get("patterns", {}).items():
            patterns[name] = PatternMeasures(
                sampled=measures.get("sampled"),
                real=measures.get("real"),
                exact_match_with=measures.get("exact_match_with"),
                exact_match_without=measures.get("exact_match_without"),
            )
        return cls(
            exact_match_sampled=_mean_from_json("exact_match_sampled", values),
            exact_match_greedy=_mean_from_json("exact_match_greedy", values),
            mean_response_tokens=values.get("mean_response_tokens"),
            mean_real_tokens=values.get("mean_real_tokens"),
            truncated_fraction=values.get("truncated_fraction"),
            truncated_fraction_greedy=values.get("truncated_fraction_greedy"),
            repeated_fraction=values.get("repeated_fraction"),
            repeated_fraction_greedy=values.get("repeated_fraction_greedy"),
            repeated_fraction_real=values.get("repeated_fraction_real"),
            identical_fraction=values.get("identical_fraction"),
            patterns=patterns,
        )


@dataclasses.dataclass(frozen=True)
class OpponentMeasures:
    """How the model does against its opponent, on held-out pairs of a real answer and another one.

    The other answer is a sample of the opponent, or the rejected answer of a preference row.
    """

    identity: str
    """The opponent's identity."""
    accuracy: Mean
    """Share of the pairs with a margin above 0."""
    ties: float | None
    """Share of the pairs whose two answers are equal; their margin is 0."""
    margin: Mean


@dataclasses.dataclass(frozen=True)
class LogpMeasures:
    """What log-probs of held-out answers tell."""

    nll_per_token: Mean
    """Negative log-likelihood of the real answers, in nats per token."""
    likelihood: dict[str, Mean]
    """The same of each file of ``evaluation.likelihood``."""
    opponent: OpponentMeasures | None
    """None for a model without an opponent, or without answers to compare with."""

    def to_json(self) -> dict[str, Any]:
        opponent = self.opponent
        values: dict[str, Any] = {
            **_mean_to_json("nll_per_token", self.nll_per_token),
            "opponent_accuracy": None if opponent is None else opponent.accuracy.value,
            "likelihood": {name: _mean_to_json("nll_per_token", nll) for name, nll in self.likelihood.items()},
        }
        if opponent is not None:
            values |= {
                "opponent": opponent.identity,
                "opponent_accuracy_error": opponent.accuracy.error,
                "opponent_ties": opponent.ties,
                **_mean_to_json("opponent_margin", opponent.margin),
            }
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LogpMeasures":
        likelihood = {}
        for name, of_file in values.get("likelihood", {}).items():
            likelihood[name] = _mean_from_json("nll_per_token", of_file)
        opponent = None
        if values.get("opponent_accuracy") is not None:
            opponent = OpponentMeasures(
                identity=values.get("opponent", ""),
                accuracy=_mean_from_json("opponent_accuracy", values),
                ties=values.get("opponent_ties"),
                margin=_mean_from_json("opponent_margin", values),
            )
        return cls(_mean_from_json("nll_per_token", values), likelihood, opponent)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that was measured of one model.

    ``eval.json`` is flat: see :meth:`to_json`. Files of earlier versions lack some keys; those measures are None.
    """

    model: str
    """Identity of the model."""
    num_prompts: int
    logps: LogpMeasures
    answers: AnswerMeasures
    samples: int | None
    """Sampled answers per prompt."""
    seconds: float | None
    """Wall time of the evaluation."""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "num_prompts": self.num_prompts,
            **self.logps.to_json(),
            **self.answers.to_json(),
            "samples": self.samples,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Evaluation":
        """The record of what :meth:`to_json` gave; raises KeyError for what is no evaluation at all."""
        return cls(
            model=values["model"],
            num_prompts=values["num_prompts"],
            logps=LogpMeasures.from_json(values),
            answers=AnswerMeasures.from_json(values),
            samples=values.get("samples"),
            seconds=values.get("seconds"),
        )

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Reads an ``eval.json``.

        Raises:
            RunDirError: it is missing, is not JSON, or holds no evaluation.
        """
        try:
            return cls.from_json(read_json(path))
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"{path} is no evaluation ({type(error).__name__}: {error})"
            raise RunDirError(f"{problem}: evaluate that model again") from None

    def measure(self, key: str) -> Mean:
        """The number that ``eval.json`` has under ``key``, with its standard error if it has one."""
        return _mean_from_json(key, self.to_json())


def _mean_to_json(key: str, mean: Mean) -> dict[str, float | None]:
    return {key: mean.value, f"{key}_error": mean.error}


def _mean_from_json(key: str, values: Mapping[str, Any]) -> Mean:
    return Mean(values.get(key), values.get(f"{key}_error"))
