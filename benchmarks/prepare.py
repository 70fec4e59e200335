"""Builds the benchmark's workload: a Llama of 12.6 million parameters, its tokenizer, and 320 preference pairs.

The prompts and chosen answers are the rows of --data; the rejected answer of a row is another row's answer, so that the
two are of similar length. Without --data the pairs are the quickstart's word problems, which are much shorter.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.workload import (
    Pair,
    Workload,
    model_directory,
    preferences_file,
    steps_file,
    workload_file,
    write_json,
)
from megatron_spin import cli
from megatron_spin.errors import DataError

DATA_VARIABLE = "SPIN_GSM8K"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the workload is; the defaults are the benchmark's, tests take smaller ones."""

    num_pairs: int = 320
    pairs_per_step: int = 8
    warmup_steps: int = 4
    measured_steps: int = 20
    max_prompt_length: int = 200
    max_answer_length: int = 180
    vocabulary: int = 4096
    layers: int = 6
    hidden: int = 384
    ffn: int = 1024
    heads: int = 6
    kv_heads: int = 2


@dataclasses.dataclass(frozen=True)
class Preference:
    """One pair as text."""

    prompt: str
    chosen: str
    rejected: str


def build(directory: Path, data: Path | None, sizes: Sizes) -> Workload:
    """Writes the workload into ``directory``, which appears complete or not at all.

    Raises:
        DataError: ``data`` cannot be read or has too few rows of the asked lengths.
    """
    from transformers import PreTrainedTokenizerFast

    preferences = word_problems() if data is None else shuffled_answers(data)
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(preferences, sizes.vocabulary), bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    tokenizer.save_pretrained(model_directory(unfinished))
    parameters = save_model(model_directory(unfinished), sizes, tokenizer)
    kept = fitting(preferences, tokenizer, sizes)
    if len(kept) < sizes.num_pairs:
        raise DataError(
            f"{data} has {len(kept)} rows with a prompt of at most {sizes.max_prompt_length} and answers of at most "
            f"{sizes.max_answer_length} tokens, but the benchmark needs {sizes.num_pairs}: give more data"
        )
    with open(preferences_file(unfinished), "w") as file:
        file.writelines(json.dumps(dataclasses.asdict(preference)) + "\n" for preference in kept)
    workload = Workload(
        source="the quickstart's word problems" if data is None else data.name,
        num_pairs=sizes.num_pairs,
        pairs_per_step=sizes.pairs_per_step,
        warmup_steps=sizes.warmup_steps,
        measured_steps=sizes.measured_steps,
        parameters=parameters,
        max_prompt_length=sizes.max_prompt_length,
        max_answer_length=sizes.max_answer_length,
    )
    write_steps(unfinished, workload)
    write_json(workload_file(unfinished), workload)
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.replace(directory)
    return workload


def shuffled_answers(data: Path) -> list[Preference]:
    """The rows of ``data``, each with another row's answer as the rejected one."""
    from megatron_spin.data.reading import read_source_rows

    samples = read_source_rows(data).rows
    rejected = [sample.answer for sample in samples]
    random.Random(0).shuffle(rejected)
    preferences = []
    for sample, answer in zip(samples, rejected, strict=True):
        if answer != sample.answer:
            preferences.append(Preference(sample.prompt, sample.answer, answer))
    return preferences


def word_problems() -> list[Preference]:
    """The quickstart's preferences: a careful answer and a careless one."""
    from examples.quickstart import make_problems

    rows = make_problems.make(0)["preferences.jsonl"]
    return [Preference(str(row["prompt"]), str(row["chosen"]), str(row["rejected"])) for row in rows]


def train_bpe(preferences: Sequence[Preference], vocabulary: int) -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer`` of at most ``vocabulary`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{preference.prompt}\n{preference.chosen}" for preference in preferences)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_model(directory: Path, sizes: Sizes, tokenizer: Any) -> int:
    """Writes an untrained Llama and returns how many parameters it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def fitting(preferences: Sequence[Preference], tokenizer: Any, sizes: Sizes) -> list[Preference]:
    """The first ``sizes.num_pairs`` preferences within the limits."""
    from megatron_spin.data.templates import INSTRUCTION

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    kept: list[Preference] = []
    for preference in preferences:
        prompt = length(INSTRUCTION.format(prompt=preference.prompt))
        answer = max(length(preference.chosen), length(preference.rejected))
        if prompt <= sizes.max_prompt_length and answer <= sizes.max_answer_length:
            kept.append(preference)
        if len(kept) == sizes.num_pairs:
            break
    return kept


def write_steps(directory: Path, workload: Workload) -> None:
    """Writes the pairs of each step as our own tools tokenize and draw them, for the other rows to do the same."""
    from megatron_spin.data.pairs import load_pairs
    from megatron_spin.data.sampler import BatchSampler

    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        ours.run_tool("prepare.py", *ours.settings(directory, workload), "--run-dir", scratch)
        pairs, _ = load_pairs(Path(scratch) / "iteration_0" / "pairs")
    sampler = BatchSampler(len(pairs), workload.pairs_per_step, seed=ours.SEED)
    with open(steps_file(directory), "w") as file:
        for step in range(workload.steps):
            drawn = [pairs[index] for index in sampler.batch(step)]
            chosen = [Pair(pair.prompt_ids, pair.real_ids, pair.generated_ids) for pair in drawn]
            file.write(json.dumps([dataclasses.asdict(pair) for pair in chosen]) + "\n")


def data_path(given: Path | None) -> Path | None:
    """``given``, or what the environment names, or None.

    Raises:
        DataError: the file does not exist.
    """
    named = os.environ.get(DATA_VARIABLE)
    path = given or (Path(named) if named else None)
    if path is not None and not path.is_file():
        raise DataError(f"{path} does not exist: give a file of questions and answers with --data or {DATA_VARIABLE}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=f"questions and answers (default: the file that {DATA_VARIABLE} names)",
    )
    arguments = parser.parse_args()
    workload = build(arguments.out, data_path(arguments.data), Sizes())
    print(f"{arguments.out}: {workload.num_pairs} pairs of {workload.source}, {workload.parameters:,} parameters")


if __name__ == "__main__":
    cli.run(main)
