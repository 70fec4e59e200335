"""Runs experiments: for each seed the quickstart's data and SFT model, then every arm through tools/spin.sh.

The same command resumes. The SFT model of a seed is made once and shared by all experiments below the same --out. Each
run uses one thread; --jobs says how many run at a time.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from examples.experiments.experiment import Arm, Experiment, read_experiment
from megatron_spin import cli
from megatron_spin.errors import ConfigError, SpinError
from megatron_spin.log import Progress
from megatron_spin.run.result import result_hf

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "examples" / "quickstart"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Runner:
    """Everything below ``root``."""

    def __init__(self, root: Path, *, engine: str) -> None:
        self.root = root
        self.engine = engine

    def start(self, seed: int) -> Path:
        """Data and SFT model of ``seed``; returns their directory."""
        start = self.root / f"seed_{seed}" / "start"
        log = start / "start.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        data, model = start / "data", start / "model"
        if not (data / "preferences.jsonl").exists():
            self._run(
                log, [sys.executable, str(QUICKSTART / "make_problems.py"), "--out", str(data), "--seed", str(seed)]
            )
        pool = str(data / "sft_pool.jsonl")
        self._run(
            log,
            [
                sys.executable,
                str(QUICKSTART / "make_model.py"),
                "--data",
                pool,
                "--out",
                str(model),
                "--seed",
                str(seed),
            ],
        )
        settings = [f"model.hf={model}", f"data.path={pool}", "parallel.nproc_per_node=1"]
        self._spin(log, "sft.yaml", start / "sft", [*settings, "--until", "export:0"])
        return start

    def arm(self, experiment: Experiment, seed: int, name: str, start: Path) -> None:
        """Runs one arm to its end."""
        arm, run_dir = experiment.arms[name], experiment.run_dir(self.root, seed, name)
        hf = start / "sft" / "iteration_0" / "hf"
        if arm.after is not None:
            before = experiment.run_dir(self.root, seed, arm.after)
            hf = result_hf(before)
        log = run_dir.root.with_name(f"{run_dir.root.name}.log")
        self._spin(log, "spin.yaml", run_dir.root, self.settings(arm, start / "data", hf))

    def settings(self, arm: Arm, data: Path, hf: Path) -> list[str]:
        """The overrides of an arm that trains on a file in ``data`` and starts from ``hf``."""
        settings = {
            "model.hf": str(hf),
            "data.path": str(data / f"{arm.data}.jsonl"),
            "evaluation.path": str(data / "test.jsonl"),
            "evaluation.likelihood.mix": str(data / "mix.jsonl"),
            "generation.engine": self.engine,
            "parallel.nproc_per_node": 1,
            **arm.overrides,
        }
        # JSON is YAML, which overrides are read as.
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]

    def _spin(self, log: Path, config: str, run_dir: Path, arguments: Sequence[str]) -> None:
        self._run(
            log,
            [str(REPOSITORY / "tools" / "spin.sh"), str(QUICKSTART / config), "--run-dir", str(run_dir), *arguments],
        )

    def _run(self, log: Path, command: Sequence[str]) -> None:
        environment = {**os.environ, **ONE_THREAD, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
        begin = log.stat().st_size if log.exists() else 0
        with open(log, "a") as file:
            status = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            ).returncode
        if status:
            lines = [line for line in log.read_bytes()[begin:].decode().splitlines() if line.startswith("error: ")] or [
                "no message"
            ]
            raise SpinError(
                f"{command[0]} ended with {status} ({lines[-1].removeprefix('error: ')}): "
                f"see {log}; then run the same command again"
            )


def run(experiments: Sequence[Experiment], runner: Runner, *, seeds: Sequence[int] | None, jobs: int) -> None:
    """Runs every arm of every experiment, ``jobs`` seeds at a time: the runs of a seed share files.

    After a failure no further run starts.
    """
    failed = threading.Event()
    wanted = sorted({seed for experiment in experiments for seed in experiment.seeds if seeds is None or seed in seeds})
    count = 0
    for experiment in experiments:
        count += len(experiment.arms) * len(set(experiment.seeds) & set(wanted))
    with Progress("experiments", total=count, unit="run") as bar, concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def one(seed: int) -> None:
            start = runner.start(seed)
            for experiment in experiments:
                for name in experiment.arms if seed in experiment.seeds else ():
                    if failed.is_set():
                        return
                    runner.arm(experiment, seed, name, start)
                    bar.update(note=f"{experiment.name}, seed {seed}: {name}")

        futures = [pool.submit(one, seed) for seed in wanted]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments", nargs="+", type=Path, metavar="EXPERIMENT.yaml", help="files in examples/experiments/"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/experiments"),
        metavar="DIR",
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="only these of each experiment's seeds")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs at a time (default: one per core, here %(default)s)",
    )
    parser.add_argument(
        "--engine", choices=("vllm", "hf"), default="vllm", help="what generates (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs {arguments.jobs} must be greater than 0: it is the number of runs at a time")
    experiments = [read_experiment(path) for path in arguments.experiments]
    run(
        experiments,
        Runner(arguments.out.resolve(), engine=arguments.engine),
        seeds=arguments.seeds,
        jobs=arguments.jobs,
    )


if __name__ == "__main__":
    cli.run(main)
