"""The configuration: YAML into frozen dataclasses, checked in full before anything runs. No torch.

Sections carry Megatron's own field names where it has them; ``model.transformer``, ``training.optimizer`` and ``parallel.ddp`` take any field
of ``TransformerConfig``, ``OptimizerConfig`` and ``DistributedDataParallelConfig``.
"""

import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import yaml

from megatron_spin.config.named import is_name
from megatron_spin.config.parsing import Loader, apply_override, flatten, parse
from megatron_spin.errors import ConfigError
from megatron_spin.evaluation.guards import GuardsConfig

T = TypeVar("T")
Engine: TypeAlias = Literal["vllm", "hf"]
Truncated: TypeAlias = Literal["keep", "drop"]
PerIteration: TypeAlias = T | list[T]
"""A scalar stands for the same value in every iteration; a list has one value an iteration (its last one goes on if it is short)."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    hf: str
    """Directory of the Hugging Face model that the run begins with (the SFT model)."""
    provider: str | None = None
    """``package.module:function`` with Megatron's signature ``(pre_process, post_process, vp_stage)``; null builds a GPTModel from ``hf``."""
    transformer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Any ``TransformerConfig`` field, over what the Hugging Face config gives."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor parallel size (Megatron's flag); padding never counts in the softmax."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that hold consecutive layers."""
    context_parallel_size: int = 1
    """Ranks that share each sequence; more than 1 needs packed sequences, which are not there yet."""
    sequence_parallel: bool = False
    """Shard the norms' activations over the tensor parallel ranks."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over the data parallel ranks."""
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Any ``DistributedDataParallelConfig`` field."""
    nproc_per_node: int | None = None
    """Processes the driver starts on each node; null: one a GPU, or on a CPU as many as one model replica needs."""

    @property
    def replica_size(self) -> int:
        """Processes that one copy of the model is spread over."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute dtype; main weights and optimizer state are fp32 either way."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Transformer Engine FP8 format; refused where there is no FP8."""
    export: Literal["fp32", "bf16"] | None = None
    """Dtype of the exported model, hence of the opponent; null: the compute dtype."""

    @property
    def export_dtype(self) -> str:
        return self.export or self.dtype


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str
    """SFT data: JSONL, JSON or Parquet with prompt/response, instruction/input/output, question/answer or messages.

    For ``training.objective: dpo`` rows of prompt/chosen/rejected, both answers as text or as messages whose last one is the answer;
    elsewhere such rows stand for their chosen answers.
    """
    template: Literal["instruction", "chat", "none"] = "instruction"
    """``instruction`` is the paper's, ``chat`` the tokenizer's own, ``none`` takes the prompt as it stands."""
    end_token: str | None = None
    """Token that ends an answer and stops generation; null: the tokenizer's EOS."""
    num_prompts: int | None = None
    """How many rows to use, drawn with ``seed``; null: all."""
    max_length: int = 2048
    """Tokens of prompt and answer together; longer answers are cut (and lose their end token)."""
    max_prompt_length: int | None = None
    """Longer prompts are dropped and counted; null: half of ``max_length``."""
    max_answer_length: int | None = None
    """Rows with longer answers, the end token counted, are dropped and counted; null: such answers are cut, and lose their end token."""
    seed: int = 0
    """Seed of the draw and of the order of rows."""

    @property
    def prompt_limit(self) -> int:
        return self.max_prompt_length or self.max_length // 2


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    engine: PerIteration[Engine] = "vllm"
    """``vllm``, or ``hf`` for transformers' generate (faster for tiny models on a CPU)."""
    temperature: PerIteration[float] = 1.0
    top_p: PerIteration[float] = 1.0
    max_new_tokens: PerIteration[int] = 1024
    """Longest generated answer, and the cap of real answers, in tokens; the end token counts."""
    samples: PerIteration[int] = 1
    """Answers the opponent gives to each prompt; each makes a pair with the real one."""
    truncated: PerIteration[Truncated] = "keep"
    """What becomes of pairs whose generated answer did not end."""
    shard_size: PerIteration[int] = 2048
    """Prompts a shard; an unfinished shard is generated again whole."""
    batch_size: PerIteration[int] = 256
    """Prompts a batch of the ``hf`` engine."""
    seed: PerIteration[int] = 0
    vllm: PerIteration[dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Any vLLM engine argument, for example ``{tensor_parallel_size: 2, gpu_memory_utilization: 0.9}``."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    path: str | None = None
    """Held-out SFT data; null: ``held_out_fraction`` of ``data.path``. For ``training.objective: dpo`` rows of prompt/chosen/rejected also tell
    which of the two the model prefers."""
    held_out_fraction: float = 0.0
    """Share of ``data.path`` held out when ``path`` is null; 0 and no path: no evaluation."""
    num_prompts: int | None = 512
    """How many held-out prompts to use; null: all."""
    max_new_tokens: int | None = None
    """Longest held-out answer, real or generated, in tokens; null: iteration 0's ``generation.max_new_tokens``."""
    samples: int = 1
    """Sampled answers a prompt, at temperature 1, for ``exact_match_sampled`` and ``patterns``."""
    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer to compare; null compares all token ids."""
    patterns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Named regular expressions; the share of answers that each finds is reported for sampled and real answers, and with ``answer_pattern`` how
    many of the answers with it, and of those without it, are right."""
    likelihood: dict[str, str] = dataclasses.field(default_factory=dict)
    """More held-out SFT files by name; only the NLL of their answers is reported, of ``num_prompts`` rows each."""
    batch_size: int = 64
    """Sequences a batch of the log-prob pass."""
    seed: int = 1234


@dataclasses.dataclass(frozen=True)
class SpinConfig:
    iterations: int = 4
    """Rounds of self-play, T."""
    loss: Literal["logistic", "hinge", "exponential", "correlation"] = "logistic"
    """The pairwise loss, convex and decreasing (Assumption 5.1)."""
    beta: PerIteration[float] = 0.1
    """The paper's lambda, DPO's beta: weight of the log-ratio margin."""
    sft_weight: PerIteration[float] = 0.0
    """Adds this times the real answer's negative log-likelihood, nats a token, to the loss of its pair (also DPO's); 0 leaves it out.

    The mean over tokens, not the sum: a long answer's sum is hundreds of nats, beside which a pair's loss of ln 2 would vanish, and the
    weight would mean another thing for each length.
    """
    reuse_previous: bool = True
    """From iteration 1 on, add the previous iteration's generations, scored again under the new opponent."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the objective that have no key of their own here; a list gives one value per iteration."""


OBJECTIVES = ("spin", "dpo", "sft")
"""Objectives with a name of their own; a user's own is ``package.module:Class``."""
DEFAULT_OPTIMIZER = {"optimizer": "adam", "clip_grad": 1.0, "weight_decay": 0.0}
"""What ``training.optimizer`` is without keys of its own."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    objective: str = "spin"
    """``spin``, ``dpo``, ``sft`` or ``package.module:Class``, a user's own objective.

    ``dpo`` plays against given ``rejected`` answers, ``sft`` trains by likelihood alone; both are one iteration without generation. DPO's reference is the model that the run starts from; ``spin.beta`` and ``spin.loss`` are its beta and loss (logistic is DPO's own).
    """
    epochs: PerIteration[int] = 2
    steps: PerIteration[int | None] = None
    """Steps an iteration, instead of ``epochs``."""
    global_batch_size: int = 64
    """Pairs (or, for ``sft``, sequences) an optimizer step."""
    micro_batch_size: int = 4
    """Pairs (or sequences) a forward pass on one data parallel rank."""
    learning_rate: PerIteration[float] = 5.0e-7
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to zero after the warm-up."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises linearly from zero."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints of an iteration stay on the disk."""
    seed: int = 0
    """Seed of the order of pairs."""
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Any ``OptimizerConfig`` field; given keys are merged over :data:`DEFAULT_OPTIMIZER`.

    ``optimizer`` is ``adam``, ``sgd`` or ``rmsprop`` (the paper's). RMSProp is torch's, without momentum: ``adam_beta2`` is its alpha (0.99
    unless given), ``adam_eps`` its eps (1e-8), added to the root. ``weight_decay`` is decoupled as for AdamW, or with
    ``decoupled_weight_decay: false`` added to the gradient, which is what torch's RMSprop does.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", {**DEFAULT_OPTIMIZER, **self.optimizer})


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """SFT continued on the run's own data, to compare with."""

    steps: int | Literal["same_steps", "same_sequences"] = "same_steps"
    """A number, as many optimizer steps as all iterations together (DPO has one), or as many sequences (a pair is two)."""
    learning_rate: float | None = None
    """Peak learning rate; null: iteration 0's."""


def _default_baselines() -> dict[str, BaselineConfig]:
    return {"sft_continued": BaselineConfig("same_steps"), "sft_continued_2x": BaselineConfig("same_sequences")}


@dataclasses.dataclass(frozen=True)
class Config:
    name: str
    """Name of the run; the run directory is ``runs/NAME`` unless ``--run-dir`` says otherwise."""
    model: ModelConfig
    data: DataConfig
    device: Literal["auto", "cpu", "cuda"] = "auto"
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Megatron layer spec; auto: Transformer Engine where it is installed and the device is a GPU."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    spin: SpinConfig = SpinConfig()
    training: TrainingConfig = TrainingConfig()
    baselines: dict[str, BaselineConfig] = dataclasses.field(default_factory=_default_baselines)
    """Continued-SFT baselines by name; ``sft``, the model as it came, is always evaluated."""
    guards: GuardsConfig = dataclasses.field(default_factory=GuardsConfig)

    @property
    def held_out_cap(self) -> int:
        """Longest held-out answer, real or generated, in tokens: one for all models, else they could not be compared."""
        return self.evaluation.max_new_tokens or at_iteration(self.generation.max_new_tokens, 0)


RESUMABLE = (
    "name", "device", "parallel", "spin.iterations", "training.checkpoint_every", "training.keep_checkpoints", "training.micro_batch_size",
    "generation.batch_size", "generation.vllm", "evaluation.batch_size", "baselines", "guards",
)  # fmt: skip
"""What may differ when a run directory is opened again; anything else would contradict what is already there."""


def at_iteration(value: PerIteration[T], iteration: int) -> T:
    """The value of a per-iteration setting in ``iteration``; a list that is too short goes on with its last value."""
    if isinstance(value, list):
        return typing.cast(T, value[min(iteration, len(value) - 1)])
    return value


def has_evaluation(config: Config) -> bool:
    """Whether there are held-out data, hence evaluate phases."""
    return config.evaluation.path is not None or config.evaluation.held_out_fraction > 0


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path``, applies ``key=value`` overrides (values are YAML) and checks everything that needs no other file.

    Raises:
        ConfigError: unreadable YAML, unknown key (names the nearest known one), wrong type, or a value outside its range.
    """
    try:
        raw = yaml.load(path.read_text(), Loader=Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist: give the path of a YAML file, see examples/configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read ({error}): give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"config file {path} holds no mapping: its top level needs name, model and data, see examples/configs/"
        )
    for override in overrides:
        apply_override(raw, override)
    return from_dict(raw)


def from_dict(raw: dict[str, Any]) -> Config:
    """Builds and checks a :class:`Config` from plain data; raises like :func:`load_config`."""
    config = typing.cast(Config, parse(Config, raw, ""))
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to an equal :class:`Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def changes_forbidden(path: Path, config: Config) -> list[str]:
    """Dotted keys, outside :data:`RESUMABLE`, whose value in the resolved file ``path`` differs from ``config``'s."""
    old, new = flatten(dataclasses.asdict(load_config(path))), flatten(dataclasses.asdict(config))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [key for key in differing if not any(key == free or key.startswith(f"{free}.") for free in RESUMABLE)]


def _check(config: Config) -> None:
    """Rules that join values; each failure names the value, the rule and the remedy."""
    parallel, training, spin, generation, data = (
        config.parallel,
        config.training,
        config.spin,
        config.generation,
        config.data,
    )
    positive: dict[str, PerIteration[Any]] = {
        **{
            f"parallel.{name}": getattr(parallel, name)
            for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        },
        "parallel.context_parallel_size": parallel.context_parallel_size,
        "parallel.nproc_per_node": parallel.nproc_per_node,
        "model.make_vocab_size_divisible_by": config.model.make_vocab_size_divisible_by,
        **{
            f"training.{name}": getattr(training, name)
            for name in ("global_batch_size", "micro_batch_size", "checkpoint_every", "keep_checkpoints")
        },
        **{f"training.{name}": getattr(training, name) for name in ("epochs", "steps", "learning_rate")},
        **{f"spin.{name}": getattr(spin, name) for name in ("iterations", "beta")},
        **{
            f"generation.{name}": getattr(generation, name)
            for name in ("max_new_tokens", "samples", "shard_size", "batch_size", "top_p")
        },
        **{
            f"data.{name}": getattr(data, name)
            for name in ("max_length", "num_prompts", "max_prompt_length", "max_answer_length")
        },
        **{
            f"evaluation.{name}": getattr(config.evaluation, name)
            for name in ("num_prompts", "max_new_tokens", "samples", "batch_size")
        },
    }
    for key, value in positive.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item <= 0:
                raise ConfigError(f"{key}={item} must be greater than 0")
    for item in spin.sft_weight if isinstance(spin.sft_weight, list) else [spin.sft_weight]:
        if item < 0:
            raise ConfigError(f"spin.sft_weight={item} must not be negative: 0 leaves the likelihood term out")
    for item in generation.temperature if isinstance(generation.temperature, list) else [generation.temperature]:
        if item <= 0:
            raise ConfigError(
                f"generation.temperature={item} must be greater than 0: self-play samples the opponent, 1.0 is the method's"
            )
    if not 0 <= training.warmup_fraction <= 1:
        raise ConfigError(f"training.warmup_fraction={training.warmup_fraction} must lie between 0 and 1")
    if not 0 <= config.evaluation.held_out_fraction < 1:
        raise ConfigError(
            f"evaluation.held_out_fraction={config.evaluation.held_out_fraction} must lie between 0 and 1"
        )
    if training.objective not in OBJECTIVES and not is_name(training.objective):
        raise ConfigError(
            f"training.objective={training.objective!r} is neither one of {', '.join(OBJECTIVES)} nor package.module:Class: "
            "choose one, or name a class of a module that Python can import"
        )
    if training.global_batch_size % training.micro_batch_size:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size}: change one of them"
        )
    if data.prompt_limit >= data.max_length:
        raise ConfigError(
            f"data.max_prompt_length={data.prompt_limit} leaves no room for an answer in data.max_length={data.max_length}"
        )
    if parallel.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} needs packed sequences, which are not there yet: use 1"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1: set it to false"
        )
    if parallel.nproc_per_node is not None:
        replica = parallel.replica_size
        if parallel.nproc_per_node % replica and replica % parallel.nproc_per_node:
            raise ConfigError(
                f"parallel.nproc_per_node={parallel.nproc_per_node} and the {replica} ranks of a model replica do not divide each other"
            )
    for name, pattern in {"answer_pattern": config.evaluation.answer_pattern, **config.evaluation.patterns}.items():
        try:
            groups = re.compile(pattern).groups if pattern is not None else 1
        except re.error as error:
            raise ConfigError(f"evaluation pattern {name}={pattern!r} is not a regular expression: {error}") from None
        if name == "answer_pattern" and groups != 1:
            raise ConfigError(
                f"evaluation.answer_pattern={pattern!r} has {groups} groups: it needs exactly one, around the answer"
            )
    for name in config.evaluation.likelihood:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ConfigError(
                f"evaluation.likelihood.{name}: the name must begin with a letter and go on with letters, digits, '_' or '-'"
            )
    for name, guard in config.guards.by_name().items():
        low, high = guard.limits
        if not low <= guard.threshold <= high:
            raise ConfigError(f"guards.{name}.threshold={guard.threshold:g} must lie between {low:g} and {high:g}")
    for name in config.baselines:
        if name == "sft" or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ConfigError(
                f"baselines.{name}: the name must begin with a letter, go on with letters, digits, '_' or '-', and not be sft"
            )
