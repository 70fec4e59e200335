"""The conversion tools as a user calls them: there and back, the gates, and input that is broken."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spin.conversion.identity import identity
from megatron_spin.run.directory import RunDir
from tests.support.roundtrip import assert_same_model, make_model, read_weights
from tests.support.runs import command, environment, one_line, run_tool, tiny_yaml


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("mistral") / "model", "mistral", layers=2)


@pytest.fixture(scope="module")
def checkpoint(mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:func:`mistral` as a Megatron checkpoint; never written to again."""
    directory = tmp_path_factory.mktemp("checkpoint") / "base"
    run_tool("import_hf.py", "--hf", mistral, "--checkpoint", directory)
    return directory


def test_there_and_back_is_bitwise_equal(mistral: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    result = run_tool("export_hf.py", "--checkpoint", checkpoint, "--hf", tmp_path / "out")
    assert_same_model(tmp_path / "out", mistral)
    marker = json.loads((tmp_path / "out/export.json").read_text())
    assert marker["identity"] == identity(mistral, "fp32") and marker["identity"][:16] in result.stdout
    assert marker["largest_difference"] <= 1e-4
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        == AutoTokenizer.from_pretrained(mistral).get_vocab()
    )


def test_there_at_one_layout_and_back_at_another_in_bf16(mistral: Path, tmp_path: Path) -> None:
    """The checkpoint and the export are in bf16, rounded once; config.json says so and keeps all else."""
    layout = ("--tensor-model-parallel-size", 2)
    run_tool("import_hf.py", "--hf", mistral, "--checkpoint", tmp_path / "base", "--dtype", "bf16", *layout, ranks=2)
    run_tool(
        "export_hf.py",
        "--checkpoint",
        tmp_path / "base",
        "--hf",
        tmp_path / "out",
        "--pipeline-model-parallel-size",
        2,
        ranks=2,
    )
    weights, original = read_weights(tmp_path / "out"), read_weights(mistral)
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name].bfloat16()) for name in original)
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", mistral))
    assert config == {**before, "dtype": "bfloat16"}
    assert identity(tmp_path / "out", "bf16") == identity(mistral, "bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_run_records_its_import_and_export(tmp_path: Path) -> None:
    config, run = tiny_yaml(tmp_path), tmp_path / "run"
    options = ("--config", config, "--run-dir", run)
    run_tool("import_hf.py", *options)
    shutil.copytree(run / "base", run / "iteration_0/checkpoints")
    assert "train:0 has not finished" in one_line(run_tool("export_hf.py", *options, "--iteration", 0, check=False), 2)
    RunDir(run).mark_done("train:0", seconds=0.0)
    assert "is not this run's" in one_line(
        run_tool("export_hf.py", *options, "--iteration", 0, "--hf", tmp_path / "elsewhere", check=False), 2
    )
    run_tool("export_hf.py", *options, "--iteration", 0)
    phases = json.loads((run / "state.json").read_text())["phases"]
    assert phases["import"]["identity"] == phases["export:0"]["identity"] == identity(tmp_path / "model", "fp32")
    assert "already done" in run_tool("import_hf.py", *options).stdout
    shutil.rmtree(run / "iteration_0")
    assert "already done" in run_tool("export_hf.py", *options, "--iteration", 0).stdout


def test_the_trainers_probe_is_what_counts(checkpoint: Path, mistral: Path, tmp_path: Path) -> None:
    """A sample of other weights (one element moved by 2%) stops the export and leaves nothing; the trainer's passes."""
    from megatron_spin.hf.logps import hf_token_logps

    model = AutoModelForCausalLM.from_pretrained(mistral).eval()
    tokens = torch.randint(100, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(tokens)
    mask[:, 7:40] = 1
    mask[1, 30:] = 0
    logps = torch.zeros(tokens.shape, dtype=torch.float32)
    sequences = [(row[:7].tolist(), row[chosen.bool()].tolist()) for row, chosen in zip(tokens, mask, strict=True)]
    for altered in (True, False):
        weight = model.model.layers[1].mlp.down_proj.weight.data.view(-1)
        position = weight.abs().argmax()
        weight[position] *= 1.02 if altered else 1 / 1.02
        for row, values in enumerate(hf_token_logps(model, sequences, batch_size=2, device="cpu")):
            logps[row, 7 : 7 + len(values)] = values
        copy = shutil.copytree(checkpoint, tmp_path / f"base_{altered}")
        save_file({"input_ids": tokens, "response_mask": mask, "token_logps": logps}, copy / "probe.safetensors")
        out = tmp_path / f"out_{altered}"
        result = run_tool("export_hf.py", "--checkpoint", copy, "--hf", out, check=False)
        if altered:
            assert "nats per token" in one_line(result, 1)
            assert not out.exists() and not list(tmp_path.glob(".*"))
        else:
            assert result.returncode == 0, result.stderr
            assert (out / "model.safetensors").is_file()


def test_a_corrupted_file_is_one_line(mistral: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(mistral, tmp_path / "broken")
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    line = one_line(run_tool("import_hf.py", "--hf", broken, "--checkpoint", tmp_path / "base", check=False), 2)
    assert "model.safetensors is corrupted or truncated" in line
    assert not (tmp_path / "base").exists()


def test_an_unfit_tensor_parallel_size_is_one_line(mistral: Path, tmp_path: Path) -> None:
    options = ("--hf", mistral, "--checkpoint", tmp_path / "base", "--tensor-model-parallel-size", 3)
    result = run_tool("import_hf.py", *options, ranks=1, check=False)
    one_line(result, 2)


def test_a_directory_that_is_no_export_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    line = one_line(run_tool("export_hf.py", "--checkpoint", checkpoint, "--hf", tmp_path / "out", check=False), 2)
    assert "is no export of this program" in line
    assert (tmp_path / "out/thesis.txt").read_text() == "precious"


def test_training_is_never_overwritten_by_an_import(mistral: Path, checkpoint: Path, tmp_path: Path) -> None:
    trained = shutil.copytree(checkpoint, tmp_path / "trained")
    (trained / "iter_0000000").rename(trained / "iter_0000007")
    (trained / "latest_checkpointed_iteration.txt").write_text("7")
    line = one_line(run_tool("import_hf.py", "--hf", mistral, "--checkpoint", trained, check=False), 2)
    assert "step 7" in line


def test_no_room_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = command("export_hf.py", "--checkpoint", checkpoint, "--hf", tmp_path / "out")
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment(), preexec_fn=limit, check=False)
    assert result.returncode and "File too large" in result.stderr
    assert not list(tmp_path.iterdir())
