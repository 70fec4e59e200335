"""What tools/probe.py finds out before self-play: how real and generated answers differ, and what a few steps win.

No torch.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_spin.data.manifest import DataManifest
from megatron_spin.data.pairs import load_pairs
from megatron_spin.data.templates import decode, load_tokenizer
from megatron_spin.errors import RunDirError
from megatron_spin.evaluation.differences import Differences, differences
from megatron_spin.evaluation.metrics import Answer
from megatron_spin.evaluation.record import Evaluation
from megatron_spin.report.results import open_run
from megatron_spin.report.table import Table
from megatron_spin.report.terminal import print_table


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All that a probe found; ``probe.json`` has these fields."""

    differences: Differences
    steps: int
    """Optimizer steps before the held-out pairs were judged."""
    held_out: int
    """Held-out pairs."""
    accuracy: float | None
    """Share of the held-out pairs with different answers that the policy won (margin > 0); None if all are equal."""
    accuracy_error: float | None
    """Its standard error."""
    ties: float
    """Share of the held-out pairs whose two answers are equal."""


def read_diagnosis(root: Path) -> Diagnosis:
    """Reads the run directory of a finished probe.

    Raises:
        RunDirError: a phase of it has not run.
    """
    run_dir, config = open_run(root)
    target = run_dir.target(iteration=0)
    pairs, _ = load_pairs(target.pairs)
    tokenizer = load_tokenizer(Path(config.model.hf))
    end = DataManifest.load(run_dir.data).end_token_id

    def answers(sequences: Sequence[list[int]]) -> list[Answer]:
        texts = decode(tokenizer, sequences)
        return [Answer(ids, text, ids[-1] != end) for ids, text in zip(sequences, texts, strict=True)]

    real = answers([pair.real_ids for pair in pairs])
    generated = answers([pair.generated_ids for pair in pairs])
    evaluation = Evaluation.load(target.eval)
    opponent = evaluation.logps.opponent
    if opponent is None or opponent.accuracy.value is None or opponent.ties is None:
        raise RunDirError(f"{target.eval} compares with no opponent: probe again in a new run directory")
    trained = run_dir.record("train:0")
    if trained is None:
        raise RunDirError(f"{root} has not trained iteration 0: run tools/probe.py again")
    # The shares of the file count ties as lost.
    num_decided = round(evaluation.num_prompts * (1 - opponent.ties))
    accuracy, error = None, None
    if num_decided:
        accuracy = opponent.accuracy.value * evaluation.num_prompts / num_decided
        error = math.sqrt(accuracy * (1 - accuracy) / num_decided)
    return Diagnosis(
        differences=differences(real, generated),
        steps=trained.details["steps"],
        held_out=evaluation.num_prompts,
        accuracy=accuracy,
        accuracy_error=error,
        ties=opponent.ties,
    )


def lines(result: Diagnosis) -> list[list[str]]:
    """The rows of the table: measure, real, generated."""
    found = result.differences
    rows = [
        ["tokens of an answer", f"{found.length_real.value:.1f}", f"{found.length_generated.value:.1f}"],
        ["answers that end", f"{found.ended_real:.1%}", f"{found.ended_generated:.1%}"],
    ]
    length = found.length_difference
    if length.value is not None and length.error is not None:
        rows.append(["difference of lengths, pair by pair", f"{length.value:+.1f} ± {length.error:.1f}", ""])
    for phrase in found.phrases:
        rows.append([f"answers with “{phrase.text}”", f"{phrase.real:.1%}", f"{phrase.generated:.1%}"])
    return rows


def verdict(result: Diagnosis) -> list[str]:
    """What was measured, in sentences. They promise nothing: see docs/when-self-play-helps.md."""
    found = result.differences
    sentences = [
        f"{found.identical:.1%} of the generated answers equal the real one, token for token: nothing is learned from "
        "those."
    ]
    if result.accuracy is None or result.accuracy_error is None:
        sentences.append("No held-out pair has two different answers: there is nothing to learn.")
        return sentences
    won = (
        f"After {result.steps} steps the policy wins {result.accuracy:.1%} ± {result.accuracy_error:.1%} of the "
        "held-out pairs that differ"
    )
    if result.accuracy - 2 * result.accuracy_error <= 0.5:
        sentences.append(f"{won}: no better than chance, so it found no difference that carries over to other prompts.")
    else:
        sentences.append(f"{won}: there is a difference that carries over to other prompts.")
    if found.phrases:
        first = found.phrases[0]
        sentences.append(
            f"What sets them apart most is “{first.text}” ({first.real:.0%} of the real answers, {first.generated:.0%} "
            "of the generated ones). Self-play pushes towards the real answers' side of each difference, and for a "
            "small beta beyond it."
        )
    else:
        sentences.append("No phrase sets the two apart beyond chance.")
    return sentences


def print_diagnosis(result: Diagnosis) -> None:
    """The table and the sentences, on the terminal."""
    from rich.console import Console

    console = Console()
    table = Table(["", "real", "generated"], lines(result), notes=[])
    print_table(console, table, title=f"{result.differences.pairs} pairs")
    for sentence in verdict(result):
        console.print(sentence, soft_wrap=True, highlight=False)
