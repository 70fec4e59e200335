"""Answers to the held-out prompts, generated once per model: those sampled by one iteration are the opponent's of the next."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_spin.config import Config, Engine, at_iteration
from megatron_spin.conversion.identity import identity
from megatron_spin.data.rows import Row
from megatron_spin.generation.engine import Completion, answer_caps, engine_settings, open_session
from megatron_spin.io import atomic_writer
from megatron_spin.run.directory import Target

CACHE = "eval_samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Player:
    """A model that answers: an iteration's policy, a baseline, or the model as it came (the baseline ``sft``)."""

    hf: Path
    target: Target
    identity: str

    @classmethod
    def of(cls, config: Config, target: Target) -> "Player":
        """The player of ``target``.

        Raises:
            CheckpointError: there are no readable weights.
        """
        hf = Path(config.model.hf) if target.baseline == "sft" else target.hf
        return cls(hf, target, identity(hf, config.precision.export_dtype))


def held_out_answers(
    config: Config, player: Player, rows: Sequence[Row], *, end_token_id: int, only: str | None = None
) -> dict[str, list[Completion]]:
    """One answer a row for each pass: ``greedy``, and ``sampled_0``, ``sampled_1`` ... at temperature 1 (or just the pass ``only``).

    What is in the cache and belongs to this very model, these prompts and these settings is not generated again.
    """
    cache = AnswerCache(player.target.directory / CACHE, _key(config, player, rows))
    names = [only] if only else ["greedy", *(f"sampled_{k}" for k in range(config.evaluation.samples))]
    missing = [name for name in names if name not in cache.passes]
    if missing:
        _generate(config, player, rows, missing, cache, end_token_id)
    return {name: cache.passes[name] for name in names}


def _generate(
    config: Config, player: Player, rows: Sequence[Row], names: Sequence[str], cache: "AnswerCache", end_token_id: int
) -> None:
    """Generates the passes ``names`` with one start of the engine."""
    settings = _settings(config, player)
    iteration = player.target.iteration or 0
    prompts = [row.prompt_ids for row in rows]
    caps = answer_caps(prompts, max_new_tokens=settings["max_new_tokens"], max_length=config.data.max_length)
    engine = engine_settings(config, iteration, hf_dir=player.hf, end_token_id=end_token_id)
    bar = tqdm(
        total=len(prompts) * len(names), desc=f"answers of {player.target.label}", unit="prompt", dynamic_ncols=True
    )

    def advance(finished: int, _tokens: int) -> None:
        bar.update(finished)

    with bar, open_session(engine) as session:
        for name in names:
            greedy, number = name == "greedy", int(name.partition("_")[2] or 0)
            answers = session.generate(
                prompts,
                max_new_tokens=caps,
                temperature=0.0 if greedy else 1.0,
                top_p=1.0,
                seed=settings["seed"] + number,
                progress=advance,
            )
            cache.add(name, answers)


class AnswerCache:
    """The file ``eval_samples.jsonl``: whose answers these are, then one line an answer; rewritten whole after each pass."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        self.key = key
        self.passes: dict[str, list[Completion]] = {}
        if path.exists():
            self._read()

    def add(self, name: str, completions: Sequence[Completion]) -> None:
        """Keeps one pass over all rows."""
        self.passes[name] = list(completions)
        with atomic_writer(self.path) as file:
            file.write(json.dumps(self.key) + "\n")
            for key, answers in self.passes.items():
                for answer in answers:
                    line = {"pass": key, "generated_ids": list(answer.token_ids), "finish_reason": answer.finish_reason}
                    file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        with open(self.path) as file:
            # Answers of another model or to other prompts are of no use; they are written over.
            if json.loads(file.readline()) != self.key:
                return
            for line in file:
                entry = json.loads(line)
                self.passes.setdefault(entry["pass"], []).append(
                    Completion(entry["generated_ids"], entry["finish_reason"])
                )


def _key(config: Config, player: Player, rows: Sequence[Row]) -> dict[str, Any]:
    prompts = hashlib.sha256(json.dumps([list(map(int, row.prompt_ids)) for row in rows]).encode()).hexdigest()
    return {"model": player.identity, "prompts": prompts, **_settings(config, player)}


def _settings(config: Config, player: Player) -> dict[str, Any]:
    """How ``player`` answers; all are cut where the real answers were."""
    engine: Engine = at_iteration(config.generation.engine, player.target.iteration or 0)
    return {
        "dtype": config.precision.export_dtype,
        "engine": engine,
        "max_new_tokens": config.held_out_cap,
        "seed": config.evaluation.seed,
    }
