"""A run's data: read, checked for all that later phases rely on, tokenized once, split, drawn and counted. No torch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spin.config import Config, Truncated, at_iteration
from megatron_spin.data.manifest import DataManifest
from megatron_spin.data.pairs import BuiltPairs, Pair
from megatron_spin.data.reading import Rejected
from megatron_spin.data.rows import EVALUATION, REJECTED, TRAIN, Row, hash_rows, likelihood_file, save_rows
from megatron_spin.data.splits import draw, num_repeated, split
from megatron_spin.data.templates import tokenizer_sha
from megatron_spin.data.tokenization import Limits, Tokenized, dropped_words, load_tokenizer_and_limits, tokenize
from megatron_spin.errors import DataError
from megatron_spin.io import sha256
from megatron_spin.spin.objective import objective_class


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All data of a run."""

    train: list[Row]
    evaluation: list[Row]
    """Empty if the config asks for no evaluation."""
    rejected: list[Row]
    """For preferences, the prompts of ``evaluation`` with the rejected answers in the real ones' place.

    Empty if the held-out data have none.
    """
    likelihood: dict[str, list[Row]]
    """The rows of each file of ``evaluation.likelihood``."""
    pairs: BuiltPairs | None
    """For preferences, the pairs to train on, in the order of ``train``."""
    manifest: DataManifest

    def save(self, directory: Path) -> None:
        """Writes the rows into ``directory``, and last ``manifest.json``."""
        save_rows(directory / TRAIN, self.train)
        save_rows(directory / EVALUATION, self.evaluation)
        if self.rejected:
            save_rows(directory / REJECTED, self.rejected)
        for name, rows in self.likelihood.items():
            save_rows(directory / likelihood_file(name), rows)
        self.manifest.save(directory)


def prepare(config: Config) -> Prepared:
    """Reads, checks, tokenizes, splits and draws; writes nothing, so that bad input leaves nothing behind.

    Raises:
        CheckpointError: ``model.hf`` has no config or no tokenizer.
        ConfigError: the model is too short for ``data.max_length``.
        DataError: anything wrong with the data, or nothing left.
    """
    evaluation = config.evaluation
    tokenizer, limits = load_tokenizer_and_limits(config)
    # All models answer held-out prompts under one cap, so the real answers to them are cut there in every iteration.
    held_out_limits = dataclasses.replace(limits, answer=config.held_out_cap)

    def tokenized(path: str, limits: set[Limits], rejected: Rejected = "ignored") -> dict[Limits, Tokenized]:
        return tokenize(Path(path), tokenizer, limits, template=config.data.template, rejected=rejected)

    takes_preferences = _takes_preferences(config)
    given: Rejected = "needed" if takes_preferences else "ignored"
    if evaluation.path is not None:
        source = tokenized(config.data.path, {limits}, given)[limits]
        rows = source.rows
        taken: Rejected = "taken" if takes_preferences else "ignored"
        held_out = tokenized(evaluation.path, {held_out_limits}, taken)[held_out_limits]
        held_out_rows = held_out.rows
    else:
        by_limits = tokenized(config.data.path, {limits, held_out_limits}, given)
        source, held_out = by_limits[limits], by_limits[held_out_limits]
        rows, left_out = split(source.rows, evaluation.held_out_fraction, config.data.seed)
        indices = {row.index for row in left_out}
        held_out_rows = [row for row in held_out.rows if row.index in indices]
    train = draw(rows, config.data.num_prompts, config.data.seed)
    _check_not_empty(config, source, train, held_out_rows)
    evaluated = draw(held_out_rows, evaluation.num_prompts, evaluation.seed)

    likelihood = {}
    for name, path in evaluation.likelihood.items():
        usable = tokenized(path, {held_out_limits})[held_out_limits].rows
        if not usable:
            raise DataError(
                f"evaluation.likelihood.{name}={path} has no usable row: check the data, or leave the file out"
            )
        likelihood[name] = draw(usable, evaluation.num_prompts, evaluation.seed)

    pairs = None
    if takes_preferences:
        pairs = _preference_pairs(train, source.rejected, at_iteration(config.generation.truncated, 0))
    rejected = [held_out.rejected[row.index] for row in evaluated] if held_out.rejected else []

    eval_counts: dict[str, Any] = dict(held_out.counts) if evaluation.path is not None else {}
    eval_counts["kept"] = len(evaluated)
    if takes_preferences:
        eval_counts["with_rejected"] = len(rejected)
    eval_counts["prompts_also_trained_on"] = num_repeated(evaluated, train)
    manifest = DataManifest(
        template=config.data.template,
        end_token=str(tokenizer.convert_ids_to_tokens(limits.end)),
        end_token_id=limits.end,
        tokenizer=tokenizer_sha(Path(config.model.hf)),
        files={key: sha256(Path(file)) for key, file in config.data_files.items()},
        identity=hash_rows(train),
        eval_identity=hash_rows(evaluated),
        likelihood={name: {"identity": hash_rows(drawn), "kept": len(drawn)} for name, drawn in likelihood.items()},
        counts=_counts(source, train, pairs, num_held_out=len(source.rows) - len(rows)),
        eval_counts=eval_counts,
    )
    return Prepared(train, evaluated, rejected, likelihood, pairs, manifest)


def _counts(source: Tokenized, train: Sequence[Row], pairs: BuiltPairs | None, *, num_held_out: int) -> dict[str, Any]:
    """What was read and dropped, counted before the draw; what is kept and its tokens, counted after it."""
    tokens = {
        "prompt": sum(len(row.prompt_ids) for row in train),
        "answer": sum(len(row.real_ids) for row in train),
    }
    counts = {**source.counts, "held_out": num_held_out, "kept": len(train), "tokens": tokens}
    if pairs is not None:
        tokens["rejected answer"] = sum(len(pair.generated_ids) for pair in pairs)
        counts["pairs"] = pairs.counts
    return counts


def _takes_preferences(config: Config) -> bool:
    """Whether the objective compares each answer with a given, rejected one."""
    objective = objective_class(config)
    return objective.compares() and not objective.generates


def _check_not_empty(config: Config, source: Tokenized, train: Sequence[Row], held_out: Sequence[Row]) -> None:
    if not train:
        dropped = source.counts["dropped"].items()
        reasons = ", ".join(f"{count} {dropped_words(reason, config)}" for reason, count in dropped)
        raise DataError(
            f"{config.data.path}: none of {source.counts['read']} rows is left to train on "
            f"({reasons or 'all held out'}): check the data"
        )
    if config.evaluation.path is not None and not held_out:
        raise DataError(
            f"evaluation.path={config.evaluation.path} has no usable row: check the data, or set it to null"
        )


def _preference_pairs(rows: Sequence[Row], rejected: dict[int, Row], truncated: Truncated) -> BuiltPairs:
    """Pairs of ``rows`` with their rejected answers, which take the place of generated ones."""
    pairs = []
    for row in rows:
        other = rejected[row.index]
        pairs.append(
            Pair(
                index=row.index,
                iteration=0,
                prompt_ids=row.prompt_ids,
                answers=(row.real_ids, other.real_ids),
                finish_reason="length" if other.real_truncated else "stop",
            )
        )
    return BuiltPairs(pairs, truncated=truncated)
