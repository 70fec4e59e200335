"""What tells generated answers from real ones, by plain counting. Self-play can only learn what differs systematically. No torch."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from megatron_spin.evaluation.metrics import Answer, Mean, mean

WORD = re.compile(r"\w+|[^\w\s]")
LONGEST = 3
"""Words in a phrase, at most."""
PRIOR = 1.0
"""Pseudo-count of answers with a phrase and without it, in both groups: rare phrases do not stand out by chance."""


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A phrase that one side uses more than the other."""

    text: str
    real: float
    """Share of the real answers that have it."""
    generated: float
    """Share of the generated answers that have it."""
    z: float
    """Log-odds ratio over its standard error; positive: real answers have it more often."""


@dataclasses.dataclass(frozen=True)
class Differences:
    """Real against generated answers to the same prompts."""

    pairs: int
    length_real: Mean
    """Tokens of a real answer."""
    length_generated: Mean
    length_difference: Mean
    """Real less generated, pair by pair."""
    ended_real: float
    """Share with an end token."""
    ended_generated: float
    identical: float
    """Share of pairs whose two answers are the same, token for token."""
    phrases: list[Phrase]
    """The most distinctive ones, strongest first."""


def differences(
    real: Sequence[Answer], generated: Sequence[Answer], *, count: int = 12, least_z: float = 3.5
) -> Differences:
    """Compares pair by pair (lengths, ends, identity) and group by group (phrases).

    Args:
        real, generated: answers to the same prompts, in the same order; at least one.
        count: how many phrases to name, at most.
        least_z: phrases whose z is nearer to zero are left out; there are many phrases, so 2 would be chance.
    """
    pairs = list(zip(real, generated, strict=True))
    lengths = [(len(right.token_ids), len(guess.token_ids)) for right, guess in pairs]
    return Differences(
        pairs=len(pairs),
        length_real=mean([first for first, _ in lengths]),
        length_generated=mean([second for _, second in lengths]),
        length_difference=mean([first - second for first, second in lengths]),
        ended_real=_share(not answer.truncated for answer in real),
        ended_generated=_share(not answer.truncated for answer in generated),
        identical=_share(right.token_ids == guess.token_ids for right, guess in pairs),
        phrases=_distinctive([answer.text for answer in real], [answer.text for answer in generated], count, least_z),
    )


def _share(values: Iterable[bool]) -> float:
    marks = list(values)
    return sum(marks) / len(marks)


def phrases(text: str) -> set[str]:
    """All runs of one to three words and punctuation marks in ``text``; numbers count as one word, since which number it is differs anyway."""
    words = ["0" if word.isdigit() else word for word in WORD.findall(text)]
    return {
        " ".join(words[start : start + size])
        for size in range(1, LONGEST + 1)
        for start in range(len(words) - size + 1)
    }


def _distinctive(real: Sequence[str], generated: Sequence[str], count: int, least_z: float) -> list[Phrase]:
    """Phrases by the z of their log-odds ratio; one that only ever stands inside a longer, equally distinctive one is not named twice."""
    uses = [collections.Counter(phrase for text in texts for phrase in phrases(text)) for texts in (real, generated)]
    found = []
    for text in uses[0].keys() | uses[1].keys():
        first, second = uses[0][text], uses[1][text]
        z = _log_odds_z(first, len(real), second, len(generated))
        if abs(z) >= least_z:
            found.append(Phrase(text, first / len(real), second / len(generated), z))
    found.sort(key=lambda phrase: (-abs(phrase.z), -len(phrase.text), phrase.text))
    chosen: list[Phrase] = []
    for phrase in found:
        if len(chosen) == count:
            break
        if not any(_nested(phrase, other) for other in chosen):
            chosen.append(phrase)
    return chosen


def _nested(phrase: Phrase, other: Phrase) -> bool:
    inside = f" {phrase.text} " in f" {other.text} " or f" {other.text} " in f" {phrase.text} "
    return inside and (phrase.z > 0) == (other.z > 0)


def _log_odds_z(first: int, first_total: int, second: int, second_total: int) -> float:
    """z of the log-odds ratio with a symmetric prior (Monroe, Colaresi and Quinn, 2008), over answers that have a phrase or not."""
    counts = [first, first_total - first, second, second_total - second]
    smoothed = [count + PRIOR for count in counts]
    ratio = math.log(smoothed[0] / smoothed[1]) - math.log(smoothed[2] / smoothed[3])
    return ratio / math.sqrt(sum(1 / count for count in smoothed))
