"""What tells generated answers from real ones, by plain counting. No torch.

Self-play can only learn what differs systematically.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

from megatron_spin.evaluation.metrics import Answer, mean
from megatron_spin.evaluation.record import Mean

WORD = re.compile(r"\w+|[^\w\s]")
LONGEST = 3
"""Most words in a phrase."""
PRIOR = 1.0
"""Pseudo-count of answers with and without a phrase, in both groups: rare phrases do not stand out by chance."""


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A phrase that one side uses more than the other."""

    text: str
    real: float
    """Share of the real answers that have it."""
    generated: float
    """Share of the generated answers that have it."""
    z: float
    """Log-odds ratio over its standard error; positive if real answers have it more often."""


@dataclasses.dataclass(frozen=True)
class Differences:
    """Real against generated answers to the same prompts."""

    pairs: int
    length_real: Mean
    """Tokens per real answer."""
    length_generated: Mean
    length_difference: Mean
    """Real minus generated, pair by pair."""
    ended_real: float
    """Share with an end token."""
    ended_generated: float
    identical: float
    """Share of pairs whose two answers are the same, token for token."""
    phrases: list[Phrase]
    """The most distinctive phrases, strongest first."""


def differences(
    real: Sequence[Answer], generated: Sequence[Answer], *, count: int = 12, least_z: float = 3.5
) -> Differences:
    """Compares pair by pair (lengths, ends, identity) and group by group (phrases).

    Args:
        real, generated: answers to the same prompts, in the same order; at least one.
        count: most phrases to name.
        least_z: phrases whose z is nearer to zero are left out; with this many phrases, 2 would be chance.
    """
    real_lengths = [len(answer.token_ids) for answer in real]
    generated_lengths = [len(answer.token_ids) for answer in generated]
    lengths = zip(real_lengths, generated_lengths, strict=True)
    pairs = list(zip(real, generated, strict=True))
    real_texts, generated_texts = [answer.text for answer in real], [answer.text for answer in generated]
    return Differences(
        pairs=len(pairs),
        length_real=mean(real_lengths),
        length_generated=mean(generated_lengths),
        length_difference=mean([ours - theirs for ours, theirs in lengths]),
        ended_real=sum(not answer.truncated for answer in real) / len(pairs),
        ended_generated=sum(not answer.truncated for answer in generated) / len(pairs),
        identical=sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs) / len(pairs),
        phrases=_distinctive(real_texts, generated_texts, count, least_z),
    )


def phrases(text: str) -> set[str]:
    """All runs of one to three words and punctuation marks in ``text``.

    All numbers count as the same word: which number it is differs anyway.
    """
    words = ["0" if word.isdigit() else word for word in WORD.findall(text)]
    found = set()
    for size in range(1, LONGEST + 1):
        for start in range(len(words) - size + 1):
            found.add(" ".join(words[start : start + size]))
    return found


def _distinctive(real: Sequence[str], generated: Sequence[str], count: int, least_z: float) -> list[Phrase]:
    """The phrases with the greatest z; of two phrases of which one contains the other, only the stronger."""
    real_uses, generated_uses = _count_phrases(real), _count_phrases(generated)
    found = []
    for text in real_uses.keys() | generated_uses.keys():
        ours, theirs = real_uses[text], generated_uses[text]
        z = _log_odds_z(ours, len(real), theirs, len(generated))
        if abs(z) >= least_z:
            found.append(Phrase(text, ours / len(real), theirs / len(generated), z))
    found.sort(key=lambda phrase: (-abs(phrase.z), -len(phrase.text), phrase.text))
    chosen: list[Phrase] = []
    for phrase in found:
        if len(chosen) == count:
            break
        if not any(_nested(phrase, other) for other in chosen):
            chosen.append(phrase)
    return chosen


def _count_phrases(texts: Sequence[str]) -> collections.Counter[str]:
    """How many of ``texts`` have each phrase."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(phrases(text))
    return counts


def _nested(phrase: Phrase, other: Phrase) -> bool:
    """Whether one contains the other and both are used more by the same side."""
    inside = f" {phrase.text} " in f" {other.text} " or f" {other.text} " in f" {phrase.text} "
    return inside and (phrase.z > 0) == (other.z > 0)


def _log_odds_z(first: int, first_total: int, second: int, second_total: int) -> float:
    """z of the log-odds ratio of having a phrase, with a symmetric prior (Monroe, Colaresi and Quinn, 2008)."""
    counts = [first, first_total - first, second, second_total - second]
    smoothed = [count + PRIOR for count in counts]
    ratio = math.log(smoothed[0] / smoothed[1]) - math.log(smoothed[2] / smoothed[3])
    return ratio / math.sqrt(sum(1 / count for count in smoothed))
