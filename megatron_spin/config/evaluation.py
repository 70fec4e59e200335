"""Section ``evaluation``."""

import dataclasses
from typing import Annotated

from megatron_spin.config.values import Positive, Range


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out prompts."""

    path: str | None = None
    """Held-out SFT data; null: ``held_out_fraction`` of ``data.path``. For ``training.objective: dpo`` rows of
    prompt/chosen/rejected also tell which of the two answers the model prefers."""
    held_out_fraction: Annotated[float, Range(low=0, high=1, below_high=True)] = 0.0
    """Share of ``data.path`` held out if ``path`` is null; with 0 and no path there is no evaluation."""
    num_prompts: Annotated[int | None, Positive] = 512
    """How many held-out prompts to use; null: all."""
    max_new_tokens: Annotated[int | None, Positive] = None
    """Longest held-out answer, real or generated, in tokens; null: iteration 0's ``generation.max_new_tokens``."""
    samples: Annotated[int, Positive] = 1
    """Sampled answers per prompt, at temperature 1, for ``exact_match_sampled`` and ``patterns``."""
    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer to compare; null compares all token ids."""
    patterns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Named regular expressions. For each, the share of sampled and of real answers that match is reported, and with
    ``answer_pattern`` also how many of the matching and of the other answers are right."""
    likelihood: dict[str, str] = dataclasses.field(default_factory=dict)
    """More held-out SFT files, by name; only the NLL of their answers is reported, of ``num_prompts`` rows each."""
    batch_size: Annotated[int, Positive] = 64
    """Sequences per batch of the log-prob pass."""
    seed: int = 1234
    """Seed of the draw of prompts and of the sampling."""
