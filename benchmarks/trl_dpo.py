"""TRL's DPOTrainer on the benchmark's pairs. Runs in an environment of its own (trl.lock), without Megatron-SPIN.

Its defaults but for what makes the work the same: fp32, no gradient checkpointing, the pairs in the order of the other
rows, and token ids in place of text, since TRL would tokenize a prompt and its answer together.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.workload import measurement, model_directory, read_steps, read_workload, write_json


class TokenizedDPOTrainer(trl.DPOTrainer):
    """A DPOTrainer whose rows are token ids already."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any, **__: Any) -> datasets.Dataset:
        return dataset


class Stopwatch(transformers.TrainerCallback):
    """Notes when each step ends, and the first gradient norm."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.grad_norm = float("nan")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, _arguments: Any, state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
        if state.global_step == 1:
            self.grad_norm = float(logs["grad_norm"])

    @property
    def seconds(self) -> list[float]:
        """Wall time of each step."""
        return [end - start for start, end in zip(self.times, self.times[1:], strict=False)]


def train(directory: Path, *, precompute: bool) -> Stopwatch:
    """Trains on every step of the workload."""
    workload = read_workload(directory)
    rows = []
    for step in read_steps(directory):
        for pair in step:
            rows.append(
                {"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids}
            )
    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory(directory), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory(directory))
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=workload.pairs_per_step,
            max_steps=workload.steps,
            train_sampling_strategy="sequential",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            beta=0.1,
            max_grad_norm=1.0,
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = TokenizedDPOTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        trainer.train()
    return stopwatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path, metavar="DIR", help="what benchmarks.prepare wrote")
    parser.add_argument("--precompute", action="store_true", help="set precompute_ref_log_probs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="measurement to write (JSON)")
    arguments = parser.parse_args()
    stopwatch = train(arguments.workload, precompute=arguments.precompute)
    versions = f"torch {torch.__version__}, trl {trl.__version__}, transformers {transformers.__version__}"
    result = measurement(
        arguments.workload, seconds=stopwatch.seconds, grad_norm=stopwatch.grad_norm, versions=versions
    )
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
