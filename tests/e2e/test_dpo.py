"""SPIN then DPO through the driver: a run of self-play, then a run on preference pairs that starts from its export."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_spin.io import read_json
from megatron_spin.report.results import read_results
from tests.support.runs import metrics, run_driver
from tests.support.tiny import sft_rows, tiny_model, write_jsonl


def driver(place: Path, name: str, config: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    (place / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **config}))
    return run_driver(f"{name}.yaml", "--run-dir", name, *arguments, cwd=place, check=True, timeout=300)


@pytest.mark.slow
def test_spin_then_dpo(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_jsonl(tmp_path / "sft.jsonl", sft_rows(16, seed=1))
    lost = sft_rows(16, seed=5)
    pairs = [
        {"prompt": won["prompt"], "chosen": won["response"], "rejected": other["response"]}
        for won, other in zip(sft_rows(16), lost, strict=True)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    shared: dict[str, Any] = {
        "device": "cpu",
        "precision": {"dtype": "fp32"},
        "generation": {"engine": "hf", "max_new_tokens": 10},
        "spin": {"iterations": 1, "beta": 0.3},
        "baselines": {},
    }
    training = {
        "epochs": 1,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "optimizer": {"optimizer": "rmsprop"},
    }
    data = {"template": "none", "max_length": 40}
    driver(
        tmp_path,
        "spin",
        {**shared, "model": {"hf": "model"}, "data": {"path": "sft.jsonl", **data}, "training": training},
    )

    dpo = {**shared, "model": {"hf": "spin/iteration_0/hf"}, "data": {"path": "pairs.jsonl", **data}}
    dpo |= {
        "spin": {"beta": 0.3, "sft_weight": 0.1},
        "training": {**training, "objective": "dpo"},
        "evaluation": {"path": "pairs.jsonl", "num_prompts": 4},
    }
    plan = driver(tmp_path, "dpo", dpo, "--dry-run").stdout
    assert "generate" not in plan and not (tmp_path / "dpo").exists()
    driver(tmp_path, "dpo", dpo)
    run = tmp_path / "dpo"
    assert list(read_json(run / "state.json")["phases"]) == [
        "prepare",
        "import",
        "evaluate:sft",
        "train:0",
        "export:0",
        "evaluate:0",
        "guard:0",
        "finish:0",
    ]
    first, second = metrics(run / "iteration_0/metrics.jsonl")
    assert (
        first["margin"] == pytest.approx(0, abs=1e-5)
        and first["loss"] > math.log(2) + 0.1
        and second["loss"] != first["loss"]
    )
    opponent = read_json(run / "iteration_0/pairs/manifest.json")["opponent"]
    assert opponent == read_json(tmp_path / "spin/state.json")["phases"]["export:0"]["identity"]
    assert (run / "iteration_0/DONE").exists() and (run / "iteration_0/pairs/scores.safetensors").exists()
    results = read_results(run)
    assert [model.name for model in results.evaluated] == ["start", "DPO"]
    measured = read_json(run / "iteration_0/eval.json")
    assert measured["opponent"] == opponent and measured["opponent_ties"] == 0
    assert (
        measured["opponent_accuracy"] == 1.0
    )  # held out are four of the pairs trained on: chosen likelier, rejected less than to the reference
    shown = [json.loads(line) for line in (run / "iteration_0/samples.jsonl").read_text().splitlines()]
    assert [row["rejected"] for row in shown] == [pairs[row["index"]]["rejected"] for row in shown]
    judged = read_json(run / "state.json")["guards"]["0"]["verdicts"]
    assert len(judged) == 7 and all(verdict["tripped"] is not None for verdict in judged)
