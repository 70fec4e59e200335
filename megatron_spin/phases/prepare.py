"""The prepare phase: read the data, check everything that later phases take for granted, tokenize once, split, and count. No torch."""

import collections
import dataclasses
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_spin.config import Config, DataConfig, Truncated, at_iteration
from megatron_spin.data.pairs import BuiltPairs, Pair, build_pairs
from megatron_spin.data.reading import Rejected, Sample, read_samples
from megatron_spin.data.rows import REJECTED, Row, hash_rows, save_rows
from megatron_spin.data.templates import (
    answer_ids,
    end_token_id,
    ends_inside,
    load_tokenizer,
    prompt_ids,
    tokenizer_sha,
)
from megatron_spin.errors import CheckpointError, ConfigError, DataError
from megatron_spin.io import sha256, write_json
from megatron_spin.spin.objective import objective_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DROPPED = {
    "empty_prompt": "prompt is empty",
    "empty_answer": "answer is empty",
    "several_turns": "conversation has more than one turn",
    "long_prompt": "prompt longer than {prompt_limit} tokens (data.max_prompt_length)",
    "long_answer": "answer longer than {max_answer_length} tokens (data.max_answer_length)",
    "end_inside": "answer has the end token inside",
}
"""Reasons for leaving a row out, and how they are told."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a tokenized row must keep to."""

    end: int
    """Id of the end token."""
    vocabulary: int
    """``vocab_size`` of the model's config: ids must be below it."""
    prompt: int
    """Longest prompt, in tokens."""
    answer: int
    """Longest answer, in tokens, the end token counted."""
    total: int
    """Longest prompt and answer together."""


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The usable rows of one file."""

    rows: list[Row]
    rejected: dict[int, Row]
    """For preferences, by the row's index: the same prompt with the rejected answer in the real one's place."""
    counts: dict[str, Any]
    """``read``, ``dropped`` by reason, ``capped``, ``duplicates`` (prompts seen before) of all usable rows, before any draw."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that the phase writes."""

    train: list[Row]
    evaluation: list[Row]
    """Empty where the config asks for no evaluation."""
    rejected: list[Row]
    """For DPO, the prompts of ``evaluation`` with the rejected answers in the real ones' place; empty where the held-out data have none."""
    likelihood: dict[str, list[Row]]
    """The rows of each file of ``evaluation.likelihood``."""
    pairs: BuiltPairs | None
    """For DPO, the pairs that it trains on, in the order of ``train``."""
    manifest: dict[str, Any]
    """Template, end token, tokenizer sha, ``identity`` and ``eval_identity``, counts of both files."""

    def save(self, directory: Path) -> None:
        """Writes ``train.parquet``, ``eval.parquet``, ``eval_rejected.parquet`` if there is any, one ``likelihood_NAME.parquet`` a file and last
        ``manifest.json`` into ``directory``."""
        save_rows(directory / "train.parquet", self.train)
        save_rows(directory / "eval.parquet", self.evaluation)
        if self.rejected:
            save_rows(directory / REJECTED, self.rejected)
        for name, rows in self.likelihood.items():
            save_rows(directory / f"likelihood_{name}.parquet", rows)
        write_json(directory / "manifest.json", self.manifest)


def prepare(config: Config) -> Prepared:
    """Reads, checks, tokenizes, splits and draws; writes nothing, so that bad input leaves nothing behind.

    Raises:
        CheckpointError: ``model.hf`` has no config or no tokenizer.
        ConfigError: the model is too short for ``data.max_length``.
        DataError: anything wrong with the data, or nothing left.
    """
    hf = Path(config.model.hf)
    tokenizer, limits = _limits(config, hf)
    objective = objective_class(config)
    dpo = objective.compares() and not objective.generates
    path, held_path = Path(config.data.path), config.evaluation.path
    needed: Rejected = "needed" if dpo else "ignored"
    train = _tokenize(path, tokenizer, config.data, limits, rejected=needed)
    held_limits = dataclasses.replace(limits, answer=config.held_out_cap)
    if held_path is not None:
        source = _tokenize(Path(held_path), tokenizer, config.data, held_limits, rejected="taken" if dpo else "ignored")
        rows, held = train.rows, source.rows
    else:
        rows, left_out = _split(train.rows, config.evaluation.held_out_fraction, config.data.seed)
        same = held_limits == limits
        source = train if same else _tokenize(path, tokenizer, config.data, held_limits, rejected=needed)
        indices = {row.index for row in left_out}
        held = [row for row in source.rows if row.index in indices]
    drawn = _draw(rows, config.data.num_prompts, config.data.seed)
    evaluated = _draw(held, config.evaluation.num_prompts, config.evaluation.seed)
    _check_some(config, train, drawn, held)
    likelihood = {
        name: _likelihood_rows(name, Path(file), tokenizer, config, held_limits)
        for name, file in config.evaluation.likelihood.items()
    }
    pairs = _pairs(drawn, train.rejected, at_iteration(config.generation.truncated, 0)) if dpo else None
    rejected = [source.rejected[row.index] for row in evaluated] if source.rejected else []

    manifest = {
        "template": config.data.template,
        "end_token": tokenizer.convert_ids_to_tokens(limits.end),
        "end_token_id": limits.end,
        "tokenizer": tokenizer_sha(hf),
        "files": {key: sha256(Path(file)) for key, file in config.data_files.items()},
        "identity": hash_rows(drawn),
        "eval_identity": hash_rows(evaluated),
        "likelihood": {name: {"identity": hash_rows(rows), "kept": len(rows)} for name, rows in likelihood.items()},
        "counts": {
            **train.counts,
            "held_out": len(train.rows) - len(rows),
            "kept": len(drawn),
            "tokens": {
                "prompt": sum(len(r.prompt_ids) for r in drawn),
                "answer": sum(len(r.real_ids) for r in drawn),
                **({"rejected answer": sum(len(pair.generated_ids) for pair in pairs.pairs)} if pairs else {}),
            },
            **({"pairs": pairs.counts} if pairs else {}),
        },
        "eval_counts": {
            **(source.counts if held_path is not None else {}),
            "kept": len(evaluated),
            **({"with_rejected": len(rejected)} if dpo else {}),
            "prompts_also_trained_on": _overlap(drawn, evaluated),
        },
    }
    return Prepared(drawn, evaluated, rejected, likelihood, pairs, manifest)


def describe(manifest: dict[str, Any], config: Config) -> str:
    """The counts of a manifest as a table for people."""
    counts, evaluation = manifest["counts"], manifest["eval_counts"]
    lines = [("rows read", counts["read"])]
    lines += [(f"  dropped: {_reason(reason, config)}", count) for reason, count in counts["dropped"].items()]
    lines += [("  held out for evaluation", counts["held_out"])] if counts["held_out"] else []
    usable = counts["read"] - sum(counts["dropped"].values()) - counts["held_out"]
    lines += (
        [(f"  not drawn (data.num_prompts={config.data.num_prompts})", usable - counts["kept"])]
        if usable > counts["kept"]
        else []
    )
    lines += [("prompts to train on", counts["kept"])]
    lines += [(f"  {part} tokens", count) for part, count in counts["tokens"].items()]
    lines += [
        ("usable rows whose answer was cut", counts["capped"]),
        ("usable rows whose prompt came before", counts["duplicates"]),
    ]
    if "pairs" in counts:
        lines += [
            ("rejected answers that were cut", counts["pairs"]["truncated"]),
            ("pairs of equal answers", counts["pairs"]["identical"]),
        ]
        lines += (
            [("pairs left out (generation.truncated=drop)", counts["pairs"]["dropped"])]
            if counts["pairs"]["dropped"]
            else []
        )
    if "read" in evaluation:
        lines += [("evaluation rows read", evaluation["read"])]
        lines += [(f"  dropped: {_reason(reason, config)}", count) for reason, count in evaluation["dropped"].items()]
    lines += [("prompts to evaluate on", evaluation["kept"])]
    lines += (
        [("  of these with a rejected answer", evaluation["with_rejected"])] if "with_rejected" in evaluation else []
    )
    lines += (
        [("  of these also trained on", evaluation["prompts_also_trained_on"])]
        if evaluation["prompts_also_trained_on"]
        else []
    )
    lines += [(f"answers of {name} for their NLL alone", part["kept"]) for name, part in manifest["likelihood"].items()]
    width = max(len(text) for text, _ in lines)
    return "\n".join(f"{text:<{width}}  {count:>12,}" for text, count in lines)


def _reason(reason: str, config: Config) -> str:
    return DROPPED[reason].format(
        prompt_limit=config.data.prompt_limit, max_answer_length=config.data.max_answer_length
    )


def _limits(config: Config, hf: Path) -> "tuple[PreTrainedTokenizerBase, Limits]":
    """The model's tokenizer and what its config allows."""
    model = _model_json(hf, "config.json")
    if model is None:
        raise CheckpointError(
            f"model.hf={hf} holds no config.json: give the directory of a Hugging Face model (it is not downloaded)"
        )
    tokenizer = load_tokenizer(hf)
    end = end_token_id(tokenizer, config.data.end_token)
    _check_end(model, _model_json(hf, "generation_config.json"), tokenizer, end, hf)
    vocabulary = int(model["vocab_size"])
    if end >= vocabulary:
        raise DataError(
            f"the end token's id {end} is not below the model's vocab_size={vocabulary}: {hf} holds another model's tokenizer"
        )
    positions = model.get("max_position_embeddings")
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length={config.data.max_length} exceeds the model's max_position_embeddings={positions}: lower it"
        )
    data = config.data
    lengths = config.generation.max_new_tokens  # the longest of all iterations; each generation caps its own pairs
    answer = max(lengths) if isinstance(lengths, list) else lengths
    return tokenizer, Limits(
        end=end, vocabulary=vocabulary, prompt=data.prompt_limit, answer=answer, total=data.max_length
    )


def _model_json(hf: Path, name: str) -> dict[str, Any] | None:
    path = hf / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): copy the model again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy the model again")
    return value


def _check_end(
    model: dict[str, Any], generation: dict[str, Any] | None, tokenizer: "PreTrainedTokenizerBase", end: int, hf: Path
) -> None:
    """The token that real answers end with must be one that stops the model's generation, here and wherever the export is used."""
    source = "generation_config.json" if generation and generation.get("eos_token_id") is not None else "config.json"
    stops = (generation or {}).get("eos_token_id") if source == "generation_config.json" else model.get("eos_token_id")
    if stops is None:
        return
    stops = stops if isinstance(stops, list) else [stops]
    if end not in stops:
        raise DataError(
            f"answers end with {tokenizer.convert_ids_to_tokens(end)!r} (id {end}), but {hf / source} stops generation on eos_token_id="
            f"{stops[0] if len(stops) == 1 else stops}: set data.end_token to that token, or add {end} to eos_token_id there"
        )


def _pairs(rows: Sequence[Row], rejected: dict[int, Row], truncated: Truncated) -> BuiltPairs:
    """Pairs of ``rows`` with their rejected answers, which stand where self-play has the generated ones."""
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
    return build_pairs(pairs, truncated=truncated)


def _tokenize(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    limits: Limits,
    *,
    rejected: Rejected = "ignored",
) -> Tokenized:
    """The usable rows of ``path``; for ``rejected`` see :func:`read_samples`."""
    samples = read_samples(path, rejected=rejected)
    dropped = collections.Counter(samples.dropped)
    rows: list[Row] = []
    lost_rows: dict[int, Row] = {}
    # Fast tokenizers warn once about texts beyond the model's length; over-long rows are counted here instead.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer.model_max_length = int(1e12)
    for sample in tqdm(samples.rows, desc=f"tokenize {path.name}", unit="row"):
        where = f"{path} row {sample.index}"
        row = _row(sample, sample.answer, tokenizer, data, limits, where)
        lost = (
            _row(sample, sample.rejected, tokenizer, data, limits, where)
            if rejected != "ignored" and sample.rejected is not None
            else None
        )
        if isinstance(row, str) or isinstance(lost, str):
            dropped[row if isinstance(row, str) else str(lost)] += 1
            continue
        rows.append(row)
        if lost is not None:
            lost_rows[row.index] = lost
    counts = {
        "read": samples.read,
        "format": samples.format,
        "dropped": {reason: dropped[reason] for reason in DROPPED if dropped[reason]},
        "capped": sum(row.real_truncated for row in rows),
        "duplicates": len(rows) - len({tuple(row.prompt_ids) for row in rows}),
    }
    return Tokenized(rows, lost_rows, counts)


def _row(
    sample: Sample, text: str, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, limits: Limits, where: str
) -> Row | str:
    """The prompt of ``sample`` with the answer ``text``, tokenized, or the reason for dropping the row."""
    prompt = prompt_ids(tokenizer, data.template, sample.prompt, sample.system)
    answer = answer_ids(tokenizer, text, limits.end)
    if len(prompt) > limits.prompt:
        return "long_prompt"
    if answer == [limits.end]:
        return "empty_answer"
    if not prompt:
        return "empty_prompt"
    if ends_inside(answer, limits.end):
        return "end_inside"
    if data.max_answer_length is not None and len(answer) > data.max_answer_length:
        return "long_answer"
    highest = max(max(prompt), max(answer))
    if highest >= limits.vocabulary:
        raise DataError(
            f"{where}: token id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) is not below the model's "
            f"vocab_size={limits.vocabulary}: the tokenizer has tokens the model does not know; resize the model or use its own tokenizer"
        )
    cap = min(limits.answer, limits.total - len(prompt))
    return Row(sample.index, prompt, answer[:cap], real_truncated=len(answer) > cap)


def _split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and held-out ones; rows of one prompt stay together, so that no prompt is in both."""
    prompts = sorted({tuple(row.prompt_ids) for row in rows})
    count = round(len(prompts) * fraction)
    if fraction > 0 and not count and len(prompts) > 1:
        count = 1
    chosen = set(random.Random(f"held-out {seed}").sample(prompts, count))
    return [row for row in rows if tuple(row.prompt_ids) not in chosen], [
        row for row in rows if tuple(row.prompt_ids) in chosen
    ]


def _likelihood_rows(
    name: str, path: Path, tokenizer: "PreTrainedTokenizerBase", config: Config, limits: Limits
) -> list[Row]:
    rows = _tokenize(path, tokenizer, config.data, limits).rows
    if not rows:
        raise DataError(f"evaluation.likelihood.{name}={path} has no usable row: check the data, or leave the file out")
    return _draw(rows, config.evaluation.num_prompts, config.evaluation.seed)


def _draw(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """``count`` rows (None: all) in an order that ``seed`` decides; a smaller count gives the beginning of a larger one."""
    order = list(rows)
    random.Random(f"draw {seed}").shuffle(order)
    return order[:count]


def _check_some(config: Config, train: Tokenized, drawn: Sequence[Row], held: Sequence[Row]) -> None:
    reasons = ", ".join(f"{count} {_reason(reason, config)}" for reason, count in train.counts["dropped"].items())
    if not drawn:
        read = train.counts["read"]
        raise DataError(
            f"{config.data.path}: none of {read} rows is left to train on ({reasons or 'all held out'}): check the data"
        )
    if config.evaluation.path is not None and not held:
        raise DataError(
            f"evaluation.path={config.evaluation.path} has no usable row: check the data, or set it to null"
        )


def _overlap(train: Iterable[Row], evaluation: Iterable[Row]) -> int:
    trained = {tuple(row.prompt_ids) for row in train}
    return sum(tuple(row.prompt_ids) in trained for row in evaluation)
