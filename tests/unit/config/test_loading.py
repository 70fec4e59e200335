"""From YAML and overrides to a configuration, and back."""

from pathlib import Path

import pytest

from megatron_spin.config import BaselineConfig, load_config, to_yaml
from megatron_spin.config.training import DEFAULT_OPTIMIZER
from megatron_spin.errors import ConfigError
from megatron_spin.spin.objective import num_iterations
from tests.support.configs import MINIMAL, build, write_yaml


def test_defaults() -> None:
    config = build()
    assert config.spin.iterations == 4
    assert config.generation.engine == "vllm"
    assert config.precision.export_dtype == "bf16"
    assert set(config.baselines) == {"sft_continued", "sft_continued_2x"}
    assert config.data.prompt_limit == 1024


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "name: a\nmodel: {hf: m}\ndata: {path: d}\ntraining: {learning_rate: [5e-7, 1E-6]}\n")
    assert load_config(path).training.learning_rate == [5e-7, 1e-6]


def test_overrides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, {**MINIMAL, "spin": {"beta": 0.1}})
    overrides = [
        "spin.beta=[0.2, 5e-1]",
        "data.path=other.jsonl",
        "training.optimizer.clip_grad=2.0",
        "evaluation.patterns.guess=I guess",
    ]
    config = load_config(path, [*overrides, "name=b"])
    assert config.spin.beta == [0.2, 0.5]
    assert config.data.path == "other.jsonl"
    assert config.name == "b"
    assert config.training.optimizer == {"optimizer": "adam", "clip_grad": 2.0, "weight_decay": 0.0}
    assert config.evaluation.patterns == {"guess": "I guess"}
    assert load_config(path, ["baselines={}"]).baselines == {}
    assert load_config(path).spin.beta == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("spin.beta", "is not key=value"),
        ("=1", "is not key=value"),
        ("name.x=1", "which is not a section"),
        ("spin.bta=1", "did you mean spin.beta?"),
        ("spin.beta=[", "override"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_yaml(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1\n", "holds no mapping"), ("", "holds no mapping")]
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_yaml(tmp_path, text))
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = build(
        spin={"beta": [0.1, 5.0], "iterations": 2},
        training={"learning_rate": 5e-7, "steps": [None, 3], "optimizer": {"adam_beta2": 0.95}},
        generation={"vllm": {"tensor_parallel_size": 2}, "max_new_tokens": [8, 16]},
        evaluation={"answer_pattern": r"#### (\S+)", "patterns": {"ä": "“quoted”"}},
        baselines={"more": {"steps": 7, "learning_rate": 1e-3}},
    )
    text = to_yaml(config)
    again = load_config(write_yaml(tmp_path, text))
    assert again == config
    assert to_yaml(again) == text
    assert again.baselines == {"more": BaselineConfig(7, 1e-3)}


def test_optimizer_keys_are_merged_over_the_default() -> None:
    assert build().training.optimizer == DEFAULT_OPTIMIZER
    assert build(training={"optimizer": {"optimizer": "sgd"}}).training.optimizer == {
        **DEFAULT_OPTIMIZER,
        "optimizer": "sgd",
    }


def test_data_files() -> None:
    assert build().data_files == {"data.path": "data.jsonl"}
    more = build(evaluation={"path": "e.jsonl", "likelihood": {"code": "c.jsonl"}})
    assert more.data_files == {
        "data.path": "data.jsonl",
        "evaluation.path": "e.jsonl",
        "evaluation.likelihood.code": "c.jsonl",
    }


def test_sft_and_dpo_are_one_iteration() -> None:
    assert num_iterations(build(training={"objective": "sft"})) == 1
    assert num_iterations(build(training={"objective": "dpo"})) == 1
    assert num_iterations(build(spin={"iterations": 3})) == 3


def test_a_users_own_objective_and_its_parameters() -> None:
    config = build(training={"objective": "my.objectives:Space"}, spin={"parameters": {"alpha": [0.1, 0.2], "eta": 1}})
    assert config.training.objective == "my.objectives:Space"
    assert config.spin.parameters == {"alpha": [0.1, 0.2], "eta": 1}
