"""The measurement of one model on the held-out prompts: its answers, what they tell, and which of them are shown."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spin.config import Config
from megatron_spin.data.manifest import DataManifest
from megatron_spin.data.rows import EVALUATION, REJECTED, Row, likelihood_file, load_rows
from megatron_spin.data.table import is_written
from megatron_spin.data.templates import decode, load_tokenizer
from megatron_spin.errors import DataError
from megatron_spin.evaluation.answers import EvaluatedModel, greedy_pass, held_out_answers, sampled_pass
from megatron_spin.evaluation.logps import Comparison, measure_logps
from megatron_spin.evaluation.metrics import Answer, measure_answers
from megatron_spin.evaluation.record import AnswerMeasures, LogpMeasures
from megatron_spin.evaluation.samples import SHOWN, Answered, PromptAnswers
from megatron_spin.generation.engine import Completion
from megatron_spin.spin.objective import objective_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out data of a run."""

    rows: list[Row]
    rejected: list[Row] | None
    """The prompts of ``rows`` with the rejected answers, for preferences; None if the data have none."""
    likelihood: dict[str, list[Row]]
    """The rows of each file of ``evaluation.likelihood``."""
    end_token_id: int

    @classmethod
    def load(cls, config: Config, directory: Path) -> "HeldOut":
        """Reads what prepare left in ``directory``.

        Raises:
            RunDirError: the data are not prepared, or damaged.
            DataError: there are no held-out rows.
        """
        path = directory / EVALUATION
        rows = list(load_rows(path))
        if not rows:
            raise DataError(f"{path} has no rows: give evaluation.path, or raise evaluation.held_out_fraction")
        rejected = directory / REJECTED
        likelihood = {}
        for name in config.evaluation.likelihood:
            likelihood[name] = list(load_rows(directory / likelihood_file(name)))
        return cls(
            rows=rows,
            rejected=list(load_rows(rejected)) if is_written(rejected) else None,
            likelihood=likelihood,
            end_token_id=DataManifest.load(directory).end_token_id,
        )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one model."""

    answers: AnswerMeasures
    logps: LogpMeasures
    shown: list[PromptAnswers]
    """The answers to the first prompts, for reading."""


def opponents_answers(config: Config, opponent: EvaluatedModel, held_out: HeldOut) -> list[list[int]] | None:
    """The answer that each real answer is compared with: a sample of ``opponent``, or the rejected answer.

    None if the objective compares with rejected answers and the data have none.
    """
    if objective_class(config).generates:
        passes = [sampled_pass(config, 0)]
        [samples] = held_out_answers(config, opponent, held_out.rows, passes, end_token_id=held_out.end_token_id)
        return [list(sample.token_ids) for sample in samples]
    if held_out.rejected is None:
        return None
    return [row.real_ids for row in held_out.rejected]


def measure(config: Config, model: EvaluatedModel, held_out: HeldOut, comparison: Comparison | None) -> Measurement:
    """Generates what is missing of the model's answers and measures them.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
        DeviceError: the engine cannot run the model here.
    """
    settings = config.evaluation
    passes = [greedy_pass(config)]
    passes += [sampled_pass(config, number) for number in range(settings.samples)]
    completions = held_out_answers(config, model, held_out.rows, passes, end_token_id=held_out.end_token_id)

    tokenizer = load_tokenizer(model.hf)
    real = _real_answers(tokenizer, held_out.rows)
    greedy, *sampled = [_answers(tokenizer, of_pass) for of_pass in completions]
    pattern = settings.answer_pattern
    return Measurement(
        answers=measure_answers(
            real,
            greedy,
            list(zip(*sampled, strict=True)),  # one sequence per prompt, not per pass
            answer_pattern=None if pattern is None else re.compile(pattern),
            patterns={name: re.compile(expression) for name, expression in settings.patterns.items()},
        ),
        logps=measure_logps(config, model, held_out.rows, likelihood=held_out.likelihood, comparison=comparison),
        shown=_shown(
            config, tokenizer, held_out.rows, {"real": real, "greedy": greedy, "sampled": sampled[0]}, comparison
        ),
    )


def _real_answers(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> list[Answer]:
    texts = decode(tokenizer, [row.real_ids for row in rows])
    return [Answer(row.real_ids, text, row.real_truncated) for row, text in zip(rows, texts, strict=True)]


def _answers(tokenizer: "PreTrainedTokenizerBase", completions: Sequence[Completion]) -> list[Answer]:
    texts = decode(tokenizer, [completion.token_ids for completion in completions])
    answers = []
    for completion, text in zip(completions, texts, strict=True):
        answers.append(Answer(list(completion.token_ids), text, completion.finish_reason == "length"))
    return answers


def _shown(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    answers: dict[Answered, list[Answer]],
    comparison: Comparison | None,
) -> list[PromptAnswers]:
    """The first prompts with one answer of each kind."""
    prompts = decode(tokenizer, [row.prompt_ids for row in rows[:SHOWN]])
    others = None if comparison is None else decode(tokenizer, comparison.answers[:SHOWN])
    generates = objective_class(config).generates
    shown = []
    for i, prompt in enumerate(prompts):
        other = None if others is None else others[i]
        shown.append(
            PromptAnswers(
                index=rows[i].index,
                prompt=prompt,
                real=answers["real"][i].text,
                greedy=answers["greedy"][i].text,
                sampled=answers["sampled"][i].text,
                cut=tuple(kind for kind, of_kind in answers.items() if of_kind[i].truncated),
                opponent=other if generates else None,
                rejected=None if generates else other,
            )
        )
    return shown
