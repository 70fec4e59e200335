"""The configuration: what it takes, what it refuses and with which words, overrides, the round trip, what may change on resume."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_spin.config import (
    BaselineConfig,
    Config,
    at_iteration,
    changes_forbidden,
    from_dict,
    load_config,
    to_yaml,
)
from megatron_spin.errors import ConfigError
from megatron_spin.run.directory import RunDir
from megatron_spin.spin.objective import num_iterations

MINIMAL: dict[str, Any] = {"name": "run", "model": {"hf": "model"}, "data": {"path": "data.jsonl"}}


def build(**sections: Any) -> Config:
    return from_dict({**MINIMAL, **sections})


def write(directory: Path, value: object) -> Path:
    path = directory / "config.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def refused(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    config = build()
    assert (
        config.spin.iterations == 4 and config.generation.engine == "vllm" and config.precision.export_dtype == "bf16"
    )
    assert set(config.baselines) == {"sft_continued", "sft_continued_2x"}
    assert config.data.prompt_limit == 1024


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"spin": {"betta": 0.1}}, "unknown config key spin.betta: did you mean spin.beta?"),
        ({"modle": {}}, "unknown config key modle: did you mean model?"),
        ({"training": {"learning_rat": 1}}, "did you mean training.learning_rate?"),
        ({"data": {"path": "d", "zzz": 1}}, "unknown config key data.zzz: known keys: path,"),
        ({"baselines": {"more": {"step": 3}}}, "did you mean baselines.more.steps?"),
    ],
)
def test_unknown_keys_name_the_nearest(sections, message) -> None:
    assert message in refused(**sections)


@pytest.mark.parametrize(("missing", "key"), [("name", "name"), ("model", "model"), ("data", "data")])
def test_missing_sections(missing, key) -> None:
    with pytest.raises(ConfigError, match=f"config key {key} is missing"):
        from_dict({name: value for name, value in MINIMAL.items() if name != missing})


def test_missing_key_within_a_section() -> None:
    assert "config key model.hf is missing" in refused(model={})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"spin": {"beta": "much"}}, "spin.beta: 'much' is not a number"),
        ({"spin": {"iterations": 2.5}}, "spin.iterations: 2.5 is not an integer"),
        ({"spin": {"iterations": True}}, "spin.iterations: True is not an integer"),
        ({"spin": {"reuse_previous": "yes please"}}, "is not true or false"),
        ({"spin": {"loss": "logistik"}}, "is not one of logistic, hinge, exponential, correlation"),
        ({"spin": {"beta": []}}, "spin.beta: [] is not"),
        ({"spin": {"beta": [0.1, "x"]}}, "spin.beta"),
        ({"spin": 3}, "spin: 3 is not a section with keys"),
        ({"model": {"hf": "m", "transformer": [1]}}, "model.transformer: [1] is not a mapping"),
        ({"precision": {"dtype": "fp16"}}, "is not one of fp32, bf16"),
        ({"baselines": {"more": {"steps": "some"}}}, "baselines.more.steps"),
    ],
)
def test_wrong_types_name_the_key_and_the_value(sections, message) -> None:
    assert message in refused(**sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"learning_rate": [1e-4, 0]}}, "training.learning_rate=0.0 must be greater than 0"),
        ({"spin": {"beta": -0.1}}, "spin.beta=-0.1 must be greater than 0"),
        ({"spin": {"sft_weight": [0, -1]}}, "spin.sft_weight=-1.0 must not be negative"),
        ({"generation": {"temperature": 0}}, "generation.temperature=0.0 must be greater than 0"),
        ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens=0"),
        ({"training": {"warmup_fraction": 1.5}}, "training.warmup_fraction=1.5 must lie between 0 and 1"),
        ({"evaluation": {"held_out_fraction": 1.0}}, "evaluation.held_out_fraction=1.0"),
        ({"training": {"global_batch_size": 10, "micro_batch_size": 4}}, "global_batch_size=10 is not a multiple of"),
        ({"data": {"path": "d", "max_length": 8, "max_prompt_length": 8}}, "data.max_prompt_length=8 leaves no room"),
        (
            {"training": {"objective": "ppo"}},
            "training.objective='ppo' is neither one of spin, dpo, sft nor package.module:Class",
        ),
        ({"parallel": {"context_parallel_size": 2}}, "parallel.context_parallel_size=2"),
        ({"parallel": {"sequence_parallel": True}}, "needs parallel.tensor_model_parallel_size > 1"),
        ({"parallel": {"tensor_model_parallel_size": 3, "nproc_per_node": 2}}, "parallel.nproc_per_node=2"),
        ({"evaluation": {"answer_pattern": "("}}, "is not a regular expression"),
        ({"evaluation": {"answer_pattern": "answer"}}, "has 0 groups: it needs exactly one"),
        ({"evaluation": {"patterns": {"bad": "["}}}, "evaluation pattern bad='['"),
        ({"baselines": {"sft": {}}}, "baselines.sft"),
        ({"baselines": {"a/b": {}}}, "baselines.a/b"),
    ],
)
def test_values_out_of_range(sections, message) -> None:
    assert message in refused(**sections)


def test_exponents_without_a_dot_are_numbers(tmp_path) -> None:
    path = write(
        tmp_path,
        "name: a\nmodel: {hf: m}\ndata: {path: d}\ntraining: {learning_rate: [5e-7, 1E-6, -0 ]}\n".replace(", -0 ", ""),
    )
    assert load_config(path).training.learning_rate == [5e-7, 1e-6]


def test_overrides(tmp_path) -> None:
    path = write(tmp_path, {**MINIMAL, "spin": {"beta": 0.1}})
    overrides = [
        "spin.beta=[0.2, 5e-1]",
        "data.path=other.jsonl",
        "training.optimizer.clip_grad=2.0",
        "evaluation.patterns.guess=I guess",
    ]
    config = load_config(path, [*overrides, "name=b"])
    assert config.spin.beta == [0.2, 0.5] and config.data.path == "other.jsonl" and config.name == "b"
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
def test_bad_overrides(tmp_path, override, message) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1\n", "holds no mapping"), ("", "holds no mapping")]
)
def test_bad_files(tmp_path, text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_yaml_round_trip(tmp_path) -> None:
    config = build(
        spin={"beta": [0.1, 5.0], "iterations": 2},
        training={"learning_rate": 5e-7, "steps": [None, 3], "optimizer": {"adam_beta2": 0.95}},
        generation={"vllm": {"tensor_parallel_size": 2}, "max_new_tokens": [8, 16]},
        evaluation={"answer_pattern": r"#### (\S+)", "patterns": {"ä": "“quoted”"}},
        baselines={"more": {"steps": 7, "learning_rate": 1e-3}},
    )
    text = to_yaml(config)
    again = load_config(write(tmp_path, text))
    assert again == config and to_yaml(again) == text
    assert again.baselines == {"more": BaselineConfig(7, 1e-3)}


def test_values_by_iteration() -> None:
    assert [at_iteration([1, 2], t) for t in range(4)] == [1, 2, 2, 2]
    assert at_iteration(3, 5) == 3


def test_sft_and_dpo_are_one_iteration() -> None:
    assert num_iterations(build(training={"objective": "sft"})) == 1
    assert num_iterations(build(training={"objective": "dpo"})) == 1
    assert num_iterations(build(spin={"iterations": 3})) == 3


def test_a_users_own_objective_and_its_parameters() -> None:
    config = build(training={"objective": "my.objectives:Space"}, spin={"parameters": {"alpha": [0.1, 0.2], "eta": 1}})
    assert config.training.objective == "my.objectives:Space"
    assert config.spin.parameters == {"alpha": [0.1, 0.2], "eta": 1}


RESUMABLE_CHANGES = {
    "name=other": [],
    "spin.iterations=7": [],
    "training.checkpoint_every=3": [],
    "parallel.tensor_model_parallel_size=2": [],
    "evaluation.batch_size=5": [],
    "baselines={}": [],
    "spin.beta=0.7": ["spin.beta"],
    "data.seed=5": ["data.seed"],
    "training.optimizer.clip_grad=9.0": ["training.optimizer.clip_grad"],
    "evaluation.patterns={a: b}": ["evaluation.patterns"],
    "training.global_batch_size=128": ["training.global_batch_size"],
}


@pytest.mark.parametrize(("override", "forbidden"), RESUMABLE_CHANGES.items())
def test_what_may_change_when_a_run_is_opened_again(tmp_path, override, forbidden) -> None:
    path = write(tmp_path, MINIMAL)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(load_config(path)))
    differing = changes_forbidden(resolved, load_config(path, [override]))
    assert bool(differing) == bool(forbidden)
    assert all(any(key == name or key.startswith(f"{name}.") for name in forbidden) for key in differing)


def test_a_run_directory_takes_over_what_may_change_and_refuses_the_rest(tmp_path) -> None:
    config = build()
    run = RunDir(tmp_path / "run")
    run.open(config)
    longer = dataclasses.replace(config, spin=dataclasses.replace(config.spin, iterations=6))
    run.open(longer)
    assert load_config(run.config).spin.iterations == 6
    before = run.config.read_bytes()
    with pytest.raises(Exception, match=r"other values of data\.seed: restore them or choose another --run-dir"):
        run.open(dataclasses.replace(longer, data=dataclasses.replace(config.data, seed=9)))
    assert run.config.read_bytes() == before
