"""What the ranks of a test world run: real SPIN steps at any layout, with losses, gradients and weights to compare."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from megatron_spin.config import Config, at_iteration, from_dict
from megatron_spin.spin.objective import build_objective, objective_class


def tiny_config(
    hf: Path, *, parallel: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **sections: Any
) -> Config:
    """A configuration for the tiny models of the tests: fp32, 8 pairs a step in microbatches of 2, SGD."""
    training = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 0.01,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "optimizer": optimizer or {"optimizer": "sgd", "sgd_momentum": 0.0, "clip_grad": 0.0},
    }
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": {"hf": str(hf), "make_vocab_size_divisible_by": 8},
        "data": {"path": "unused", "max_length": 128},
        "precision": {"dtype": "fp32"},
        "parallel": parallel or {},
        "device": "cpu",
        "training": training,
        "spin": {"beta": 0.3},
    }
    for name, section in sections.items():
        raw[name] = {**raw[name], **section} if isinstance(raw.get(name), dict) else section
    return from_dict(raw)


TokenPair: TypeAlias = tuple[list[int], list[int], list[int]]
"""Token ids of a prompt, its real and its generated answer."""


def random_pairs(count: int, *, vocabulary: int, seed: int = 0, prompt: int = 9, answer: int = 14) -> list[TokenPair]:
    """Pairs whose three parts have random lengths from 1 up to the given ones."""
    generator = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return [int(i) for i in generator.integers(0, vocabulary, generator.integers(1, longest + 1))]

    return [(ids(prompt), ids(answer), ids(answer)) for _ in range(count)]


def make_policy(config: Config, pairs: list[Any]) -> Any:
    """The policy over ``pairs`` (prompt, real answer, others); its model holds the weights of ``config.model.hf``."""
    from megatron_spin.parallel.setup import choose_device, initialize

    device = choose_device(config.device)
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.data.batcher import Example
    from megatron_spin.training.assembly import build_policy

    dims = initialize(config.parallel, device)
    width = len(objective_class(config).answers)
    examples = [Example(prompt, tuple(answers[:width])) for prompt, *answers in pairs]
    policy = build_policy(
        config,
        examples,
        dims=dims,
        peak=at_iteration(config.training.learning_rate, 0),
        global_batch_size=at_iteration(config.training.global_batch_size, 0),
    )
    load_hf(policy.model, Path(config.model.hf), dims)
    policy.optimizer.reload_model_params()
    return policy


def make_trainer(config: Config, pairs: list[Any], scores: np.ndarray | None, *, steps: int = 5) -> Any:
    """A Trainer over ``pairs``, as :func:`make_policy` takes them; ``scores`` [N, r] are the reference's."""
    policy = make_policy(config, pairs)
    from megatron_spin.data.sampler import BatchSampler
    from megatron_spin.training.schedule import StepPlan

    training = config.training
    sampler = BatchSampler(len(pairs), at_iteration(training.global_batch_size, 0), training.seed)
    plan = StepPlan(
        total=steps,
        peak=at_iteration(training.learning_rate, 0),
        decay=training.schedule,
        warmup_fraction=training.warmup_fraction,
    )
    return policy.trainer(build_objective(config, 0), scores, sampler, plan)


def gradients(trainer: Any, hf: Path) -> dict[str, np.ndarray]:
    """The accumulated gradients under their Hugging Face names, on rank 0 (empty elsewhere); overwrites the weights."""
    for chunk in trainer.model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return weights(trainer, hf)


def weights(trainer: Any, hf: Path) -> dict[str, np.ndarray]:
    """The weights under their Hugging Face names, on rank 0 (empty elsewhere)."""
    from megatron_spin.conversion.stream import HfStream
    from megatron_spin.hf.assets import read_hf_config

    return {
        name: tensor.numpy().copy()
        for name, tensor in HfStream(trainer.model, read_hf_config(hf), trainer.dims, "fp32")
    }


def first_gradients(
    config: Config, pairs: list[Any], scores: np.ndarray
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Mean reported values of the first batch, and its gradients."""
    trainer = make_trainer(config, pairs, scores)
    named = trainer.forward_backward(trainer.sampler.batch(0))
    return named, gradients(trainer, Path(config.model.hf))


def losses(config: Config, pairs: list[Any], scores: np.ndarray, *, steps: int = 5) -> list[dict[str, Any]]:
    """The metrics of ``steps`` optimizer steps."""
    trainer = make_trainer(config, pairs, scores, steps=steps)
    return [trainer.step(step) for step in range(steps)]


def trained_weights(
    config: Config, pairs: list[Any], scores: np.ndarray | None, *, steps: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The metrics of ``steps`` optimizer steps, and the weights they end with under their Hugging Face names (empty
    but on rank 0).
    """
    trainer = make_trainer(config, pairs, scores, steps=steps)
    rows = [trainer.step(step) for step in range(steps)]
    return rows, weights(trainer, Path(config.model.hf))


def resumed_weights(
    config: Config,
    pairs: list[Any],
    scores: np.ndarray,
    *,
    steps: int,
    stop: int,
    directory: Path,
    resharding: Literal["data_parallel", "any"] = "data_parallel",
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """As :func:`trained_weights`, but after ``stop`` steps another trainer goes on from the checkpoint in
    ``directory``.
    """
    trainer = make_trainer(config, pairs, scores, steps=steps)
    from megatron_spin.training.checkpoint import load_checkpoint, save_checkpoint

    rows = [trainer.step(step) for step in range(stop)]
    save_checkpoint(
        directory, stop, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer, resharding=resharding
    )
    trainer = make_trainer(config, pairs, scores, steps=steps)
    load_checkpoint(directory, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer)
    rows += [trainer.step(step) for step in range(stop, steps)]
    return rows, weights(trainer, Path(config.model.hf))


def scores_of(config: Config, pairs: list[Any]) -> np.ndarray:
    """Summed log-probs of all answers by the scoring pass, [N, r]."""
    return make_policy(config, pairs).score()
