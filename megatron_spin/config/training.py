"""Sections ``training`` and ``baselines``."""

import dataclasses
from typing import Annotated, Any, Literal

from megatron_spin.config.values import MergedOver, PerIteration, Positive, Share

OBJECTIVES = ("spin", "dpo", "sft")
"""Objectives that have a name of their own; any other is ``package.module:Class``."""
DEFAULT_OPTIMIZER = {"optimizer": "adam", "clip_grad": 1.0, "weight_decay": 0.0}
"""``training.optimizer`` if it is given no keys."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What is optimized and how."""

    objective: str = "spin"
    """``spin``, ``dpo``, ``sft`` or ``package.module:Class``, a user's own objective.

    ``dpo`` plays against given ``rejected`` answers, ``sft`` trains by likelihood alone; both are one iteration without
    generation. DPO's reference is the model that the run begins with; ``spin.beta`` and ``spin.loss`` are its beta and
    loss (logistic is DPO's own).
    """
    epochs: Annotated[PerIteration[int], Positive] = 2
    """Passes over the pairs per iteration."""
    steps: Annotated[PerIteration[int | None], Positive] = None
    """Optimizer steps per iteration; overrides ``epochs``."""
    global_batch_size: Annotated[PerIteration[int], Positive] = 64
    """Pairs (for ``sft``: sequences) per optimizer step."""
    micro_batch_size: Annotated[int, Positive] = 4
    """Pairs (for ``sft``: sequences) per forward pass of one data parallel rank."""
    learning_rate: Annotated[PerIteration[float], Positive] = 5.0e-7
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to zero after the warm-up; ``constant`` does not decay."""
    warmup_fraction: Annotated[float, Share] = 0.1
    """Share of the steps in which the rate rises linearly from zero."""
    checkpoint_every: Annotated[int, Positive] = 200
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: Annotated[int, Positive] = 2
    """How many of the newest checkpoints of an iteration stay on disk."""
    checkpoint_resharding: Literal["data_parallel", "any"] = "data_parallel"
    """What may change of the layout when a training continues from a checkpoint within an iteration.

    ``data_parallel``: the number of data parallel ranks; each rank writes its own share of the optimizer state.
    ``any``: tensor, pipeline and expert parallel sizes too; data parallel rank 0 gathers the state for it, on the host.
    The checkpoint at the end of an iteration fits any layout.
    """
    seed: int = 0
    """Seed of the order of pairs."""
    deterministic: bool = False
    """On a GPU, take only kernels whose results do not depend on the order in which threads run, which is slower.

    Then a run that continues ends with the same bits as an undisturbed one, in the same layout and on the same type of
    GPU. On a CPU it always does.
    """
    optimizer: Annotated[dict[str, Any], MergedOver(DEFAULT_OPTIMIZER)] = dataclasses.field(
        default_factory=lambda: dict(DEFAULT_OPTIMIZER)
    )
    """Any field of ``OptimizerConfig``; given keys are merged over the default.

    ``optimizer`` is ``adam``, ``sgd`` or ``rmsprop`` (the paper's). RMSProp is torch's, without momentum:
    ``adam_beta2`` is its alpha (0.99 unless given), ``adam_eps`` its eps (1e-8), added to the root. ``weight_decay`` is
    decoupled as for AdamW, or with ``decoupled_weight_decay: false`` added to the gradient, which is what torch's
    RMSprop does.
    """


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """SFT continued on the run's own data, to compare with."""

    steps: Annotated[int | Literal["same_steps", "same_sequences"], Positive] = "same_steps"
    """A number of optimizer steps; ``same_steps``: as many as all iterations together (DPO has one);
    ``same_sequences``: as many sequences as they have (a pair is two)."""
    learning_rate: Annotated[float | None, Positive] = None
    """Peak learning rate; null: iteration 0's."""


def default_baselines() -> dict[str, BaselineConfig]:
    """The same steps and the same sequences as self-play."""
    return {"sft_continued": BaselineConfig("same_steps"), "sft_continued_2x": BaselineConfig("same_sequences")}
