"""The objective seam: what is optimized, as a pure function of the summed log-probs of each prompt's answers.

An objective is a frozen dataclass. Its fields are its parameters, built once per iteration by :func:`build_objective`.
Its class attributes say what it needs from the rest of the program. Nothing else asks which objective it is.

No torch at import: the plan and the report ask an objective what it needs and never call it.
"""

import dataclasses
import difflib
import functools
import typing
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_spin.config import Config, at_iteration
from megatron_spin.config.named import load_named
from megatron_spin.config.parsing import parse
from megatron_spin.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES = {
    "spin": "megatron_spin.spin.pairwise:Spin",
    "dpo": "megatron_spin.spin.pairwise:Dpo",
    "sft": "megatron_spin.spin.sft:Sft",
}
"""The objectives that ``training.objective`` names by one word; any other is named ``package.module:Class``."""


@dataclasses.dataclass(frozen=True)
class AnswerLogps:
    """Log-probs of the r answers to each of b prompts, summed over response tokens, in nats.

    Column 0 is the real answer. :attr:`Objective.answers` names the columns.
    """

    policy: "Tensor"
    """[b, r] fp32"""
    reference: "Tensor | None"
    """[b, r] fp32: the opponent's (for DPO the starting model's); None if the objective needs no reference."""
    lengths: "Tensor"
    """[b, r]: response tokens."""
    identical: "Tensor"
    """[b, r] bool: the answer equals the real one token for token, so nothing tells them apart."""

    def log_ratios(self) -> "Tensor":
        """``log p_theta - log p_reference`` of each answer, [b, r].

        Raises:
            ValueError: there is no reference.
        """
        if self.reference is None:
            raise ValueError("a log-ratio needs a reference: set needs_reference on the objective")
        return self.policy - self.reference


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an objective gives for b prompts."""

    loss: "Tensor"
    """[b]: each prompt's share of the loss; its gradient is followed."""
    metrics: "dict[str, Tensor]" = dataclasses.field(default_factory=dict)
    """[b] each, by name: means over the prompts of a step go into ``metrics.jsonl``."""
    count: "Tensor | None" = None
    """[b] integers: the sum of the losses is divided by the sum of these over the global batch; None counts prompts."""


RESERVED_METRICS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "pairs", "identical", "seconds")
"""Columns of ``metrics.jsonl`` that no objective's metric may be named after; ``ANSWER_logps`` are the others."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of all objectives: a subclass sets the class attributes, adds its parameters as fields, and is callable."""

    label: ClassVar[str]
    """How tables call the models it makes."""
    task: ClassVar[str]
    """What training does, for the plan."""
    start_label: ClassVar[str] = "SFT"
    """How tables call the model that the run starts from."""
    answers: ClassVar[tuple[str, ...]] = ("real", "generated")
    """The answers to each prompt, in the order of the columns.

    ``real`` comes first. ``generated`` is the opponent's answer; if the objective does not generate, it
    is the rejected answer of a preference row. ``initial`` is the answer of the model that the run starts from.
    """
    needs_reference: ClassVar[bool] = True
    """Whether the opponent scores all answers before training."""
    generates: ClassVar[bool] = True
    """Whether the opponent answers every prompt at the start of each iteration. Without it there is one iteration."""

    def __call__(self, logps: AnswerLogps) -> Outcome:
        """The losses and metrics of b prompts; pure."""
        raise NotImplementedError

    @classmethod
    def compares(cls) -> bool:
        """Whether it sets answers against each other, so that there are pairs, an opponent and guards."""
        return len(cls.answers) > 1

    @classmethod
    def title(cls, iteration: int) -> str:
        """How tables call the model of ``iteration``."""
        return f"{cls.label} {iteration}"


def objective_class(config: Config) -> type[Objective]:
    """The class that ``training.objective`` names.

    Raises:
        ConfigError: it cannot be imported, is not a complete :class:`Objective`, or asks for answers that nobody gives.
    """
    return _load(config.training.objective)


@functools.cache
def _load(name: str) -> type[Objective]:
    found: Any = load_named(OBJECTIVES.get(name, name), key="training.objective", kind="Class")
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ConfigError(
            f"training.objective={name!r} is not a subclass of megatron_spin.spin.objective.Objective: "
            "derive it from that class"
        )
    for attribute in ("label", "task"):
        text = getattr(found, attribute, None)
        if not isinstance(text, str) or len(text.splitlines()) != 1:
            raise ConfigError(f"training.objective={name!r} has no {attribute}: give the class one line of text")
    if found.__call__ is Objective.__call__:
        raise ConfigError(f"training.objective={name!r} has no __call__: define what it computes from the log-probs")
    _check_answers(name, found)
    return found


def _check_answers(name: str, kind: type[Objective]) -> None:
    if not isinstance(kind.answers, tuple):
        raise ConfigError(f"training.objective={name!r} has answers {kind.answers!r}: write them as a tuple")
    known = ("real", "generated", "initial") if kind.generates else ("real", "generated")
    if (
        kind.answers[:1] != ("real",)
        or len(set(kind.answers)) < len(kind.answers)
        or not set(kind.answers) <= set(known)
    ):
        raise ConfigError(
            f"training.objective={name!r} has answers {', '.join(kind.answers) or 'none'}: the first must be real, "
            f"the others may be {' and '.join(known[1:])}, each once"
        )
    if kind.needs_reference and not kind.compares():
        raise ConfigError(
            f"training.objective={name!r} needs a reference, but has no answer beside the real one: nothing would "
            "check the opponent; add an answer or set needs_reference to False"
        )
    if kind.generates and "generated" not in kind.answers:
        raise ConfigError(
            f"training.objective={name!r} generates, but its answers lack 'generated': add it or set generates to False"
        )


def build_objective(config: Config, iteration: int) -> Objective:
    """The objective of ``iteration``: its fields take the values of the ``spin`` keys of the same names.

    ``spin.parameters`` gives the others; types and ranges are those of the fields' annotations.

    Raises:
        ConfigError: as :func:`objective_class`; ``spin.parameters`` names no field of it, or a value that the field
            cannot have; a field without a value.
    """
    kind = objective_class(config)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for name in fields:
        if hasattr(config.spin, name):
            values[name] = at_iteration(getattr(config.spin, name), iteration)
    for name, value in config.spin.parameters.items():
        if hasattr(config.spin, name):
            # The guards and the evaluation read the key itself.
            raise ConfigError(f"spin.parameters.{name} has a key of its own: set spin.{name}")
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(fields) or 'none'}"
            raise ConfigError(
                f"spin.parameters.{name} is not a parameter of objective {config.training.objective}: {hint}"
            )
        if value == []:
            raise ConfigError(f"spin.parameters.{name} is an empty list: give one value per iteration")
        values[name] = parse(types[name], at_iteration(value, iteration), f"spin.parameters.{name}")
    missing = [name for name, field in fields.items() if name not in values and _has_no_default(field)]
    if missing:
        raise ConfigError(f"objective {config.training.objective} needs spin.parameters.{missing[0]}: set it")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training.objective={config.training.objective} refuses its parameters: {error}") from error


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def num_iterations(config: Config) -> int:
    """Iterations of the run: ``spin.iterations`` if the objective generates, else one."""
    return config.spin.iterations if objective_class(config).generates else 1
