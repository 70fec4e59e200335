"""Which changes contradict what was made, for each kind of phase."""

import dataclasses
from typing import Any

import pytest

from megatron_spin.config import Config, from_dict
from megatron_spin.config.parsing import apply_override, flatten
from megatron_spin.config.resume import PHASES, USES, Use, changes, uses_of
from tests.support.configs import MINIMAL, build

START = {"prepare", "import", "evaluate:sft"}
FIRST = START | {"generate:0", "train:0", "export:0", "evaluate:0"}
BASELINE = FIRST | {"train:sft_continued", "evaluate:sft_continued"}
EVERYTHING = BASELINE | {f"{kind}:{t}" for t in range(1, 4) for kind in ("generate", "train", "export", "evaluate")}


def override(*overrides: str, **sections: Any) -> Config:
    raw: dict[str, Any] = {**MINIMAL, **sections}
    for text in overrides:
        apply_override(raw, text)
    return from_dict(raw)


def contradicted(old: Config, new: Config, made: set[str]) -> dict[str, str]:
    """The phase that each contradicting change contradicts."""
    return {change.key: change.phase for change in changes(old, new, made) if change.phase is not None}


@pytest.mark.parametrize(
    "change",
    [
        "name=other",
        "device=cpu",
        "spin.iterations=7",
        "training.checkpoint_every=3",
        "training.micro_batch_size=2",
        "parallel.tensor_model_parallel_size=2",
        "generation.vllm={seed: 1}",
        "evaluation.batch_size=5",
        "guards.length.action=off",
        "baselines={}",
        "baselines.more.steps=5",
    ],
)
def test_what_may_always_change(change: str) -> None:
    found = changes(build(), override(change), EVERYTHING)
    assert found
    assert [each.phase for each in found] == [None] * len(found)


@pytest.mark.parametrize(
    ("change", "key", "before", "phase"),
    [
        # (the change, its key, the phases with which it is harmless, the one that it contradicts)
        ("data.seed=5", "data.seed", set(), "prepare"),
        ("evaluation.num_prompts=5", "evaluation.num_prompts", set(), "prepare"),
        ("evaluation.likelihood={a: b}", "evaluation.likelihood.a", set(), "prepare"),
        ("training.objective=dpo", "training.objective", set(), "prepare"),
        ("layer_spec=local", "layer_spec", {"prepare"}, "import"),
        ("precision.dtype=fp32", "precision.dtype", {"prepare"}, "import"),
        ("model.make_vocab_size_divisible_by=8", "model.make_vocab_size_divisible_by", {"prepare"}, "import"),
        ("evaluation.patterns={a: b}", "evaluation.patterns.a", {"prepare", "import"}, "evaluate:sft"),
        ("evaluation.samples=3", "evaluation.samples", {"prepare", "import"}, "evaluate:sft"),
        ("generation.temperature=0.5", "generation.temperature", START, "generate:0"),
        ("generation.truncated=drop", "generation.truncated", START, "generate:0"),
        ("generation.shard_size=5", "generation.shard_size", START, "generate:0"),
        ("generation.max_new_tokens=[1024, 512]", "generation.max_new_tokens", FIRST, "generate:1"),
        ("generation.temperature=[1, 0.5]", "generation.temperature", FIRST, "generate:1"),
        ("generation.temperature=[1, 1, 0.5]", "generation.temperature", FIRST | {"generate:1"}, "generate:2"),
        ("spin.reuse_previous=false", "spin.reuse_previous", FIRST, "generate:1"),
        ("spin.beta=0.7", "spin.beta", START | {"generate:0"}, "train:0"),
        ("spin.beta=[0.1, 0.7]", "spin.beta", BASELINE, "train:1"),
        ("spin.parameters={alpha: 2}", "spin.parameters.alpha", START | {"generate:0"}, "train:0"),
        ("training.learning_rate=1.0e-3", "training.learning_rate", START | {"generate:0"}, "train:0"),
        ("training.learning_rate=[5.0e-7, 1.0e-3]", "training.learning_rate", BASELINE, "train:1"),
        ("training.steps=[null, 3]", "training.steps", FIRST, "train:1"),
        ("training.epochs=[2, 3]", "training.epochs", FIRST, "train:sft_continued"),
        ("training.global_batch_size=128", "training.global_batch_size", START | {"generate:0"}, "train:0"),
        ("training.global_batch_size=[64, 128]", "training.global_batch_size", FIRST, "train:1"),
        ("training.optimizer.clip_grad=9.0", "training.optimizer.clip_grad", START | {"generate:0"}, "train:0"),
        ("training.optimizer.clip_grad=9.0", "training.optimizer.clip_grad", START, "train:sft_continued"),
        ("baselines.sft_continued.steps=7", "baselines.sft_continued.steps", FIRST, "train:sft_continued"),
    ],
)
def test_a_change_is_harmless_until_a_phase_depends_on_it(change: str, key: str, before: set[str], phase: str) -> None:
    old, new = build(), override(change, baselines={"sft_continued": {}, "sft_continued_2x": {}})
    assert key in [each.key for each in changes(old, new, before)]
    assert contradicted(old, new, before) == {}
    assert contradicted(old, new, before | {phase})[key] == phase


def test_prepare_cuts_real_answers_by_the_longest_and_held_out_ones_by_the_first() -> None:
    old = build(generation={"max_new_tokens": [16, 32]})
    made = {"prepare"}
    assert contradicted(old, build(generation={"max_new_tokens": [16, 32, 8]}), made) == {}
    assert "generation.max_new_tokens" in contradicted(old, build(generation={"max_new_tokens": [16, 64]}), made)
    assert "generation.max_new_tokens" in contradicted(old, build(generation={"max_new_tokens": [8, 32]}), made)


def test_the_same_values_written_another_way_are_harmless() -> None:
    assert contradicted(build(), build(spin={"beta": [0.1, 0.1]}), EVERYTHING) == {}


def test_every_setting_is_in_the_table() -> None:
    """A new key must say which phases depend on it."""
    sections = {
        "model": {"hf": "m", "transformer": {"a": 1}},
        "generation": {"vllm": {"a": 1}},
        "evaluation": {"patterns": {"a": "b"}, "likelihood": {"a": "b"}},
        "spin": {"parameters": {"a": 1}},
        "parallel": {"ddp": {"a": 1}},
    }
    keys = flatten(dataclasses.asdict(build(**sections)))
    assert [key for key in keys if uses_of(key) == [Use(key, PHASES)]] == []


def test_the_table_names_settings_that_exist() -> None:
    keys = flatten(dataclasses.asdict(build()))
    for use in USES:
        assert any(key == use.key or key.startswith(f"{use.key}.") for key in keys), use.key
        assert set(use.phases) <= set(PHASES)


def test_an_unknown_key_counts_as_used_by_every_phase() -> None:
    assert uses_of("some.other_key") == [Use("some.other_key", PHASES)]
