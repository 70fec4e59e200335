"""Token log-probs of Llama and Mistral against transformers in fp32; models and providers that are refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_spin.errors import CheckpointError, ConfigError
from megatron_spin.parallel.dims import ParallelDims
from tests.support.tiny import tiny_model
from tests.support.world import RankError, World

VOCABULARY = 101  # needs padding
LENGTH = 40  # beyond Mistral's window
MODELS: dict[str, dict[str, Any]] = {
    "llama_tied": {"family": "llama", "tied": True, "heads": 4, "kv_heads": 2},
    "llama_untied": {"family": "llama", "tied": False, "heads": 4, "kv_heads": 4},
    "mistral": {"family": "mistral", "tied": False, "heads": 4, "kv_heads": 2, "sliding_window": 7},
    "mistral_without_window": {"family": "mistral", "tied": False, "heads": 4, "kv_heads": 1, "sliding_window": None},
}
ROPE = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World(1)
    yield world
    world.close()


def build(hf: Path, **sections: Any) -> tuple[Any, ParallelDims]:
    """(model, dims) with the weights of ``hf``."""
    from megatron_spin.parallel.setup import choose_device, initialize
    from tests.support.ranks import tiny_config

    config = tiny_config(hf, **sections)
    device = choose_device(config.device)
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.models.provider import build_model

    dims = initialize(config.parallel, device)
    model = build_model(config, dims)
    load_hf(model, hf, dims)
    return model[0], dims


def token_logps(
    hf: Path, input_ids: np.ndarray, labels: np.ndarray, sections: dict[str, Any] | None = None
) -> np.ndarray:
    """-``forward(labels=)`` of a single process, [b, s]."""
    model, _ = build(hf, **(sections or {}))
    from megatron_spin.parallel.cpu_device import megatron_region

    ids = torch.from_numpy(input_ids)
    with megatron_region(), torch.no_grad():
        losses = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None, labels=torch.from_numpy(labels))
    assert losses.dtype == torch.float32
    return (-losses).numpy()


def build_error(hf: Path, sections: dict[str, Any] | None = None) -> str:
    try:
        build(hf, **(sections or {}))
    except (ConfigError, CheckpointError) as error:
        return str(error)
    return ""


def expected_logps(
    hf: Path, input_ids: np.ndarray, labels: np.ndarray, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)
    with torch.no_grad():
        logps = model(torch.from_numpy(input_ids)).logits.float().log_softmax(-1)
    return logps.gather(-1, torch.from_numpy(labels)[..., None])[..., 0].numpy()


def batch(count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, LENGTH + 1))
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def change_config(hf: Path, **changes: Any) -> Path:
    path = hf / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return hf


@pytest.mark.parametrize("name", MODELS)
def test_token_logps_equal_transformers(world: World, tmp_path: Path, name: str) -> None:
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False, **MODELS[name])
    input_ids, labels = batch()
    [actual] = world.run(token_logps, tmp_path, input_ids, labels)
    assert distance(actual, expected_logps(tmp_path, input_ids, labels)) < 1e-5


def test_the_window_is_exactly_that_of_transformers(world: World, tmp_path: Path) -> None:
    """One position more or less would show: it is far from rounding."""
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False, **MODELS["mistral"])
    input_ids, labels = batch()
    [actual] = world.run(token_logps, tmp_path, input_ids, labels)
    for window in (6, 8, None):
        change_config(tmp_path, sliding_window=window)
        assert distance(actual, expected_logps(tmp_path, input_ids, labels)) > 1e-3, window


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("old_names", [False, True])
def test_rope_settings_under_both_names(world: World, tmp_path: Path, rope: str, old_names: bool) -> None:
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False, **MODELS["llama_untied"])
    settings = ROPE[rope]
    if old_names:  # as transformers 4 wrote them
        raw = json.loads((tmp_path / "config.json").read_text())
        raw.pop("rope_parameters", None)
        scaling = {key: value for key, value in settings.items() if key != "rope_theta"}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        change_config(tmp_path, rope_theta=settings["rope_theta"], rope_scaling=None if rope == "theta" else scaling)
    else:
        change_config(tmp_path, rope_parameters=settings)
    input_ids, labels = batch()
    [actual] = world.run(token_logps, tmp_path, input_ids, labels)
    assert distance(actual, expected_logps(tmp_path, input_ids, labels)) < 1e-5
    change_config(
        tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_theta=10000.0, rope_scaling=None
    )
    assert distance(actual, expected_logps(tmp_path, input_ids, labels)) > 1e-4, (
        "this compares nothing: the setting does not matter"
    )


def test_head_size_of_its_own(world: World, tmp_path: Path) -> None:
    """As Mistral Nemo: heads times head size is not the hidden size."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=None,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    MistralForCausalLM(settings).save_pretrained(tmp_path)
    input_ids, labels = batch()
    [actual] = world.run(token_logps, tmp_path, input_ids, labels)
    assert distance(actual, expected_logps(tmp_path, input_ids, labels)) < 1e-5


def test_bf16_agrees_within_its_precision(world: World, tmp_path: Path) -> None:
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False, **MODELS["mistral"])
    input_ids, labels = batch()
    [actual] = world.run(token_logps, tmp_path, input_ids, labels, {"precision": {"dtype": "bf16"}})
    assert distance(actual, expected_logps(tmp_path, input_ids, labels)) < 3e-2


def probabilities_sum(hf: Path, input_ids: np.ndarray) -> float:
    """The largest distance from 1 of a position's probabilities of all real tokens."""
    repeated = np.repeat(input_ids[:1], VOCABULARY, axis=0)
    labels = np.repeat(np.arange(VOCABULARY)[:, None], input_ids.shape[1], axis=1)
    return float(np.abs(np.exp(token_logps(hf, repeated, labels)).sum(axis=0) - 1).max())


def test_padding_takes_no_probability(world: World, tmp_path: Path) -> None:
    """101 real tokens of 104 rows: their probabilities alone sum to 1."""
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False, **MODELS["llama_tied"])
    [worst] = world.run(probabilities_sum, tmp_path, batch(1)[0])
    assert worst < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' in config.json is none of llama, mistral"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "RoPE scaling 'yarn' is not supported",
        ),
        (
            {"rope_parameters": {**ROPE["llama3"], "low_freq_factor": 2.0}},
            "low_freq_factor=2.0: Megatron computes llama3 scaling with 1.0 only",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
    ],
)
def test_what_megatron_would_leave_out_is_refused(
    world: World, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False)
    [error] = world.run(build_error, change_config(tmp_path, **changes))
    assert_matches(error, message)


def test_a_mistral_that_does_not_say_its_window_is_refused(world: World, tmp_path: Path) -> None:
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False, family="mistral")
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    [error] = world.run(build_error, tmp_path)
    assert_matches(error, "config.json lacks sliding_window")


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        ({"layernorm_epsilom": 1e-5}, "layernorm_epsilom is not a field .* did you mean layernorm_epsilon"),
        ({"params_dtype": "bf16"}, "params_dtype='bf16' must not be set there: set precision.dtype"),
        ({"fp8": "hybrid"}, "fp8='hybrid' must not be set there: set precision.fp8"),
        ({"deterministic_mode": True}, "must not be set there: set training.deterministic"),
        ({"sequence_parallel": True}, "set parallel.sequence_parallel"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 must not be set"),
        ({"init_model_with_meta_device": True}, "must not be set: weights are loaded into parameters that have memory"),
        ({"num_moe_experts": 0}, "TransformerConfig refuses it"),
        ({"softmax_type": "off-by-one"}, "attention computes softmax_type='vanilla' only, not 'off-by-one'"),
    ],
)
def test_transformer_fields_that_cannot_be(
    world: World, tmp_path: Path, transformer: dict[str, Any], message: str
) -> None:
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False)
    [error] = world.run(build_error, tmp_path, {"model": {"transformer": transformer}})
    assert_matches(error, message)


def test_a_known_transformer_field_is_taken(world: World, tmp_path: Path) -> None:
    tiny_model(tmp_path, vocabulary=VOCABULARY, tokenizer=False, **MODELS["llama_tied"])
    input_ids, labels = batch()
    [plain] = world.run(token_logps, tmp_path, input_ids, labels)
    [changed] = world.run(
        token_logps, tmp_path, input_ids, labels, {"model": {"transformer": {"layernorm_epsilon": 0.1}}}
    )
    assert distance(changed, plain) > 1e-3


def test_a_kind_of_layer_that_the_fields_ask_for_is_built(world: World, tmp_path: Path) -> None:
    """The norms of queries and keys exist, so a family without rules for them cannot lose them without a word."""
    tiny_model(tmp_path, tokenizer=False)
    [error] = world.run(build_error, tmp_path, {"model": {"transformer": {"qk_layernorm": True}}})
    assert_matches(error, r"self_attention\.[qk]_layernorm\.weight has no Hugging Face counterpart in family llama")


def dropout_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    """A user's provider that leaves Megatron's default dropout of 0.1 in place."""
    from examples.providers.plain_gpt import model_provider

    model = model_provider(pre_process, post_process, vp_stage)
    model.config.hidden_dropout = 0.1
    return model


not_a_function = 3


@pytest.mark.parametrize(
    ("provider", "sections", "message"),
    [
        ("plain_gpt", {}, "is not package.module:function"),
        ("no_such_package:model_provider", {}, "cannot be imported"),
        ("examples.providers.plain_gpt:missing", {}, "module examples.providers.plain_gpt has no missing"),
        (f"{__name__}:not_a_function", {}, "is not a function"),
        (f"{__name__}:dropout_provider", {}, "sets hidden_dropout=0.1: it must be 0"),
        (
            "examples.providers.plain_gpt:model_provider",
            {"precision": {"dtype": "bf16"}},
            "has bf16=False, but precision asks for True",
        ),
    ],
)
def test_providers_that_cannot_be(
    world: World, tmp_path: Path, provider: str, sections: dict[str, Any], message: str
) -> None:
    tiny_model(tmp_path, tokenizer=False)
    [error] = world.run(build_error, tmp_path, {"model": {"provider": provider}, **sections})
    assert_matches(error, message)


def padded_sizes(cases: list[tuple[int, int, int]]) -> list[int]:
    from megatron_spin.parallel.setup import choose_device

    choose_device("cpu")
    from megatron_spin.models.gpt import padded_vocab_size

    return [padded_vocab_size(size, divisible_by=divisible_by, tensor_parallel=tp) for size, divisible_by, tp in cases]


def test_padded_vocabulary_is_megatrons(world: World) -> None:
    """As Megatron-LM's ``_vocab_size_with_padding``: GPT-2's 50257 is its own example."""
    cases = [(50257, 128, 1), (50257, 128, 8), (32000, 128, 4), (32001, 128, 2), (83, 8, 2), (128, 128, 1)]
    [sizes] = world.run(padded_sizes, cases)
    assert sizes == [50304, 51200, 32256, 32256, 96, 128]


def test_a_failure_in_a_rank_shows_its_traceback(world: World) -> None:
    with pytest.raises(RankError, match="ZeroDivisionError"):
        world.run(divmod, 1, 0)


def assert_matches(text: str, pattern: str) -> None:
    import re

    assert re.search(pattern, text), text
