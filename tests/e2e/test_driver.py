"""tools/spin.sh from end to end with a model that trains in seconds: both engines, restarts, refusals. Real
components throughout.
"""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from megatron_spin.data.rows import load_rows
from megatron_spin.hf.logps import hf_token_logps
from megatron_spin.hf.model import load_model
from megatron_spin.report.diagnosis import read_diagnosis
from megatron_spin.run.directory import RunDir
from tests.support.processes import survivors
from tests.support.runs import REPOSITORY, environment, forget, metrics, one_line, run_driver
from tests.support.terminal import drawn
from tests.support.tiny import sft_rows, tiny_model, write_jsonl

DRIVER = str(REPOSITORY / "tools/spin.sh")
EVAL_KEYS = {
    "nll_per_token",
    "exact_match_sampled",
    "exact_match_greedy",
    "mean_response_tokens",
    "mean_real_tokens",
    "truncated_fraction",
    "identical_fraction",
    "opponent_accuracy",
    "num_prompts",
}
METRIC_KEYS = {
    "step",
    "loss",
    "margin",
    "accuracy",
    "real_logps",
    "generated_logps",
    "real_reward",
    "generated_reward",
    "grad_norm",
    "learning_rate",
    "tokens",
    "pairs",
    "seconds",
}
CLOCKS = ("seconds", "tokens_per_second", "time")
"""What two equal runs may differ in."""

Finished = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with model/, data.jsonl and spin.yaml: two iterations of three steps, tensor parallel size 2 on the
    CPU, one baseline.
    """
    place = tmp_path_factory.mktemp("driver")
    tiny_model(place / "model")
    write_jsonl(place / "data.jsonl", sft_rows(60))
    config = {
        "name": "tiny",
        "device": "cpu",
        "model": {"hf": "model"},
        "parallel": {"tensor_model_parallel_size": 2},
        "precision": {"dtype": "fp32"},
        "data": {"path": "data.jsonl", "template": "instruction", "max_length": 48},
        "generation": {"engine": "hf", "max_new_tokens": 12, "shard_size": 20},
        "evaluation": {
            "held_out_fraction": 0.2,
            "answer_pattern": "(w[0-9]+)$",
            "patterns": {"one": "w1"},
            "likelihood": {"all": "data.jsonl"},
        },
        "spin": {"iterations": 2},
        "training": {
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "steps": 3,
            "learning_rate": 1e-3,
            "checkpoint_every": 1,
        },
        "baselines": {"sft_continued": {"steps": 2}},
    }
    (place / "spin.yaml").write_text(yaml.safe_dump(config))
    return place


def spin(place: Path, *arguments: str, timeout: float = 600) -> Finished:
    """Runs the driver in ``place`` to its end."""
    return run_driver("spin.yaml", *arguments, cwd=place, timeout=timeout)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [DRIVER, "spin.yaml", *arguments], cwd=place, env=environment(PYTHON=sys.executable), text=True, **pipes
    )  # type: ignore[call-overload]


def without_clocks(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in CLOCKS}


def results(
    run_dir: Path, targets: Sequence[str] = ("iteration_0", "iteration_1", "baselines/sft_continued")
) -> dict[str, Any]:
    """Everything measured in a run: the metrics of each step and the evaluations."""
    found: dict[str, Any] = {}
    for target in targets:
        found[target] = metrics(run_dir / target / "metrics.jsonl")
        found[f"{target}/eval"] = without_clocks(json.loads((run_dir / target / "eval.json").read_text()))
    return found


@pytest.fixture(scope="module")
def finished(workplace: Path) -> tuple[Path, float]:
    """The run directory of an undisturbed run, and how many seconds it took."""
    started = time.monotonic()
    ran = spin(workplace, "--run-dir", "undisturbed")
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return workplace / "undisturbed", time.monotonic() - started


def test_self_play_leaves_what_the_contract_names(finished: tuple[Path, float]) -> None:
    run_dir, _ = finished
    assert (run_dir / "config.yaml").exists() and (run_dir / "state.json").exists()
    for iteration in (0, 1):
        directory = run_dir / f"iteration_{iteration}"
        for name in (
            "generated",
            "pairs",
            "checkpoints",
            "hf",
            "tensorboard",
            "metrics.jsonl",
            "eval.json",
            "samples.jsonl",
            "DONE",
        ):
            assert (directory / name).exists(), name
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3] and set(rows[0]) >= METRIC_KEYS
        assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
        assert (directory / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "3"
        measured = json.loads((directory / "eval.json").read_text())
        assert set(measured) >= EVAL_KEYS and measured["num_prompts"] == 12 and 0 <= measured["opponent_accuracy"] <= 1
        shards = sorted((directory / "generated").glob("*.jsonl"))
        indices = [json.loads(line)["index"] for shard in shards for line in shard.read_text().splitlines()]
        assert len(indices) == len(set(indices)) == 48
    for baseline in ("sft", "sft_continued"):
        assert json.loads((run_dir / "baselines" / baseline / "eval.json").read_text())["opponent_accuracy"] is None


def test_the_opponent_is_the_previous_policy(finished: tuple[Path, float]) -> None:
    run_dir, _ = finished
    trained = json.loads((run_dir / "iteration_0/eval.json").read_text())
    manifest = json.loads((run_dir / "iteration_1/pairs/manifest.json").read_text())
    assert (
        manifest["opponent"]
        == trained["model"]
        != json.loads((run_dir / "baselines/sft/eval.json").read_text())["model"]
    )


def test_a_finished_run_does_nothing(finished: tuple[Path, float], workplace: Path) -> None:
    before = (finished[0] / "state.json").read_bytes()
    ran = spin(workplace, "--run-dir", "undisturbed", timeout=20)
    assert ran.returncode == 0 and (finished[0] / "state.json").read_bytes() == before
    assert "train:1: already done" in ran.stdout


def test_a_run_of_an_earlier_version_goes_on(finished: tuple[Path, float], workplace: Path) -> None:
    """It has a state.json and no records; here all but its last phase was done."""
    run_dir = workplace / "earlier"
    shutil.copytree(finished[0], run_dir)
    forget(run_dir, "finish:sft_continued")
    whole = json.loads((run_dir / "state.json").read_text())
    shutil.rmtree(run_dir / "phases")
    last = whole["phases"].pop("finish:sft_continued")
    (run_dir / "state.json").write_text(json.dumps(whole))
    ran = spin(workplace, "--run-dir", "earlier", timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(": already done") == len(whole["phases"])
    state = json.loads((run_dir / "state.json").read_text())
    assert state["phases"].pop("finish:sft_continued").keys() == last.keys()
    assert state == whole


@pytest.mark.slow
def test_self_play_with_vllm(workplace: Path) -> None:
    ran = spin(
        workplace,
        "generation.engine=vllm",
        "parallel.tensor_model_parallel_size=1",
        "baselines={}",
        "--run-dir",
        "vllm",
    )
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    measured = json.loads((workplace / "vllm/iteration_1/eval.json").read_text())
    assert measured["opponent_accuracy"] is not None and (workplace / "vllm/iteration_1/DONE").exists()


def test_likelihood_of_more_files(finished: tuple[Path, float]) -> None:
    run, _ = finished
    rows = load_rows(run / "data/likelihood_all.arrow")
    model = load_model(run / "iteration_1/hf", dtype="fp32", device=torch.device("cpu"))
    logps = hf_token_logps(
        model, [(row.prompt_ids, row.real_ids) for row in rows], batch_size=1, device=torch.device("cpu")
    )
    expected = -float(torch.cat(logps).double().mean())
    assert len(rows) == 60
    assert json.loads((run / "iteration_1/eval.json").read_text())["likelihood"]["all"][
        "nll_per_token"
    ] == pytest.approx(expected, rel=1e-6)


def test_probe_of_a_run(finished: tuple[Path, float], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)  # the configuration has relative paths
    result = read_diagnosis(finished[0])
    measured = json.loads((finished[0] / "iteration_0/eval.json").read_text())
    assert result.held_out == 12 and result.steps == 3 and result.differences.pairs == 48
    assert result.accuracy is not None
    assert result.accuracy * (1 - result.ties) == pytest.approx(measured["opponent_accuracy"])
    assert 0 < result.differences.ended_generated < result.differences.ended_real == 1.0


@pytest.mark.slow
def test_the_probe_tool(workplace: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "tools/probe.py"),
        "spin.yaml",
        "--prompts",
        "40",
        "--steps",
        "2",
        "--run-dir",
        "probe",
    ]
    for _ in range(2):  # the second time everything is there
        ran = subprocess.run(
            command,
            cwd=workplace,
            env=environment(PYTHON=sys.executable),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert ran.returncode == 0, f"{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
        assert "After 2 steps the policy wins" in ran.stdout
    assert json.loads((workplace / "probe/probe.json").read_text())["steps"] == 2
    refused = subprocess.run(
        [*command, "--steps", "0"],
        cwd=workplace,
        env=environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert one_line(refused, 2) == "error: --steps 0 must be greater than 0"


def test_dry_run_prints_the_plan_and_starts_nothing(workplace: Path) -> None:
    ran = spin(workplace, "--run-dir", "dry", "--dry-run", "--until", "evaluate:0", timeout=30)
    assert ran.returncode == 0 and not (workplace / "dry").exists()
    phases = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("  todo")]
    assert phases == ["prepare", "import", "evaluate:sft", "generate:0", "train:0", "export:0", "evaluate:0"]
    assert "(2 ranks)" in ran.stdout


def test_until_stops_after_the_phase(workplace: Path) -> None:
    ran = spin(workplace, "--run-dir", "until", "--until", "prepare")
    assert ran.returncode == 0, ran.stderr
    assert "\r" not in ran.stdout + ran.stderr
    assert list(json.loads((workplace / "until/state.json").read_text())["phases"]) == ["prepare"]


def test_a_terminal_has_bars_and_the_logs_do_not(workplace: Path) -> None:
    screen, end = pty.openpty()
    command = [DRIVER, "spin.yaml", "--run-dir", "seen", "--until", "prepare"]
    driver = subprocess.Popen(
        command, cwd=workplace, env=environment(PYTHON=sys.executable), stdout=subprocess.PIPE, stderr=end, text=True
    )
    os.close(end)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    assert "100%|" in drawn(screen)
    os.close(screen)
    log = (workplace / "seen/logs/prepare.log").read_text()
    assert "\r" not in output + log + (workplace / "seen/run.log").read_text()
    assert "prepare finished in" in log


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_a_random_moment_it_ends_the_same(finished: tuple[Path, float], workplace: Path) -> None:
    undisturbed, seconds = finished
    seed = int(os.environ.get("SPIN_TEST_SEED", time.time_ns() % 1_000_000))
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0.02, 0.9) * seconds for _ in range(2))
    print(f"kill -9 after {moments} s of about {seconds:.0f} s (SPIN_TEST_SEED={seed})")
    for moment in (moments[0], moments[1] - moments[0]):
        driver = start(workplace, "--run-dir", "killed")
        time.sleep(moment)
        driver.kill()  # the driver alone: its children must not outlive it
        driver.communicate(timeout=60)
    ran = spin(workplace, "--run-dir", "killed")
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    assert results(workplace / "killed") == results(undisturbed), f"seed {seed}"


def test_one_driver_a_run_directory_and_a_clean_stop(workplace: Path) -> None:
    driver = start(workplace, "--run-dir", "busy")
    try:
        deadline = time.monotonic() + 60
        while not (workplace / "busy/logs/prepare.log").exists():
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        error = one_line(spin(workplace, "--run-dir", "busy", timeout=30), 2)
        assert f"busy is in use by another driver (process {driver.pid})" in error
        driver.send_signal(signal.SIGTERM)
        output, _ = driver.communicate(timeout=60)
        assert driver.returncode == 143 and "to continue:" in output and "--run-dir busy" in output
    finally:
        driver.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=nowhere.jsonl"], "data.path=nowhere.jsonl does not exist"),
        (["parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size=3"),
        (["spin.betta=1"], "unknown config key spin.betta: did you mean spin.beta?"),
        (["spin.beta=much"], "spin.beta"),
        (["model.hf=nowhere"], "model.hf=nowhere holds no config.json"),
        (["--until", "trian:0"], "did you mean train:0?"),
        (["--resume"], "option --resume is unknown"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(workplace: Path, arguments: list[str], message: str) -> None:
    ran = spin(workplace, "--run-dir", "mistake", *arguments, timeout=60)
    assert message in one_line(ran, 2) and len(ran.stderr.splitlines()) == 1
    assert not (workplace / "mistake").exists()


def test_another_configuration_is_refused(finished: tuple[Path, float], workplace: Path) -> None:
    ran = spin(workplace, "--run-dir", "undisturbed", "spin.beta=0.9", "spin.iterations=3", timeout=60)
    assert "other values of spin.beta" in one_line(ran, 2)


def back_to_training(source: Path, copy: Path) -> Path:
    """A copy of a finished run in which iteration 0 has been generated and nothing after it has been done."""
    shutil.copytree(source, copy)
    before = ("prepare", "import", "evaluate:sft", "generate:0")
    forget(copy, *(record.phase for record in RunDir(copy).records() if record.phase not in before))
    for name in ("checkpoints", "hf", "metrics.jsonl", "eval.json", "DONE"):
        path = copy / "iteration_0" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def test_a_ranks_message_reaches_the_user(finished: tuple[Path, float], workplace: Path) -> None:
    broken = back_to_training(finished[0], workplace / "broken")
    tracker = broken / "base/latest_checkpointed_iteration.txt"
    tracker.write_text("garbage\n")
    ran = spin(workplace, "--run-dir", "broken", "--until", "train:0")
    assert "base" in one_line(ran, 2)
    assert (
        "ChildFailedError" not in ran.stdout and "ChildFailedError" in (broken / "logs/train_0.ranks.log").read_text()
    )


def wait_for_checkpoint(driver: subprocess.Popen[str], checkpoints: Path) -> None:
    """Until ``driver`` has written one more than there are."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    before = tracker.read_text() if tracker.exists() else ""
    deadline = time.monotonic() + 120
    while not tracker.exists() or tracker.read_text() == before:
        assert driver.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)


def test_nothing_outlives_a_kill_after_a_checkpoint(finished: tuple[Path, float], workplace: Path) -> None:
    """Megatron starts processes of its own to write one; they must not hold the driver's pipes or its lock."""
    run_dir = back_to_training(finished[0], workplace / "orphans")
    longer = yaml.safe_load((run_dir / "config.yaml").read_text())
    longer["training"]["steps"] = 30  # not at the end before the second kill
    (run_dir / "config.yaml").write_text(yaml.safe_dump(longer))
    arguments = ("training.steps=30", "--run-dir", "orphans", "--until", "train:0")

    driver = start(workplace, *arguments)
    wait_for_checkpoint(driver, run_dir / "iteration_0/checkpoints")
    processes = psutil.Process(driver.pid).children(recursive=True)
    next(
        process for process in processes if process.environ().get("LOCAL_RANK") == "0"
    ).kill()  # as the kernel does when memory runs out
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1 and "error: a process of train:0 was killed by a signal" in output, output[-3000:]
    assert not survivors(processes)

    driver = start(workplace, *arguments)
    wait_for_checkpoint(driver, run_dir / "iteration_0/checkpoints")
    processes = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate(timeout=60)
    assert len(processes) >= 5 and not survivors(processes)

    ran = spin(workplace, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert [row["step"] for row in metrics(run_dir / "iteration_0/metrics.jsonl")] == list(range(1, 31))


def test_a_gate_stops_the_run_with_status_1(finished: tuple[Path, float], workplace: Path) -> None:
    forged = back_to_training(finished[0], workplace / "forged")
    manifest = forged / "iteration_0/pairs/manifest.json"
    content = json.loads(manifest.read_text())
    content["opponent"] = f"{int(content['opponent'][0], 16) ^ 1:x}{content['opponent'][1:]}"  # one bit
    manifest.write_text(json.dumps(content))
    assert "was made for opponent" in one_line(spin(workplace, "--run-dir", "forged", "--until", "train:0"), status=1)
