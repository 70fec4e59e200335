"""The rows of a data file as token ids: what a model allows, and which rows are dropped or cut. No torch."""

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spin.config import Config
from megatron_spin.data.reading import DroppedRow, Rejected, SourceRows, read_source_rows
from megatron_spin.data.rows import Row
from megatron_spin.data.templates import (
    Template,
    answer_ids,
    end_token_id,
    ends_inside,
    in_parallel,
    load_tokenizer,
    prompt_ids,
)
from megatron_spin.errors import CheckpointError, ConfigError, DataError
from megatron_spin.hf.assets import read_json_object
from megatron_spin.log import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_BATCH = 4096
"""Rows that are tokenized at once: enough work for each of the tokenizer's threads, a few megabytes of text."""
DROPPED = {
    "empty_prompt": "prompt is empty",
    "empty_answer": "answer is empty",
    "several_turns": "conversation has more than one turn",
    "long_prompt": "prompt longer than {prompt_limit} tokens (data.max_prompt_length)",
    "long_answer": "answer longer than {max_answer_length} tokens (data.max_answer_length)",
    "end_inside": "answer has the end token inside",
}
"""Reasons for dropping a row, in words."""


def dropped_words(reason: str, config: Config) -> str:
    """A key of :data:`DROPPED` in words, with the limits of ``config``."""
    data = config.data
    return DROPPED[reason].format(prompt_limit=data.prompt_limit, max_answer_length=data.max_answer_length)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What every tokenized row keeps to; lengths are in tokens."""

    end: int
    """Id of the end token."""
    vocabulary: int
    """``vocab_size`` of the model's config; ids are below it."""
    prompt: int
    """Rows with longer prompts are dropped."""
    answer: int
    """Longer answers are cut, the end token counted."""
    total: int
    """Answers are cut so that prompt and answer together are no longer."""
    whole_answer: int | None
    """Rows with longer answers, the end token counted, are dropped; None: no such limit."""


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The usable rows of one file."""

    rows: list[Row]
    rejected: dict[int, Row]
    """For preferences, by the row's index: the same prompt with the rejected answer in the real one's place."""
    counts: dict[str, Any]
    """Of all usable rows, before any draw.

    ``read``, ``format``, ``dropped`` by reason, ``capped`` and ``duplicates`` (rows whose prompt came before).
    """


def load_tokenizer_and_limits(config: Config) -> "tuple[PreTrainedTokenizerBase, Limits]":
    """The tokenizer of ``model.hf``, and what the configuration and the model's config allow.

    Raises:
        CheckpointError: the model has no readable config or tokenizer.
        ConfigError: the model is too short for ``data.max_length``.
        DataError: the end token does not fit the model.
    """
    hf, data = Path(config.model.hf), config.data
    if not (hf / "config.json").is_file():
        raise CheckpointError(
            f"model.hf={hf} holds no config.json: give the directory of a Hugging Face model (it is not downloaded)"
        )
    model = read_json_object(hf / "config.json")
    tokenizer = load_tokenizer(hf)
    end = end_token_id(tokenizer, data.end_token)
    _check_end_token(hf, model, tokenizer, end)
    vocabulary = int(model["vocab_size"])
    if end >= vocabulary:
        raise DataError(
            f"the end token's id {end} is not below the model's vocab_size={vocabulary}: {hf} holds another model's "
            "tokenizer"
        )
    positions = model.get("max_position_embeddings")
    if positions is not None and data.max_length > positions:
        raise ConfigError(
            f"data.max_length={data.max_length} exceeds the model's max_position_embeddings={positions}: lower it"
        )
    # The longest of all iterations: each generation phase cuts the real answers to its own limit.
    lengths = config.generation.max_new_tokens
    limits = Limits(
        end=end,
        vocabulary=vocabulary,
        prompt=data.prompt_limit,
        answer=max(lengths) if isinstance(lengths, list) else lengths,
        total=data.max_length,
        whole_answer=data.max_answer_length,
    )
    return tokenizer, limits


def _check_end_token(hf: Path, model: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", end: int) -> None:
    """The token that ends real answers must stop the model's generation, here and wherever the export is used."""
    path = hf / "generation_config.json"
    stops = read_json_object(path).get("eos_token_id") if path.is_file() else None
    if stops is None:
        path = hf / "config.json"
        stops = model.get("eos_token_id")
    if stops is None:
        return
    stops = stops if isinstance(stops, list) else [stops]
    if end in stops:
        return
    shown = stops[0] if len(stops) == 1 else stops
    raise DataError(
        f"answers end with {tokenizer.convert_ids_to_tokens(end)!r} (id {end}), but {path} stops generation on "
        f"eos_token_id={shown}: set data.end_token to that token, or add {end} to eos_token_id there"
    )


def tokenize(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    limits: Iterable[Limits],
    *,
    template: Template,
    rejected: Rejected = "ignored",
) -> dict[Limits, Tokenized]:
    """The usable rows of the file ``path`` under each of ``limits``; for ``rejected`` see :func:`read_source_rows`.

    Raises:
        DataError: the file cannot be read, or the tokenizer has tokens that the model does not know.
    """
    source = read_source_rows(path, rejected=rejected)
    builders = {each: _Builder(path, tokenizer, each, collections.Counter(source.dropped)) for each in limits}
    end_of_answers = {each.end for each in builders}
    assert len(end_of_answers) == 1, "answers are tokenized once, with one end token"
    [end] = end_of_answers
    with in_parallel(), Progress(f"tokenize {path.name}", total=len(source.rows), unit="row") as bar:
        for start in range(0, len(source.rows), ROWS_PER_BATCH):
            batch = source.rows[start : start + ROWS_PER_BATCH]
            prompts = prompt_ids(tokenizer, template, [(row.prompt, row.system) for row in batch])
            answers = answer_ids(tokenizer, [row.answer for row in batch], end)
            others: list[list[int] | None] = [None] * len(batch)
            if rejected != "ignored":
                places = [place for place, row in enumerate(batch) if row.rejected is not None]
                texts = [batch[place].rejected or "" for place in places]
                for place, ids in zip(places, answer_ids(tokenizer, texts, end), strict=True):
                    others[place] = ids
            for builder in builders.values():
                for row, prompt, answer, other in zip(batch, prompts, answers, others, strict=True):
                    builder.add(row.index, prompt, answer, other)
            bar.update(len(batch))
    return {each: builder.tokenized(source) for each, builder in builders.items()}


@dataclasses.dataclass
class _Builder:
    """Collects the usable rows of one file under one set of limits."""

    path: Path
    tokenizer: "PreTrainedTokenizerBase"
    limits: Limits
    dropped: collections.Counter[str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    rejected: dict[int, Row] = dataclasses.field(default_factory=dict)

    def add(self, index: int, prompt: list[int], answer: list[int], rejected: list[int] | None) -> None:
        """Takes the row ``index`` of the file, or counts why it is dropped."""
        try:
            row = self._row(index, prompt, answer)
            # Both answers or neither: a preference with one usable answer is no pair.
            if rejected is not None:
                self.rejected[index] = self._row(index, prompt, rejected)
        except DroppedRow as dropped_row:
            self.dropped[dropped_row.reason] += 1
        else:
            self.rows.append(row)

    def tokenized(self, source: SourceRows) -> Tokenized:
        counts = {
            "read": source.read,
            "format": source.format,
            "dropped": {reason: self.dropped[reason] for reason in DROPPED if self.dropped[reason]},
            "capped": sum(row.real_truncated for row in self.rows),
            "duplicates": len(self.rows) - len({tuple(row.prompt_ids) for row in self.rows}),
        }
        return Tokenized(self.rows, self.rejected, counts)

    def _row(self, index: int, prompt: list[int], answer: list[int]) -> Row:
        """
        Raises:
            DroppedRow: the prompt or the answer is empty or exceeds a limit, or the end token does not end it.
            DataError: the model does not know one of the tokens.
        """
        limits = self.limits
        # The order decides under which reason a row is counted.
        if len(prompt) > limits.prompt:
            raise DroppedRow("long_prompt")
        if answer == [limits.end]:
            raise DroppedRow("empty_answer")
        if not prompt:
            raise DroppedRow("empty_prompt")
        if ends_inside(answer, limits.end):
            raise DroppedRow("end_inside")
        if limits.whole_answer is not None and len(answer) > limits.whole_answer:
            raise DroppedRow("long_answer")
        highest = max(max(prompt), max(answer))
        if highest >= limits.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise DataError(
                f"{self.path} row {index}: token id {highest} ({token!r}) is not below the model's "
                f"vocab_size={limits.vocabulary}: the tokenizer has tokens that the model does not know; resize the "
                "model or use its own tokenizer"
            )
        # A cut answer loses its end token, as a generated one that reaches its cap has none.
        cap = min(limits.answer, limits.total - len(prompt))
        return Row(index, prompt, answer[:cap], real_truncated=len(answer) > cap)
