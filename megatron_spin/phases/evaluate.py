"""The evaluation of one model on the held-out prompts: ``eval.json``, and ``samples.jsonl`` for reading."""

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_spin.config import Config, at_iteration
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.data.rows import REJECTED, Row, load_rows
from megatron_spin.data.templates import decode, load_tokenizer
from megatron_spin.errors import DataError
from megatron_spin.evaluation.answers import EvaluatedModel, greedy_pass, held_out_answers, sampled_pass
from megatron_spin.evaluation.logps import Comparison, measure_logps
from megatron_spin.evaluation.metrics import Answer, measure_answers
from megatron_spin.evaluation.record import Evaluation
from megatron_spin.evaluation.samples import SHOWN, Answered, PromptAnswers, write_samples
from megatron_spin.generation.engine import Completion
from megatron_spin.io import read_json, write_json
from megatron_spin.log import logger
from megatron_spin.phases.opponent import check_made_for, read_opponent
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.spin.objective import objective_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REPORTED = ("nll_per_token", "exact_match_sampled", "exact_match_greedy", "truncated_fraction", "opponent_accuracy")
"""Keys of ``eval.json`` that the phase reports."""


class Evaluate:
    """The phase."""

    def __init__(self, config: Config, run_dir: RunDir, target: Target) -> None:
        self.config = config
        self.run_dir = run_dir
        self.target = target

    def check(self) -> None:
        """Raises CheckpointError: the model has no readable weights."""
        self._model = EvaluatedModel.of(self.config, self.target)

    def run(self) -> dict[str, Any]:
        """Measures. Raises as :func:`evaluate`."""
        evaluation = evaluate(self.config, self.run_dir, self._model)
        for key in REPORTED:
            value = evaluation.measure(key).value
            if value is not None:
                logger.info(f"  {key:<20} {value:.4f}")
        return {"model": evaluation.model, "num_prompts": evaluation.num_prompts}


def evaluate(config: Config, run_dir: RunDir, model: EvaluatedModel) -> Evaluation:
    """Measures ``model`` and writes ``eval.json`` and ``samples.jsonl`` into its directory.

    Raises:
        DataError: there are no held-out rows.
        CheckpointError: the model or its tokenizer cannot be loaded.
        GateError: the opponent is not the model that generated the iteration's pairs.
    """
    started = time.perf_counter()
    rows = load_rows(run_dir.data / "eval.parquet")
    if not rows:
        raise DataError(
            f"{run_dir.data / 'eval.parquet'} has no rows: give evaluation.path, or raise evaluation.held_out_fraction"
        )
    likelihood = {name: load_rows(run_dir.data / f"likelihood_{name}.parquet") for name in config.evaluation.likelihood}
    opponent = _opponent(config, run_dir, model)
    end_token_id = read_json(run_dir.data / "manifest.json")["end_token_id"]

    sampled_passes = [sampled_pass(config, number) for number in range(config.evaluation.samples)]
    greedy, *sampled = held_out_answers(
        config, model, rows, [greedy_pass(config), *sampled_passes], end_token_id=end_token_id
    )
    comparison = None
    if opponent is not None:
        comparison = _comparison(config, run_dir, model, opponent, rows, end_token_id)

    tokenizer = load_tokenizer(model.hf)
    real_texts = decode(tokenizer, [row.real_ids for row in rows])
    real = []
    for row, text in zip(rows, real_texts, strict=True):
        real.append(Answer(row.real_ids, text, row.real_truncated))
    greedy_answers = _answers(tokenizer, greedy)
    # One list per pass, turned into one list per prompt.
    sampled_answers = list(zip(*(_answers(tokenizer, completions) for completions in sampled), strict=True))

    logps = measure_logps(config, model, rows, likelihood=likelihood, comparison=comparison)
    answer_pattern = config.evaluation.answer_pattern
    answers = measure_answers(
        real,
        greedy_answers,
        sampled_answers,
        answer_pattern=None if answer_pattern is None else re.compile(answer_pattern),
        patterns={name: re.compile(pattern) for name, pattern in config.evaluation.patterns.items()},
    )
    first_samples = [of_prompt[0] for of_prompt in sampled_answers]
    shown = _shown(config, tokenizer, rows, real, greedy_answers, first_samples, comparison)
    write_samples(model.target.directory / "samples.jsonl", shown)
    evaluation = Evaluation(
        model=model.identity,
        num_prompts=len(rows),
        logps=logps,
        answers=answers,
        samples=config.evaluation.samples,
        seconds=round(time.perf_counter() - started, 3),
    )
    write_json(model.target.eval, evaluation.to_json())
    return evaluation


def _opponent(config: Config, run_dir: RunDir, model: EvaluatedModel) -> EvaluatedModel | None:
    """The model that the iteration of ``model`` trained against; None if there was none."""
    iteration = model.target.iteration
    if iteration is None or not objective_class(config).compares():
        return None
    opponent = read_opponent(config, run_dir, iteration)
    check_made_for(opponent, model.target, PairsManifest.load(model.target.pairs), config)
    target = run_dir.target(baseline="sft") if iteration == 0 else run_dir.target(iteration=iteration - 1)
    return EvaluatedModel(hf=opponent.hf, target=target, identity=opponent.identity)


def _comparison(
    config: Config,
    run_dir: RunDir,
    model: EvaluatedModel,
    opponent: EvaluatedModel,
    rows: Sequence[Row],
    end_token_id: int,
) -> Comparison | None:
    """The answers that the real ones are compared with: samples of the opponent, or the rejected answers.

    None if the data have no rejected answers.
    """
    rejected = run_dir.data / REJECTED
    if objective_class(config).generates:
        [samples] = held_out_answers(config, opponent, rows, [sampled_pass(config, 0)], end_token_id=end_token_id)
        answers = [list(sample.token_ids) for sample in samples]
    elif rejected.exists():
        answers = [row.real_ids for row in load_rows(rejected)]
    else:
        return None
    assert model.target.iteration is not None
    return Comparison(opponent, answers, beta=at_iteration(config.spin.beta, model.target.iteration))


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
    real: Sequence[Answer],
    greedy: Sequence[Answer],
    sampled: Sequence[Answer],
    comparison: Comparison | None,
) -> list[PromptAnswers]:
    """The first prompts with an answer of each kind."""
    prompts = decode(tokenizer, [row.prompt_ids for row in rows[:SHOWN]])
    others: list[str] | list[None] = [None] * len(prompts)
    if comparison is not None:
        others = decode(tokenizer, comparison.answers[:SHOWN])
    generates = objective_class(config).generates
    shown = []
    for i, prompt in enumerate(prompts):
        answers: dict[Answered, Answer] = {"real": real[i], "greedy": greedy[i], "sampled": sampled[i]}
        shown.append(
            PromptAnswers(
                index=rows[i].index,
                prompt=prompt,
                real=real[i].text,
                greedy=greedy[i].text,
                sampled=sampled[i].text,
                cut=tuple(name for name, answer in answers.items() if answer.truncated),
                opponent=others[i] if generates else None,
                rejected=None if generates else others[i],
            )
        )
    return shown
