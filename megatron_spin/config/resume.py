"""What may change when a run is continued: every setting that nothing made so far depends on. Pure.

:data:`USES` says for each key which phases depend on it. A phase is *made* once it is done, or has left something that
the same phase would take up when it is continued: a shard, a checkpoint. A key that is not in the table counts as used
by every phase.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Any

from megatron_spin.config.config import Config
from megatron_spin.config.parsing import flatten
from megatron_spin.config.values import as_list, at_iteration


@dataclasses.dataclass(frozen=True)
class Part:
    """What a phase takes of the values of a per-iteration setting."""

    name: str
    take: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Use:
    """Which phases depend on a setting."""

    key: str
    """Dotted key; a section or mapping stands for all keys in it."""
    phases: tuple[str, ...] = ()
    """Kinds of phases, the word before the colon; none: the key may always change."""
    by_iteration: bool = False
    """The phase of iteration t depends on the value at t only, that of a baseline on the value at 0."""
    from_iteration: int = 0
    """Phases of earlier iterations do not depend on it."""
    counts_steps: bool = False
    """It decides the number of steps: a baseline of ``same_steps`` or ``same_sequences`` depends on every iteration."""
    own_baseline: bool = False
    """The second word of the key is a baseline, whose phases alone depend on it."""
    part: Part | None = None
    """What the phases take of the value; None: all of it."""
    content: bool = False
    """It names a file or directory, of which the phases depend on the content and not on the name."""


LONGEST = Part("the longest", lambda value: max(as_list(value)))
FIRST = Part("iteration 0", lambda value: at_iteration(value, 0))

USES = (
    # No result depends on these.
    Use("name"),
    Use("device"),
    Use("parallel"),
    Use("generation.batch_size"),
    Use("generation.vllm"),
    Use("generation.workers"),
    Use("evaluation.batch_size"),
    Use("training.micro_batch_size"),
    Use("training.checkpoint_every"),
    Use("training.keep_checkpoints"),
    Use("training.checkpoint_resharding"),
    Use("training.deterministic"),
    # More or fewer iterations leave those that exist as they are.
    Use("spin.iterations"),
    # The guard phase keeps the settings of its verdicts, and judges again if they changed.
    Use("guards"),
    # The model, its numbers and its layers.
    Use("model.hf", ("prepare", "import", "generate", "train", "evaluate"), content=True),
    Use("model.provider", ("import", "train")),
    Use("model.transformer", ("import", "train")),
    Use("model.make_vocab_size_divisible_by", ("import", "train")),
    Use("layer_spec", ("import", "train")),
    Use("precision.dtype", ("import", "generate", "train", "evaluate")),
    Use("precision.export", ("import", "generate", "train", "evaluate")),
    Use("precision.fp8", ("import", "train")),
    # The data.
    Use("data.path", ("prepare",), content=True),
    Use("data.template", ("prepare",)),
    Use("data.end_token", ("prepare",)),
    Use("data.num_prompts", ("prepare",)),
    Use("data.max_length", ("prepare",)),
    Use("data.max_prompt_length", ("prepare",)),
    Use("data.max_answer_length", ("prepare",)),
    Use("data.seed", ("prepare",)),
    # Generation. The shards of an iteration must be of one kind; its pairs are made from them at the end of the phase.
    Use("generation.engine", ("generate", "evaluate"), by_iteration=True),
    Use("generation.temperature", ("generate",), by_iteration=True),
    Use("generation.top_p", ("generate",), by_iteration=True),
    Use("generation.max_new_tokens", ("generate",), by_iteration=True),
    Use("generation.max_new_tokens", ("prepare",), part=LONGEST),  # cuts the real answers
    Use("generation.max_new_tokens", ("prepare",), part=FIRST),  # cuts the held-out ones
    Use("generation.samples", ("generate",), by_iteration=True),
    Use("generation.truncated", ("generate",), by_iteration=True),
    Use("generation.shard_size", ("generate",), by_iteration=True),
    Use("generation.seed", ("generate",), by_iteration=True),
    Use("spin.reuse_previous", ("generate",), from_iteration=1),
    # Training.
    Use("training.objective", ("prepare", "generate", "train")),
    Use("training.epochs", ("train",), by_iteration=True, counts_steps=True),
    Use("training.steps", ("train",), by_iteration=True, counts_steps=True),
    Use("training.global_batch_size", ("train",), by_iteration=True, counts_steps=True),
    Use("training.learning_rate", ("train",), by_iteration=True),
    Use("training.schedule", ("train",)),
    Use("training.warmup_fraction", ("train",)),
    Use("training.seed", ("train",)),
    Use("training.optimizer", ("train",)),
    Use("spin.loss", ("train",)),
    Use("spin.beta", ("train",), by_iteration=True),
    Use("spin.sft_weight", ("train",), by_iteration=True),
    Use("spin.parameters", ("train",), by_iteration=True),
    Use("baselines", ("train",), own_baseline=True),
    # Evaluation: the held-out rows are chosen and cut by prepare; all models are measured alike.
    Use("evaluation.path", ("prepare",), content=True),
    Use("evaluation.likelihood", ("prepare",), content=True),
    Use("evaluation.held_out_fraction", ("prepare",)),
    Use("evaluation.num_prompts", ("prepare",)),
    Use("evaluation.max_new_tokens", ("prepare", "evaluate")),
    Use("evaluation.seed", ("prepare", "evaluate")),
    Use("evaluation.samples", ("evaluate",)),
    Use("evaluation.answer_pattern", ("evaluate",)),
    Use("evaluation.patterns", ("evaluate",)),
)
PHASES = ("prepare", "import", "generate", "train", "export", "evaluate")
"""Kinds of phases whose results depend on settings; the others only judge or mark what these made."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that differs between two configurations of one run."""

    key: str
    old: Any
    new: Any
    phase: str | None = None
    """A phase that was made with the old value, so that the new one contradicts it; None: the change is harmless."""

    @property
    def is_name(self) -> bool:
        """Whether the values name files: if these have the same content, the change is harmless after all."""
        return any(use.content for use in uses_of(self.key))

    @property
    def by_iteration(self) -> bool:
        """Whether the value may differ from iteration to iteration."""
        return any(use.by_iteration for use in uses_of(self.key))


def changes(old: Config, new: Config, made: Collection[str]) -> list[Change]:
    """What differs from ``old``, the configuration of the run so far, to ``new``, in the order of the keys.

    Args:
        made: the phases that were made, for example ``prepare``, ``train:0`` and ``train:sft_continued``.
    """
    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    found = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        change = Change(key, old=before.get(key), new=after.get(key))
        phases = [phase for phase in sorted(made) if _contradicts(change, phase, old, new)]
        if phases:
            change = dataclasses.replace(change, phase=phases[0])
        found.append(change)
    return found


def uses_of(key: str) -> list[Use]:
    """The entries of :data:`USES` for ``key``; for an unknown key one that says that every phase depends on it."""
    found = [use for use in USES if key == use.key or key.startswith(f"{use.key}.")]
    return found or [Use(key, PHASES)]


def _contradicts(change: Change, phase: str, old: Config, new: Config) -> bool:
    """Whether ``phase`` depends on what ``change`` changes."""
    kind, _, label = phase.partition(":")
    for use in uses_of(change.key):
        if kind not in use.phases:
            continue
        if use.own_baseline and (label not in new.baselines or not change.key.startswith(f"{use.key}.{label}.")):
            continue  # the key is another baseline's, or the baseline is no longer in the plan
        for iteration in _iterations(use, label, old):
            if _value(use, change.old, iteration) != _value(use, change.new, iteration):
                return True
    return False


def _iterations(use: Use, label: str, config: Config) -> Iterable[int]:
    """The iterations whose values the phase of ``label`` depends on."""
    if label.isdigit():
        return [int(label)] if int(label) >= use.from_iteration else []
    baseline = config.baselines.get(label)
    if use.counts_steps and baseline is not None and isinstance(baseline.steps, str):
        return range(config.spin.iterations)
    return [0]


def _value(use: Use, value: Any, iteration: int) -> Any:
    if use.part is not None:
        return use.part.take(value)
    return at_iteration(value, iteration) if use.by_iteration else value
