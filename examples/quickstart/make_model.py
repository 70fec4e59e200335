"""Makes an untrained Llama and a tokenizer for it, as a Hugging Face directory in fp32.

Without ``--bpe`` the tokenizer has one token per word of ``--data`` and one per digit, and the model is tiny (90
thousand parameters). With ``--bpe N`` it is a byte-level BPE of N tokens trained on ``--data``, and the model is small
(1.4 million parameters).
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_spin import cli
from megatron_spin.data.reading import SourceRow, read_source_rows
from megatron_spin.data.templates import INSTRUCTION
from megatron_spin.errors import DataError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # vLLM's attention on a CPU takes head sizes from 32 on
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def word_tokenizer(texts: Iterator[str]) -> Any:
    """A ``tokenizers.Tokenizer`` of the words in ``texts``. Each digit is a token; decoding joins them to numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)])
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)} | set("0123456789")
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    # Spaces between all tokens, then none between digits.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])"), ""),
        ]
    )
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    return tokenizer


def bpe_tokenizer(texts: Iterator[str], size: int) -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer`` of ``size`` tokens, fewer for a short text; each digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path, *, positions: int) -> tuple[int, int, int]:
    """Writes the tokenizer for transformers; returns its size and the ids of the pad and end tokens."""
    from transformers import PreTrainedTokenizerFast

    unknown = {"unk_token": UNKNOWN} if tokenizer.token_to_id(UNKNOWN) is not None else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        **unknown,
    )
    fast.save_pretrained(directory)
    return len(fast), int(fast.pad_token_id), int(fast.eos_token_id)


def save_model(directory: Path, settings: dict[str, int], *, vocabulary: int, pad: int, eos: int, seed: int) -> int:
    """Writes an untrained Llama with tied embeddings; returns its number of parameters."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, rms_norm_eps=1e-5, **settings, **ids)
    model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config = GenerationConfig(do_sample=True, **ids)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def texts(rows: Sequence[SourceRow], template: str) -> Iterator[str]:
    """The texts that train the tokenizer. ``template`` is put around the prompts, so that it takes few tokens."""
    for row in rows:
        yield template.format(prompt=row.prompt if row.system is None else f"{row.system}\n\n{row.prompt}")
        yield row.answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="SFT data (JSONL, JSON or Parquet)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    parser.add_argument(
        "--bpe", type=int, metavar="N", help="byte-level BPE of N tokens and a small model, not words and a tiny one"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    if arguments.bpe is not None and arguments.bpe < 300:
        parser.error(f"--bpe {arguments.bpe} is too small: the 256 bytes and two special tokens need at least 300")
    if (arguments.out / "config.json").exists():
        print(f"{arguments.out} is already there")
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    rows = read_source_rows(arguments.data).rows
    if not rows:
        raise DataError(f"{arguments.data} has no row with a prompt and an answer: check the file")

    settings = TINY if arguments.bpe is None else SMALL
    tokenizer = (
        word_tokenizer(texts(rows, "{prompt}"))
        if arguments.bpe is None
        else bpe_tokenizer(texts(rows, INSTRUCTION), arguments.bpe)
    )
    unfinished = arguments.out.with_name(f".{arguments.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    size, pad, eos = save_tokenizer(tokenizer, unfinished, positions=settings["max_position_embeddings"])
    parameters = save_model(unfinished, settings, vocabulary=size, pad=pad, eos=eos, seed=arguments.seed)
    unfinished.replace(arguments.out)
    print(f"{arguments.out}: an untrained Llama of {parameters:,} parameters, {size} tokens")


if __name__ == "__main__":
    cli.run(main)
