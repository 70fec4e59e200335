"""Answers to the held-out prompts, generated once per model and kept in its directory.

What one iteration sampled serves the next iteration, too, as the answers of its opponent.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spin.config import Config, Engine, at_iteration
from megatron_spin.conversion.identity_record import RECORD, kept_identities
from megatron_spin.data.rows import Row
from megatron_spin.generation.engine import Completion, answer_caps, engine_settings, open_session
from megatron_spin.io import atomic_writer
from megatron_spin.log import Progress
from megatron_spin.run.directory import RunDir, Target

CACHE = "eval_samples.jsonl"


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model that is measured: an iteration's policy, a baseline, or the model that the run starts from (``sft``)."""

    hf: Path
    target: Target
    identity: str

    @classmethod
    def of(cls, config: Config, target: Target) -> "EvaluatedModel":
        """The model of ``target``.

        Raises:
            CheckpointError: it has no readable weights.
        """
        hf, record = target.hf, target.hf / RECORD
        if target.baseline == "sft":
            # The starting model is never exported: it is evaluated where it is.
            hf, record = Path(config.model.hf), RunDir(target.root).base / RECORD
        dtype = config.precision.export_dtype
        return cls(hf, target, kept_identities(hf, {dtype}, record)[dtype])


@dataclasses.dataclass(frozen=True)
class Pass:
    """One answer to each held-out prompt."""

    name: str
    """Its name in the cache."""
    temperature: float
    """0 is greedy."""
    seed: int


def greedy_pass(config: Config) -> Pass:
    return Pass("greedy", temperature=0.0, seed=config.evaluation.seed)


def sampled_pass(config: Config, number: int) -> Pass:
    """The sample ``number`` of ``evaluation.samples``, from 0."""
    return Pass(f"sampled_{number}", temperature=1.0, seed=config.evaluation.seed + number)


def held_out_answers(
    config: Config, model: EvaluatedModel, rows: Sequence[Row], passes: Sequence[Pass], *, end_token_id: int
) -> list[list[Completion]]:
    """For each of ``passes``, one answer per row.

    Answers in the cache are taken if they belong to this model, these prompts and these settings.
    """
    cache = AnswerCache(model.target.directory / CACHE, _key(config, model, rows))
    missing = [item for item in passes if item.name not in cache.passes]
    if missing:
        _generate(config, model, rows, missing, cache, end_token_id)
    return [cache.passes[item.name] for item in passes]


def _generate(
    config: Config,
    model: EvaluatedModel,
    rows: Sequence[Row],
    passes: Sequence[Pass],
    cache: "AnswerCache",
    end_token_id: int,
) -> None:
    """Generates ``passes`` with one start of the engine and adds each to the cache."""
    prompts = [row.prompt_ids for row in rows]
    caps = answer_caps(prompts, max_new_tokens=config.held_out_cap, max_length=config.data.max_length)
    # A baseline answers with the settings of iteration 0.
    engine = engine_settings(config, model.target.iteration or 0, hf_dir=model.hf, end_token_id=end_token_id)
    bar = Progress(f"answers of {model.target.label}", total=len(prompts) * len(passes), unit="prompt")

    def advance(finished: int, _tokens: int) -> None:
        bar.update(finished)

    with open_session(engine) as session, bar:
        for item in passes:
            answers = session.generate(
                prompts,
                max_new_tokens=caps,
                temperature=item.temperature,
                top_p=1.0,
                seed=item.seed,
                progress=advance,
            )
            cache.add(item.name, answers)


class AnswerCache:
    """The file ``eval_samples.jsonl``: a key in its first line, then one line per answer.

    The key says which model answered which prompts with which settings. The file is rewritten whole after each pass.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        self.key = key
        self.passes: dict[str, list[Completion]] = {}
        if path.exists():
            self._read()

    def add(self, name: str, completions: Sequence[Completion]) -> None:
        """Keeps one answer to each prompt."""
        self.passes[name] = list(completions)
        with atomic_writer(self.path) as file:
            file.write(json.dumps(self.key) + "\n")
            for key, answers in self.passes.items():
                for answer in answers:
                    line = {"pass": key, "generated_ids": list(answer.token_ids), "finish_reason": answer.finish_reason}
                    file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        with open(self.path) as file:
            # Answers of another model or to other prompts are ignored here and overwritten by the next pass.
            if json.loads(file.readline()) != self.key:
                return
            for line in file:
                entry = json.loads(line)
                completion = Completion(entry["generated_ids"], entry["finish_reason"])
                self.passes.setdefault(entry["pass"], []).append(completion)


def _key(config: Config, model: EvaluatedModel, rows: Sequence[Row]) -> dict[str, Any]:
    prompts = [list(map(int, row.prompt_ids)) for row in rows]
    engine: Engine = at_iteration(config.generation.engine, model.target.iteration or 0)
    return {
        "model": model.identity,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "dtype": config.precision.export_dtype,
        "engine": engine,
        "max_new_tokens": config.held_out_cap,
        "seed": config.evaluation.seed,
    }
