"""How an objective is found, checked and given its parameters."""

import dataclasses
import math
import re
import subprocess
import sys
import types
from typing import Annotated, Any, ClassVar

import pytest
import torch
import yaml

from megatron_spin.config import Config, from_dict
from megatron_spin.config.training import OBJECTIVES as NAMES
from megatron_spin.config.values import Positive
from megatron_spin.errors import ConfigError
from megatron_spin.spin.objective import (
    OBJECTIVES,
    AnswerLogps,
    Objective,
    Outcome,
    build_objective,
    num_iterations,
    objective_class,
)
from megatron_spin.spin.pairwise import Dpo, Spin
from megatron_spin.spin.sft import Sft
from tests.support.runs import REPOSITORY

HERE = "tests.unit.spin.test_objective"


@dataclasses.dataclass(frozen=True)
class Own(Objective):
    """A user's objective: ``beta`` has a key under ``spin``, ``mu`` and ``nu`` have none."""

    label: ClassVar[str] = "OWN"
    task: ClassVar[str] = "something new"
    answers: ClassVar[tuple[str, ...]] = ("real", "generated", "initial")

    mu: float
    beta: float = 0.5
    nu: Annotated[int, Positive] = 3

    def __post_init__(self) -> None:
        if self.mu > 100:
            raise ValueError("mu must not be above 100")

    def __call__(self, logps: AnswerLogps) -> Outcome:
        return Outcome(-self.mu * logps.policy[:, 0])


class Unrelated:
    """Not an objective."""


class Unnamed(Objective):
    label = "UNNAMED"


class Abstract(Objective):
    label = "ABSTRACT"
    task = "nothing"


@dataclasses.dataclass(frozen=True)
class NoReal(Own):
    answers: ClassVar[tuple[str, ...]] = ("generated", "real")


@dataclasses.dataclass(frozen=True)
class Unknown(Own):
    answers: ClassVar[tuple[str, ...]] = ("real", "generated", "best")


@dataclasses.dataclass(frozen=True)
class InitialWithoutGenerating(Own):
    answers: ClassVar[tuple[str, ...]] = ("real", "initial")
    generates: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class GeneratesForNothing(Own):
    answers: ClassVar[tuple[str, ...]] = ("real", "initial")


@dataclasses.dataclass(frozen=True)
class ListOfAnswers(Own):
    answers: ClassVar[Any] = ["real", "generated"]


@dataclasses.dataclass(frozen=True)
class TwoLines(Own):
    task: ClassVar[str] = "one\ntwo"


@dataclasses.dataclass(frozen=True)
class Unchecked(Own):
    answers: ClassVar[tuple[str, ...]] = ("real",)
    generates: ClassVar[bool] = False


def config(objective: str = "spin", **spin: Any) -> Config:
    return from_dict(
        {
            "name": "t",
            "model": {"hf": "m"},
            "data": {"path": "d"},
            "training": {"objective": objective},
            "spin": spin,
        }
    )


def test_the_configuration_knows_the_same_names() -> None:
    assert tuple(OBJECTIVES) == NAMES


@pytest.mark.parametrize(("name", "kind"), [("spin", Spin), ("dpo", Dpo), ("sft", Sft)])
def test_one_word_names(name: str, kind: type[Objective]) -> None:
    assert objective_class(config(name)) is kind


def test_what_the_built_in_ones_need() -> None:
    assert [kind.compares() for kind in (Spin, Dpo, Sft)] == [True, True, False]
    assert [kind.needs_reference for kind in (Spin, Dpo, Sft)] == [True, True, False]
    assert [num_iterations(config(name, iterations=3)) for name in ("spin", "dpo", "sft")] == [3, 1, 1]
    assert [kind.title(2) for kind in (Spin, Dpo, Sft)] == ["SPIN 2", "DPO", "SFT 2"]


def test_parameters_of_each_iteration() -> None:
    settings = config(beta=[0.1, 5.0], loss="hinge", sft_weight=[0.0, 0.2])
    assert build_objective(settings, 0) == Spin(beta=0.1, loss="hinge")
    assert build_objective(settings, 3) == Spin(beta=5.0, loss="hinge", sft_weight=0.2)


def test_a_users_own_objective() -> None:
    own = build_objective(config(f"{HERE}:Own", beta=0.2, parameters={"mu": [1.0, 2.0]}), 1)
    assert own == Own(mu=2.0, beta=0.2, nu=3)
    assert own(AnswerLogps(-torch.ones(1, 3), None, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool))).loss == 2.0


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (f"{HERE}:Own", {"mu": 1.0, "muu": 2.0}, "spin.parameters.muu is not a parameter .* did you mean mu"),
        (f"{HERE}:Own", {}, r"needs spin.parameters.mu: set it"),
        (f"{HERE}:Own", {"mu": "much"}, "spin.parameters.mu: 'much' is not a number"),
        (f"{HERE}:Own", {"mu": 1.0, "nu": 0}, "spin.parameters.nu=0 must be greater than 0"),
        (f"{HERE}:Own", {"mu": 1000.0}, "refuses its parameters: mu must not be above 100"),
        (f"{HERE}:Unnamed", {}, "has no task"),
        (f"{HERE}:Abstract", {}, "has no __call__"),
        (f"{HERE}:Unrelated", {}, "is not a subclass of megatron_spin.spin.objective.Objective"),
        (f"{HERE}:Nothing", {}, "has no Nothing"),
        ("no.such.module:Class", {}, "cannot be imported"),
        (f"{HERE}:NoReal", {}, "has answers generated, real: the first must be real"),
        (f"{HERE}:Unknown", {}, "the others may be generated and initial"),
        (f"{HERE}:InitialWithoutGenerating", {}, "the others may be generated, each once"),
        (f"{HERE}:GeneratesForNothing", {}, "its answers lack 'generated'"),
        (f"{HERE}:ListOfAnswers", {}, "write them as a tuple"),
        (f"{HERE}:TwoLines", {}, "has no task: give the class one line of text"),
        (f"{HERE}:Own", {"mu": []}, "spin.parameters.mu is an empty list: give one value per iteration"),
        (f"{HERE}:Unchecked", {}, "needs a reference, but has no answer beside the real one"),
        (f"{HERE}:Own", {"mu": 1.0, "beta": 0.3}, "spin.parameters.beta has a key of its own: set spin.beta"),
    ],
)
def test_mistakes(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(config(name, parameters=parameters), 0)


def test_the_example_of_the_page_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class and the configuration of docs/objectives.md, as they are there."""
    page = (REPOSITORY / "docs/objectives.md").read_text()
    code, settings = re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL)[:2]
    module = types.ModuleType("my_objectives")
    monkeypatch.setitem(sys.modules, "my_objectives", module)
    exec(code, module.__dict__)
    sections = yaml.safe_load(settings)
    described = config(sections["training"]["objective"], **sections["spin"])
    assert dataclasses.asdict(build_objective(described, 2)) == {"beta": 0.1, "epsilon": 0.05}
    zeros = torch.zeros(1, 2)
    logps = AnswerLogps(zeros, zeros, torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    outcome = build_objective(described, 0)(logps)
    assert outcome.loss.item() == pytest.approx(math.log(2))
    assert outcome.metrics.keys() == {"margin", "accuracy", "real_reward", "generated_reward"}


def test_a_reference_free_objective_has_no_log_ratios() -> None:
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="needs a reference"):
        AnswerLogps(ones, None, ones, ones > 2).log_ratios()


def test_asking_an_objective_what_it_needs_takes_no_torch() -> None:
    """The plan, the report and --help ask; torch costs seconds."""
    code = (
        "import sys; import megatron_spin.spin.pairwise, megatron_spin.spin.sft; "
        "sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
