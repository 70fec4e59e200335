"""Models and tokenizers that are real in every part and small enough for a test, built from a seed."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BOS, EOS, UNK, END_OF_TURN = "<s>", "</s>", "<unk>", "<|end|>"
SPECIAL = (UNK, BOS, EOS, END_OF_TURN)
TEMPLATE_WORDS = ("###", "Instruction:", "Response:", "user", "assistant", ":")
WORDS = tuple(f"w{i}" for i in range(90))
VOCABULARY = len(SPECIAL) + len(TEMPLATE_WORDS) + len(WORDS)
"""100 tokens: 4 special ones, 6 of the templates and the words w0 to w89."""
CHAT_TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{{ message['role'] }} : {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_tokenizer(
    directory: Path, *, bos: bool = True, eos: bool = True, chat: bool = True
) -> PreTrainedTokenizerFast:
    """Writes a word-level tokenizer of :data:`VOCABULARY` tokens into ``directory``.

    Args:
        bos: it begins every text with ``<s>``, as Llama's does.
        eos: it names ``</s>`` as its end token; the word is in the vocabulary either way.
        chat: it has a chat template, whose turns end with ``<|end|>``.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *TEMPLATE_WORDS, *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    if bos:
        backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    names = {"unk_token": UNK, "bos_token": BOS} | ({"eos_token": EOS} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=[END_OF_TURN], **names)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return tokenizer


def tiny_model(
    directory: Path,
    *,
    family: str = "llama",
    tied: bool = True,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 2,
    kv_heads: int | None = None,
    ffn: int = 128,
    vocabulary: int = VOCABULARY,
    sliding_window: int | None = None,
    max_positions: int = 256,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.15,
    seed: int = 0,
    tokenizer: bool = True,
) -> PreTrainedModel:
    """Writes a randomly initialised model (safetensors, config, generation config, tokenizer) into ``directory`` and
    returns it.

    Args:
        family: ``llama`` or ``mistral`` (which alone takes ``sliding_window``).
        hidden, heads: their quotient is the head size; vLLM on a CPU wants 32, 64, 80 ...
        scale: standard deviation of the weights; far above the usual 0.02, so that next-token distributions differ
            from each other and greedy decoding does not depend on rounding.
        tokenizer: also writes :func:`tiny_tokenizer`, whose ids need ``vocabulary >= 100``.
    """
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "initializer_range": scale,
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": SPECIAL.index(EOS),
        "pad_token_id": None,
        "rms_norm_eps": 1e-5,
    }
    model: PreTrainedModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**settings))
        elif family == "mistral":
            model = MistralForCausalLM(MistralConfig(**settings, sliding_window=sliding_window))
        else:
            raise ValueError(f"family={family!r} is neither 'llama' nor 'mistral'")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):  # ones would hide a norm that is mapped to the wrong place
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(dtype).eval()
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    if tokenizer:
        tiny_tokenizer(directory)
    return model


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """Writes one JSON value a line; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_rows(count: int, *, seed: int = 0, prompt_words: int = 6, answer_words: int = 8) -> list[dict[str, str]]:
    """``count`` different prompt/response rows of the tokenizer's words; lengths vary from 1 up to the given number
    of words.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))

    # Two leading words count the rows, so that no prompt comes twice.
    return [
        {
            "prompt": f"{WORDS[i // len(WORDS) % len(WORDS)]} {WORDS[i % len(WORDS)]} {text(prompt_words)}",
            "response": text(answer_words),
        }
        for i in range(count)
    ]


def fine_tune(
    directory: Path, rows: Sequence[dict[str, str]], *, steps: int, rate: float = 3e-3, batch: int = 64
) -> float:
    """Trains the model in ``directory`` on ``rows`` (prompt, then response and ``</s>``) in place; returns the last
    loss, nats per token.
    """
    torch.set_num_threads(1)  # a model this small gains nothing from more, and loses much on a busy machine
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    pairs = [
        (
            tokenizer(row["prompt"])["input_ids"],
            [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        )
        for row in rows
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, labels = torch.zeros(len(pairs), length, dtype=torch.long), torch.full((len(pairs), length), -100)
    for i, (prompt, answer) in enumerate(pairs):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        chosen = torch.randperm(len(pairs), generator=generator)[:batch]
        loss = model(input_ids=ids[chosen], labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(directory)
    return loss.item()
