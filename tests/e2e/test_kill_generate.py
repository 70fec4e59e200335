"""Generation killed at random moments and run again gives the very shards that an undisturbed run gives."""

import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_spin.data.pairs import load_pairs
from megatron_spin.io import read_json, sha256
from megatron_spin.run.directory import RunDir
from tests.support.processes import survivors
from tests.support.runs import command, environment, forget, run_tool, tiny_yaml

KILLS = 3
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def shards(run: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in (run / "iteration_0" / "generated").glob("shard_*")}


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_killed_and_run_again(tmp_path: Path, engine: str) -> None:
    seed = int(os.environ.get("SPIN_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"SPIN_TEST_SEED={seed}")
    chance = random.Random(seed)
    config = tiny_yaml(tmp_path, generation={"engine": engine, "max_new_tokens": 10, "shard_size": 4, "batch_size": 4})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        run_tool("prepare.py", config, "--run-dir", run)
    subprocess.run(
        command("generate.py", config, "--run-dir", whole, "--iteration", 0), check=True, env=environment(**ENVIRONMENT)
    )

    left = []
    for target in sorted(chance.sample(range(1, 16), KILLS)):  # a moment is a number of files that are there
        process = subprocess.Popen(
            command("generate.py", config, "--run-dir", killed, "--iteration", 0), env=environment(**ENVIRONMENT)
        )
        while process.poll() is None and len(shards(killed)) < target:
            time.sleep(0.001)
        with_children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        left.append(len(shards(killed)))
        print(f"killed with {left[-1]} files there and {len(with_children)} child processes")
        assert not survivors(with_children), "the engine's process outlived the one that was killed"
    subprocess.run(
        command("generate.py", config, "--run-dir", killed, "--iteration", 0),
        check=True,
        env=environment(**ENVIRONMENT),
    )
    assert any(0 < count < 20 for count in left), "no kill fell into the generation"
    assert len(shards(whole)) == 20  # 10 shards of 4 prompts, each with its manifest
    assert shards(killed) == shards(whole)
    (pairs, manifest), (_, expected) = (load_pairs(RunDir(run).target(iteration=0).pairs) for run in (killed, whole))
    assert manifest == expected
    assert sorted(pair.index for pair in pairs) == list(
        range(read_json(killed / "data" / "manifest.json")["counts"]["kept"])
    )


@pytest.mark.parametrize("moment", ["within the answers", "before their manifest", "before the pairs"])
def test_killed_in_the_middle_of_a_write(tmp_path: Path, moment: str) -> None:
    """The three places in a shard's life where a random kill seldom falls."""
    config, run = (
        tiny_yaml(tmp_path, generation={"engine": "hf", "max_new_tokens": 10, "shard_size": 16}),
        tmp_path / "run",
    )
    run_tool("prepare.py", config, "--run-dir", run)
    run_tool("generate.py", config, "--run-dir", run, "--iteration", 0)
    expected, directory = shards(run), run / "iteration_0" / "generated"
    pairs = (run / "iteration_0" / "pairs" / "manifest.json").read_bytes()
    if moment != "before the pairs":
        (directory / "shard_00002.json").unlink()
    if moment == "within the answers":
        answers = directory / "shard_00002.jsonl"
        (directory / ".shard_00002.jsonl.99.tmp").write_bytes(answers.read_bytes()[:100])
        answers.unlink()
    (run / "iteration_0" / "pairs" / "manifest.json").unlink()
    forget(run, "generate:0")
    run_tool("generate.py", config, "--run-dir", run, "--iteration", 0)
    assert shards(run) == expected
    assert (run / "iteration_0" / "pairs" / "manifest.json").read_bytes() == pairs
    assert not list(directory.glob(".*"))
