"""Evaluation of one model on the held-out prompts: ``eval.json``, and ``samples.jsonl`` for reading."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_spin.config import Config, at_iteration
from megatron_spin.data.rows import REJECTED, Row, load_rows
from megatron_spin.errors import CheckpointError, DataError, GateError
from megatron_spin.evaluation.answers import Player, held_out_answers
from megatron_spin.evaluation.metrics import Answer, margins, mean, nll_per_token, sample_metrics
from megatron_spin.generation.engine import Completion
from megatron_spin.hf.logps import hf_token_logps
from megatron_spin.hf.model import choose_device, load_model, release_memory
from megatron_spin.io import atomic_writer, read_json, write_json
from megatron_spin.run.directory import RunDir
from megatron_spin.spin.objective import objective_class

SHOWN = 20
"""Prompts whose answers ``samples.jsonl`` shows."""


def evaluate(config: Config, run_dir: RunDir, player: Player) -> dict[str, Any]:
    """Measures ``player`` and writes ``eval.json`` and ``samples.jsonl`` in its directory; returns what ``eval.json`` holds.

    Raises:
        DataError: there are no held-out rows.
        CheckpointError: the model or its tokenizer cannot be loaded.
        GateError: the opponent is not the model that generated the iteration's pairs.
    """
    started = time.perf_counter()
    device = choose_device(config.device)
    rows = load_rows(run_dir.data / "eval.parquet")[: config.evaluation.num_prompts]
    if not rows:
        raise DataError(
            f"{run_dir.data / 'eval.parquet'} has no rows: give evaluation.path, or raise evaluation.held_out_fraction"
        )
    likelihood = {name: load_rows(run_dir.data / f"likelihood_{name}.parquet") for name in config.evaluation.likelihood}
    opponent = _opponent(config, run_dir, player)
    end_token_id = read_json(run_dir.data / "manifest.json")["end_token_id"]
    passes = held_out_answers(config, player, rows, end_token_id=end_token_id)
    greedy, sampled = passes["greedy"], [passes[f"sampled_{k}"] for k in range(config.evaluation.samples)]
    lost = _opponents_answers(config, run_dir, opponent, rows, end_token_id) if opponent else None

    decode = _decoder(player.hf)
    real = [Answer(row.real_ids, decode(row.real_ids), row.real_truncated) for row in rows]
    greedy_answers = [_answer(completion, decode) for completion in greedy]
    sampled_answers = [
        [_answer(completion, decode) for completion in of_prompt] for of_prompt in zip(*sampled, strict=True)
    ]
    result: dict[str, Any] = {
        "model": player.identity,
        "num_prompts": len(rows),
        **_scores(config, rows, likelihood, player, opponent if lost else None, lost or [], device),
        **sample_metrics(
            real,
            greedy_answers,
            sampled_answers,
            answer_pattern=re.compile(config.evaluation.answer_pattern)
            if config.evaluation.answer_pattern is not None
            else None,
            patterns={name: re.compile(pattern) for name, pattern in config.evaluation.patterns.items()},
        ),
        "samples": config.evaluation.samples,
    }
    with atomic_writer(player.target.directory / "samples.jsonl") as file:
        for i, row in enumerate(rows[:SHOWN]):
            shown = {"index": row.index, "prompt": decode(row.prompt_ids), "real": real[i].text}
            shown |= {"greedy": greedy_answers[i].text, "sampled": sampled_answers[i][0].text}
            shown |= {"opponent" if objective_class(config).generates else "rejected": decode(lost[i])} if lost else {}
            answers = {"real": real[i], "greedy": greedy_answers[i], "sampled": sampled_answers[i][0]}
            shown["cut"] = [name for name, answer in answers.items() if answer.truncated]
            file.write(json.dumps(shown, ensure_ascii=False) + "\n")
    result["seconds"] = round(time.perf_counter() - started, 3)
    write_json(player.target.eval, result)
    return result


def _opponent(config: Config, run_dir: RunDir, player: Player) -> Player | None:
    """The player that ``player``'s iteration trained against; None where there was none."""
    iteration = player.target.iteration
    if iteration is None or not objective_class(config).compares():
        return None
    previous = run_dir.target(baseline="sft") if iteration == 0 else run_dir.target(iteration=iteration - 1)
    opponent = Player.of(config, previous)
    manifest = read_json(player.target.pairs / "manifest.json")
    if manifest["opponent"] != opponent.identity:
        raise GateError(
            f"{opponent.hf} is model {opponent.identity[:12]}, but iteration {iteration} trained against {manifest['opponent'][:12]}:"
            " the export was changed since; restore it"
        )
    return opponent


def _opponents_answers(
    config: Config, run_dir: RunDir, opponent: Player, rows: Sequence[Row], end_token_id: int
) -> list[list[int]] | None:
    """What stands against the real answer of each row: a sample of the opponent, or DPO's rejected answer (None where the data have none)."""
    if objective_class(config).generates:
        samples = held_out_answers(config, opponent, rows, end_token_id=end_token_id, only="sampled_0")["sampled_0"]
        return [list(sample.token_ids) for sample in samples]
    path = run_dir.data / REJECTED
    return [row.real_ids for row in load_rows(path)[: len(rows)]] if path.exists() else None


def _scores(
    config: Config,
    rows: Sequence[Row],
    likelihood: dict[str, list[Row]],
    player: Player,
    opponent: Player | None,
    lost: Sequence[list[int]],
    device: torch.device,
) -> dict[str, Any]:
    """What log-probs tell: likelihood of the real answers, and who wins against the opponent."""
    real = [(row.prompt_ids, row.real_ids) for row in rows]
    generated = [(row.prompt_ids, answer) for row, answer in zip(rows, lost, strict=opponent is not None)]
    more = {name: [(row.prompt_ids, row.real_ids) for row in extra] for name, extra in likelihood.items()}
    policy_logps, *others = _sequence_logps(config, player.hf, [real + generated, *more.values()], device)
    nll = nll_per_token(policy_logps[: len(rows)], [len(row.real_ids) for row in rows])
    result: dict[str, Any] = {
        "nll_per_token": nll.value,
        "nll_per_token_error": nll.error,
        "opponent_accuracy": None,
        "likelihood": {},
    }
    for (name, sequences), own in zip(more.items(), others, strict=True):
        of_file = nll_per_token(own, [len(answer) for _, answer in sequences])
        result["likelihood"][name] = {"nll_per_token": of_file.value, "nll_per_token_error": of_file.error}
    if opponent is not None and player.target.iteration is not None:
        (opponent_logps,) = _sequence_logps(config, opponent.hf, [real + generated], device)
        beta: float = at_iteration(config.spin.beta, player.target.iteration)
        count = len(rows)
        won = margins(
            policy_logps[:count], opponent_logps[:count], policy_logps[count:], opponent_logps[count:], beta=beta
        )
        equal = [list(row.real_ids) == list(answer) for row, answer in zip(rows, lost, strict=True)]
        won = [
            0.0 if same else item for same, item in zip(equal, won, strict=True)
        ]  # rounding must not decide who wins a tie
        accuracy, margin = mean([item > 0 for item in won]), mean(won)
        result |= {
            "opponent": opponent.identity,
            "opponent_accuracy": accuracy.value,
            "opponent_accuracy_error": accuracy.error,
        }
        result |= {"opponent_ties": mean(equal).value}
        result |= {"opponent_margin": margin.value, "opponent_margin_error": margin.error}
    return result


def _sequence_logps(
    config: Config, hf: Path, passes: Sequence[list[tuple[list[int], list[int]]]], device: torch.device
) -> list[list[float]]:
    """Summed log-prob of each response of each pass under the model in ``hf``, which is gone from memory afterwards."""
    model = load_model(hf, dtype=config.precision.export_dtype, device=device)
    sums = []
    for (
        sequences
    ) in passes:  # each batched by itself: the same sequences make the same batches, whatever else is measured
        logps = hf_token_logps(model, sequences, batch_size=config.evaluation.batch_size, device=device)
        sums.append([float(item.double().sum()) for item in logps])
    del model
    release_memory(device)
    return sums


def _answer(completion: Completion, decode: Any) -> Answer:
    return Answer(list(completion.token_ids), decode(completion.token_ids), completion.finish_reason == "length")


def _decoder(hf: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{hf} has no tokenizer that transformers can load ({error}): copy the tokenizer files there"
        ) from None
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)
