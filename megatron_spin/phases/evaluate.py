"""The evaluate phase: measures one model on the held-out prompts, writes ``eval.json`` and ``samples.jsonl``."""

import time
from typing import Any

from megatron_spin.config import Config, at_iteration
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.evaluation.answers import EvaluatedModel
from megatron_spin.evaluation.logps import Comparison
from megatron_spin.evaluation.measurement import HeldOut, measure, opponents_answers
from megatron_spin.evaluation.record import Evaluation
from megatron_spin.evaluation.samples import write_samples
from megatron_spin.io import write_json
from megatron_spin.log import logger
from megatron_spin.phases.opponent import check_made_for, read_opponent
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.spin.objective import objective_class

REPORTED = ("nll_per_token", "exact_match_sampled", "exact_match_greedy", "truncated_fraction", "opponent_accuracy")
"""Keys of ``eval.json`` that the phase reports."""


class Evaluate:
    """The phase."""

    def __init__(self, config: Config, run_dir: RunDir, target: Target) -> None:
        self.config = config
        self.run_dir = run_dir
        self.target = target

    def check(self) -> None:
        """Reads the held-out data and the model's identity.

        Raises:
            CheckpointError: the model has no readable weights.
            RunDirError: the data are not prepared, or damaged.
            DataError: there are no held-out rows.
        """
        self.model = EvaluatedModel.of(self.config, self.target)
        self.held_out = HeldOut.load(self.config, self.run_dir.data)

    def run(self) -> dict[str, Any]:
        """Measures.

        Raises:
            CheckpointError, DeviceError: a model cannot be loaded, or the engine cannot run it here.
            RunDirError: the opponent is not there, or was changed since its export.
            GateError: the opponent is not the model that generated the iteration's pairs.
        """
        started = time.perf_counter()
        measured = measure(self.config, self.model, self.held_out, self._comparison())
        write_samples(self.target.directory / "samples.jsonl", measured.shown)
        evaluation = Evaluation(
            model=self.model.identity,
            num_prompts=len(self.held_out.rows),
            logps=measured.logps,
            answers=measured.answers,
            samples=self.config.evaluation.samples,
            seconds=round(time.perf_counter() - started, 3),
        )
        write_json(self.target.eval, evaluation.to_json())
        for key in REPORTED:
            value = evaluation.measure(key).value
            if value is not None:
                logger.info(f"  {key:<20} {value:.4f}")
        return {"model": evaluation.model, "num_prompts": evaluation.num_prompts}

    def _comparison(self) -> Comparison | None:
        """The opponent of the model's iteration, and the answers that the real ones are compared with.

        None for a model without an opponent, and for held-out data without rejected answers.
        """
        config, iteration = self.config, self.target.iteration
        if iteration is None or not objective_class(config).compares():
            return None
        found = read_opponent(config, self.run_dir, iteration)
        check_made_for(found, self.target, PairsManifest.load(self.target.pairs), config)
        # The opponent was evaluated itself, as the iteration before or as the starting model: its samples are there.
        before = self.run_dir.target(baseline="sft")
        if iteration > 0:
            before = self.run_dir.target(iteration=iteration - 1)
        opponent = EvaluatedModel(hf=found.hf, target=before, identity=found.identity)
        answers = opponents_answers(config, opponent, self.held_out)
        if answers is None:
            return None
        return Comparison(opponent, answers, beta=at_iteration(config.spin.beta, iteration))
