"""Plain data into the annotated types of the sections."""

import dataclasses
from typing import Annotated, Any

import pytest

from megatron_spin.config import from_dict
from megatron_spin.config.parsing import parse
from megatron_spin.config.values import MergedOver, PerIteration, Positive, Range
from megatron_spin.errors import ConfigError
from tests.support.configs import MINIMAL, build


def refused(**sections: Any) -> str:
    """The one line that refuses ``sections``."""
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
def test_unknown_keys_name_the_nearest(sections: dict[str, Any], message: str) -> None:
    assert message in refused(**sections)


@pytest.mark.parametrize(("missing", "key"), [("name", "name"), ("model", "model"), ("data", "data")])
def test_missing_sections(missing: str, key: str) -> None:
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
        ({"spin": {"beta": [0.1, "x"]}}, "spin.beta[1]: 'x' is not a number"),
        ({"spin": 3}, "spin: 3 is not a section with keys"),
        ({"model": {"hf": "m", "transformer": [1]}}, "model.transformer: [1] is not a mapping"),
        ({"precision": {"dtype": "fp16"}}, "is not one of fp32, bf16"),
        ({"baselines": {"more": {"steps": "some"}}}, "baselines.more.steps"),
    ],
)
def test_wrong_types_name_the_key_and_the_value(sections: dict[str, Any], message: str) -> None:
    assert message in refused(**sections)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: Annotated[int, Positive] = 1


@dataclasses.dataclass(frozen=True)
class Section:
    rate: Annotated[PerIteration[float], Range(low=0, high=1, below_high=True)] = 0.5
    count: Annotated[int | None, Positive] = None
    steps: Annotated[int | str, Positive] = "all"
    inner: Inner | str = "none"
    options: Annotated[dict[str, Any], MergedOver({"a": 1})] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rate": 1}, "s.rate=1.0 must lie between 0 and 1, 1 excluded"),
        ({"rate": [0.1, -0.5]}, "s.rate=-0.5 must lie between"),
        ({"rate": float("nan")}, "s.rate=nan must lie between"),
        ({"count": 0}, "s.count=0 must be greater than 0"),
        ({"steps": -1}, "s.steps=-1 must be greater than 0"),
        ({"inner": {"size": 0}}, "s.inner.size=0 must be greater than 0"),
        ({"inner": {"sise": 1}}, "unknown config key s.inner.sise: did you mean s.inner.size?"),
        ({"inner": 3}, "s.inner: 3 is not"),
    ],
)
def test_ranges_and_members_of_unions(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Section, value, "s")
    assert message in str(caught.value)


def test_values_in_range_and_null_and_words_pass() -> None:
    value = {"rate": [0, 0.99], "count": None, "steps": "some", "inner": {"size": 2}, "options": {"b": 2}}
    assert parse(Section, value, "s") == Section([0.0, 0.99], None, "some", Inner(2), {"a": 1, "b": 2})
