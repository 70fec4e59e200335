"""The training phase through its command line: resumption, kills, gates, bad input."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from megatron_spin.io import sha256
from tests.support.runs import REPOSITORY, command, environment, forget, metrics, one_line, run_tool

STEPS = 5  # 40 pairs, 8 a step, one epoch


def train(
    config: Path, run: Path, *overrides: object, check: bool = True, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    return run_tool("train.py", config, "--run-dir", run, "--iteration", 0, *overrides, check=check, ranks=ranks)


def weights(run: Path) -> dict[str, str]:
    """SHA-256 of the final checkpoint's tensor files."""
    files = (run / f"iteration_0/checkpoints/iter_{STEPS:07d}").glob("*.distcp")
    return {file.name: sha256(file) for file in files}


def test_first_loss_is_loss_of_zero_and_the_rows_hold_the_contract(trained: tuple[Path, Path]) -> None:
    _, run = trained
    rows = metrics(run / "iteration_0/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    keys = "step loss margin accuracy real_logps generated_logps real_reward generated_reward grad_norm"
    keys += " learning_rate tokens pairs"
    assert set(keys.split()) <= rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[-1]["margin"] > 0 and rows[-1]["loss"] < rows[0]["loss"]
    assert any((run / "iteration_0/tensorboard").iterdir())
    assert "train:0" in json.loads((run / "state.json").read_text())["phases"]


def test_done_is_done(trained: tuple[Path, Path]) -> None:
    config, run = trained
    before = sha256(run / "iteration_0/metrics.jsonl")
    assert "already done" in train(config, run).stdout
    assert sha256(run / "iteration_0/metrics.jsonl") == before


@pytest.mark.parametrize("seed", [os.environ["SPIN_KILL_SEED"]])
def test_kill_9_at_three_random_moments_then_the_same_result_bit_for_bit(
    fresh: tuple[Path, Path], trained: tuple[Path, Path], seed: str
) -> None:
    print(f"SPIN_KILL_SEED={seed}")
    config, run = fresh
    draw = random.Random(int(seed))
    reached = []
    for target in sorted(draw.choices(range(1, STEPS), k=3)):
        process = subprocess.Popen(
            command("train.py", config, "--run-dir", run, "--iteration", 0),
            env=environment(),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        path, rows, started = run / "iteration_0/metrics.jsonl", 0, time.time_ns()
        deadline = time.monotonic() + 120
        while (
            process.poll() is None and rows < target and time.monotonic() < deadline
        ):  # a moment is a step reached by this very process
            rows = len(path.read_text().splitlines()) if path.exists() and path.stat().st_mtime_ns > started else 0
            time.sleep(0.002)
        time.sleep(draw.random() * 0.2)  # and anywhere within it: forward, checkpoint, rename
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.killpg(process.pid, signal.SIGKILL)
        reached += [rows] if process.wait() == -signal.SIGKILL else []
    print(f"killed after steps {reached}")
    assert any(0 < rows < STEPS for rows in reached), "no kill fell into the training"
    train(config, run)
    assert metrics(run / "iteration_0/metrics.jsonl") == metrics(trained[1] / "iteration_0/metrics.jsonl")
    assert weights(run) == weights(trained[1])


def test_only_the_newest_checkpoints_stay(fresh: tuple[Path, Path]) -> None:
    config, run = fresh
    train(config, run, "training.keep_checkpoints=2")
    kept = sorted(path.name for path in (run / "iteration_0/checkpoints").glob("iter_*"))
    assert kept == ["iter_0000004", "iter_0000005"]


def test_a_second_training_by_hand_is_refused_and_the_first_goes_on(
    fresh: tuple[Path, Path], trained: tuple[Path, Path]
) -> None:
    config, run = fresh
    first = subprocess.Popen(
        command("train.py", config, "--run-dir", run, "--iteration", 0),
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lock = run / ".locks/train_0"
    deadline = time.monotonic() + 120
    while not (lock.exists() and lock.read_text()) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # under way for as long as this takes
    try:
        refused = train(config, run, check=False)
    finally:
        first.send_signal(signal.SIGCONT)
    assert f"train:0 of {run} is under way in another process (process {first.pid} on " in one_line(refused, 2)
    assert first.wait(120) == 0
    assert metrics(run / "iteration_0/metrics.jsonl") == metrics(trained[1] / "iteration_0/metrics.jsonl")


def stop_after(run: Path, step: int) -> None:
    """Makes a finished run one that was stopped after the checkpoint of ``step``."""
    (run / "iteration_0/checkpoints/latest_checkpointed_iteration.txt").write_text(str(step))
    shutil.rmtree(run / f"iteration_0/checkpoints/iter_{STEPS:07d}")
    forget(run, "train:0")


@pytest.mark.parametrize("lost", [False, True])
def test_resumed_equals_uninterrupted_even_without_the_score_cache(
    trained: tuple[Path, Path], tmp_path: Path, lost: bool
) -> None:
    config, finished = trained
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    stop_after(run, 2)
    if lost:
        for file in (run / "iteration_0/pairs").glob("scores.*"):
            file.unlink()
    result = train(config, run)
    assert f"resumed from step 2 of {STEPS}" in result.stdout
    assert metrics(run / "iteration_0/metrics.jsonl") == metrics(finished / "iteration_0/metrics.jsonl")
    assert weights(run) == weights(finished)


def test_a_training_that_ends_after_its_last_step_scores_nothing(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed after the last checkpoint, before it was recorded as done."""
    config, finished = trained
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    forget(run, "train:0")
    for file in (run / "iteration_0/pairs").glob("scores.*"):
        file.unlink()
    assert f"resumed from step {STEPS} of {STEPS}" in train(config, run).stdout
    assert not list((run / "iteration_0/pairs").glob("scores.*"))
    assert metrics(run / "iteration_0/metrics.jsonl") == metrics(finished / "iteration_0/metrics.jsonl")


def test_a_training_that_goes_on_with_other_microbatches_keeps_its_scores(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, finished = trained
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    stop_after(run, 2)
    before = sha256(run / "iteration_0/pairs/scores.json")
    result = train(config, run, "training.micro_batch_size=2")
    assert "opponent scores of 40 pairs from" in result.stdout
    assert sha256(run / "iteration_0/pairs/scores.json") == before
    losses = [row["loss"] for row in metrics(run / "iteration_0/metrics.jsonl")]
    expected = [row["loss"] for row in metrics(finished / "iteration_0/metrics.jsonl")]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_another_training_is_not_gone_on_with(fresh: tuple[Path, Path]) -> None:
    config, run = fresh
    arguments = (config, "--run-dir", run, "--baseline", "sft_continued")
    run_tool("train.py", *arguments, "baselines.sft_continued.steps=4")
    checkpoints = run / "baselines/sft_continued/checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    forget(run, "train:sft_continued")
    result = run_tool("train.py", *arguments, "baselines.sft_continued.steps=6", check=False)
    assert result.returncode == 2 and "other values of baselines.sft_continued.steps" in one_line(result)
    # Even if the run's configuration says nothing of the change, the checkpoint does.
    text = (run / "config.yaml").read_text()
    assert "    steps: 4\n" in text
    (run / "config.yaml").write_text(text.replace("    steps: 4\n", "    steps: 6\n"))
    result = run_tool("train.py", *arguments, "baselines.sft_continued.steps=6", check=False)
    assert result.returncode == 2 and "was trained with total 4, but now it is 6" in one_line(result)
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks_and_layout", [(2, "parallel.tensor_model_parallel_size=2"), (2, "parallel.pipeline_model_parallel_size=2")]
)
def test_another_layout_trains_alike_and_resumes_a_run_of_one_process(
    fresh: tuple[Path, Path], trained: tuple[Path, Path], tmp_path: Path, ranks_and_layout: tuple[int, str]
) -> None:
    ranks, layout = ranks_and_layout
    config, run = fresh
    expected = metrics(trained[1] / "iteration_0/metrics.jsonl")
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    train(config, run, layout, ranks=ranks)
    actual = metrics(run / "iteration_0/metrics.jsonl")
    assert [row["loss"] for row in actual] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    train(config, resumed, "training.checkpoint_resharding=any")
    stop_after(resumed, 4)
    train(config, resumed, layout, ranks=ranks)
    actual = metrics(resumed / "iteration_0/metrics.jsonl")
    assert actual[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)


def tamper_with_scores(run: Path, amount: float) -> None:
    """Adds ``amount`` nats to all real scores, with a manifest that believes them."""
    pairs = run / "iteration_0/pairs"
    tensors = safetensors.numpy.load_file(pairs / "scores.safetensors")
    tensors["real_logps"] = tensors["real_logps"] + np.float32(amount)
    safetensors.numpy.save_file(tensors, pairs / "scores.safetensors")
    manifest = json.loads((pairs / "scores.json").read_text())
    manifest["sha256"] = sha256(pairs / "scores.safetensors")
    (pairs / "scores.json").write_text(json.dumps(manifest))


def test_tampered_scores_stop_the_run(fresh: tuple[Path, Path], trained: tuple[Path, Path]) -> None:
    config, run = fresh
    caught = None
    for amount in (1e-1, 1e-2, 1e-3, 1e-4):
        for file in (trained[1] / "iteration_0/pairs").glob("scores.*"):
            shutil.copy(file, run / "iteration_0/pairs")
        tamper_with_scores(run, amount)
        result = train(config, run, check=False)
        if result.returncode == 0:
            break
        assert "opponent's score of pair" in one_line(result)
        assert not (run / "iteration_0/metrics.jsonl").exists()
        caught = amount
    print(f"smallest tampering of the opponent's scores that was caught: {caught} nats")
    assert caught is not None and caught <= 1e-2


def test_scores_altered_without_their_manifest_are_named(fresh: tuple[Path, Path], trained: tuple[Path, Path]) -> None:
    config, run = fresh
    for file in (trained[1] / "iteration_0/pairs").glob("scores.*"):
        shutil.copy(file, run / "iteration_0/pairs")
    data = bytearray((run / "iteration_0/pairs/scores.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "iteration_0/pairs/scores.safetensors").write_bytes(data)
    assert "altered after scoring" in one_line(train(config, run, check=False))


def test_of_many_ranks_one_says_the_error(fresh: tuple[Path, Path]) -> None:
    """Under plain torchrun, which prints a report of its own."""
    config, run = fresh
    result = train(config, run, "spin.betta=0.2", check=False, ranks=8)
    assert result.returncode != 0
    assert result.stderr.count("error: unknown config key spin.betta: did you mean spin.beta?\n") == 1
    assert result.stderr.count("unknown config key") == 1


def test_wrong_opponent_stops_the_run(fresh: tuple[Path, Path]) -> None:
    config, run = fresh
    manifest = run / "iteration_0/pairs/manifest.json"
    content = json.loads(manifest.read_text())
    content["opponent"] = ("0" if content["opponent"][0] != "0" else "1") + content["opponent"][
        1:
    ]  # one digit is enough
    manifest.write_text(json.dumps(content))
    assert "was made for opponent" in one_line(train(config, run, check=False))
    assert not (run / "iteration_0/checkpoints").exists()


def test_corrupted_checkpoint_is_one_line(fresh: tuple[Path, Path]) -> None:
    config, run = fresh
    [file, *_] = sorted((run / "base/iter_0000000").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    file.write_bytes(data)
    result = train(config, run, check=False)
    assert result.returncode == 2 and "corrupted" in one_line(result)


def test_metadata_that_names_a_foreign_function_is_refused(fresh: tuple[Path, Path]) -> None:
    config, run = fresh
    (run / "base/iter_0000000/.metadata").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    (run / "base/iter_0000000/checksums.json").unlink()
    line = one_line(train(config, run, check=False))
    assert "posix.system" in line or "os.system" in line
    assert not (REPOSITORY / "hacked").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["spin.betta=0.2"], "did you mean spin.beta"),
        (["training.global_batch_size=48"], "global_batch_size=48"),
        (
            ["parallel.tensor_model_parallel_size=3"],
            "parallel.tensor_model_parallel_size=3 does not divide the model's num_attention_heads=2",
        ),
        (["training.optimizer={optimizer: lion}"], "lion"),
        (["training.optimizer={optimizer: rmsprop, sgd_momentum: 0.9}"], "sgd_momentum=0.9 does not apply to rmsprop"),
        (["data.seed=9"], "other values of data.seed"),
        (["generation.temperature=0.9"], "other values of generation.temperature"),
    ],
)
def test_bad_settings_are_one_line_and_change_nothing(
    fresh: tuple[Path, Path], overrides: list[str], message: str
) -> None:
    config, run = fresh
    before = sorted(str(path) for path in run.rglob("*"))
    result = train(config, run, *overrides, check=False)
    assert result.returncode == 2
    assert message in one_line(result)
    assert sorted(str(path) for path in run.rglob("*")) == before
