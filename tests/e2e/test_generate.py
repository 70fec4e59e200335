"""Generation with both engines: against transformers token for token, and its shards against everything that may
befall them.
"""

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from megatron_spin.config import Config, load_config
from megatron_spin.conversion.identity import identity
from megatron_spin.data.pairs import load_pairs
from megatron_spin.errors import ConfigError, DeviceError, RunDirError
from megatron_spin.generation.engine import Completion, EngineSettings, Progress, Session, answer_caps, open_session
from megatron_spin.io import read_json, sha256, write_json
from megatron_spin.phases.generate import Generate
from megatron_spin.run.directory import RunDir
from tests.support.runs import ENVIRONMENT, run_tool, tiny_yaml
from tests.support.tiny import EOS, SPECIAL, tiny_model

END = SPECIAL.index(EOS)
ENGINES = ("hf", "vllm")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral", "tied": False, "kv_heads": 1, "sliding_window": 8},
}
MAX_LENGTH, MAX_NEW_TOKENS = 40, 24
Models: TypeAlias = dict[str, tuple[Path, PreTrainedModel]]
Sessions: TypeAlias = dict[tuple[str, str], Session]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Directory and model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {name: (root / name, tiny_model(root / name, **kwargs)) for name, kwargs in FAMILIES.items()}


@pytest.fixture(scope="module")
def sessions(models: Models) -> Iterator[Sessions]:
    """Started engines by (engine, family): an engine start serves all tests."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with (
            open_session(settings("vllm", models["llama"][0])) as vllm_llama,
            open_session(settings("hf", models["llama"][0])) as hf_llama,
            open_session(settings("hf", models["mistral"][0])) as hf_mistral,
        ):
            yield {("vllm", "llama"): vllm_llama, ("hf", "llama"): hf_llama, ("hf", "mistral"): hf_mistral}


def settings(engine: str, hf_dir: Path, **changes: Any) -> EngineSettings:
    return EngineSettings(
        **{
            "engine": engine,
            "hf_dir": hf_dir,
            "dtype": "fp32",
            "end_token_id": END,
            "max_length": MAX_LENGTH,
            "batch_size": 16,
            **changes,
        }
    )


def prompts(count: int = 40, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 30, (count,), generator=generator).tolist()
    return [[1, *torch.randint(10, 100, (length,), generator=generator).tolist()] for length in lengths]


def answer(
    session: Session,
    *,
    temperature: float,
    seed: int = 0,
    top_p: float = 1.0,
    asked: list[list[int]] | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    asked = asked or prompts()
    caps = answer_caps(asked, max_new_tokens=MAX_NEW_TOKENS, max_length=MAX_LENGTH)
    return session.generate(
        asked, max_new_tokens=caps, temperature=temperature, top_p=top_p, seed=seed, progress=progress
    )


@pytest.mark.parametrize(("engine", "family"), [("hf", "llama"), ("hf", "mistral"), ("vllm", "llama")])
def test_greedy_equals_transformers(sessions: Sessions, models: Models, engine: str, family: str) -> None:
    model = models[family][1]
    expected = []
    for prompt in prompts():
        cap = min(MAX_NEW_TOKENS, MAX_LENGTH - len(prompt))
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=cap, do_sample=False, eos_token_id=END, pad_token_id=0
        )
        expected.append(output[0, len(prompt) :].tolist())
    got = answer(sessions[engine, family], temperature=0)
    assert [completion.token_ids for completion in got] == expected
    assert {completion.finish_reason for completion in got} >= {"length"}


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_end_once_or_are_cut(sessions: Sessions, engine: str) -> None:
    counted = [0, 0]

    def progress(finished: int, tokens: int) -> None:
        counted[0] += finished
        counted[1] += tokens

    answers = answer(sessions[engine, "llama"], temperature=1.0, progress=progress)
    assert counted == [len(answers), sum(len(completion.token_ids) for completion in answers)]
    assert {completion.finish_reason for completion in answers} == {"stop", "length"}
    for prompt, completion in zip(prompts(), answers, strict=True):
        cap = min(MAX_NEW_TOKENS, MAX_LENGTH - len(prompt))
        if completion.finish_reason == "stop":
            assert completion.token_ids.index(END) == len(completion.token_ids) - 1 < cap
        else:
            assert END not in completion.token_ids
            assert len(completion.token_ids) == cap


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_reproduces_whatever_ran_before(sessions: Sessions, engine: str) -> None:
    session = sessions[engine, "llama"]
    first = answer(session, temperature=1.0, seed=3)
    assert answer(session, temperature=1.0, seed=4) != first
    answer(session, temperature=0)
    assert answer(session, temperature=1.0, seed=3) == first


def test_hf_samples_do_not_depend_on_the_batch(sessions: Sessions, models: Models) -> None:
    with open_session(settings("hf", models["llama"][0], batch_size=5)) as session:
        assert answer(session, temperature=1.0, seed=3) == answer(sessions["hf", "llama"], temperature=1.0, seed=3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_sampled_distribution(sessions: Sessions, models: Models, engine: str, top_p: float) -> None:
    """First tokens of 4,000 samples of one prompt: their frequencies against the model's own probabilities."""
    asked, count = prompts()[7], 4000
    with torch.no_grad():
        probabilities = models["llama"][1](torch.tensor([asked])).logits[0, -1].double().div(0.7).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        kept = order[(ordered.cumsum(0) - ordered) < top_p]
        probabilities = torch.zeros_like(probabilities).index_copy(0, kept, probabilities[kept])
        probabilities /= probabilities.sum()
    one_token = sessions[engine, "llama"].generate(
        [asked] * count, max_new_tokens=[1] * count, temperature=0.7, top_p=top_p, seed=1
    )
    frequencies = (
        torch.bincount(
            torch.tensor([completion.token_ids[0] for completion in one_token]), minlength=len(probabilities)
        )
        / count
    )
    assert not frequencies[probabilities == 0].any()
    # Five standard deviations of a binomial share, and one count for the rarest.
    assert ((frequencies - probabilities).abs() <= 5 * (probabilities / count).sqrt() + 1 / count).all()


def test_head_size_that_vllm_lacks_names_the_remedy(tmp_path: Path) -> None:
    tiny_model(tmp_path, hidden=32, heads=2)
    with (
        pytest.raises(DeviceError, match=r"head size 16 .*set generation.engine=hf"),
        open_session(settings("vllm", tmp_path)),
    ):
        pass


@pytest.mark.parametrize("argument", [{"dtype": "float16"}, {"no_such_argument": 1}])
def test_vllm_arguments_that_cannot_be(models: Models, argument: dict[str, Any]) -> None:
    with (
        pytest.raises(ConfigError, match=next(iter(argument))),
        open_session(settings("vllm", models["llama"][0], vllm=argument)),
    ):
        pass


def test_vllm_that_fails_shows_its_log(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models["llama"][0], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with (
        pytest.raises(DeviceError, match=r"vLLM failed: .*its log ends: "),
        open_session(settings("vllm", tmp_path / "model")),
    ):
        pass


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config path, run directory) with generate:0 done by the command line."""
    directory = tmp_path_factory.mktemp("done")
    config, run = tiny_yaml(directory, spin={"iterations": 2, "beta": 0.3}), directory / "run"
    run_tool("prepare.py", config, "--run-dir", run)
    run_tool("generate.py", config, "--run-dir", run, "--iteration", 0)
    return config, run


@pytest.fixture
def copy(done: tuple[Path, Path], tmp_path: Path) -> tuple[Config, RunDir]:
    config, run = done
    shutil.copytree(run, tmp_path / "run")
    return load_config(config), RunDir(tmp_path / "run")


def generate(config: Config, run_dir: RunDir, iteration: int) -> dict[str, Any]:
    """Carries out the phase, also if it is done, and returns what its record says."""
    phase = Generate(config, run_dir, run_dir.target(iteration=iteration))
    phase.check()
    return phase.run()


def with_generation(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, generation=dataclasses.replace(config.generation, **changes))


def shards(run_dir: RunDir, iteration: int = 0) -> dict[str, str]:
    return {path.name: sha256(path) for path in (run_dir.root / f"iteration_{iteration}" / "generated").glob("shard_*")}


def test_shards_and_pairs(done: tuple[Path, Path]) -> None:
    config, run_dir = load_config(done[0]), RunDir(done[1])
    assert sorted(shards(run_dir)) == [f"shard_{i:05d}.{suffix}" for i in range(3) for suffix in ("json", "jsonl")]
    pairs, manifest = load_pairs(run_dir.target(iteration=0).pairs)
    opponent = identity(run_dir.opponent_hf(config, 0), "fp32")
    assert (
        manifest.opponent
        == opponent
        == read_json(run_dir.target(iteration=0).generated / "shard_00001.json")["opponent"]
    )
    assert manifest.data == read_json(run_dir.data / "manifest.json")["identity"]
    assert sorted(pair.index for pair in pairs) == list(range(40))
    for pair in pairs:
        assert len(pair.generated_ids) <= 10
        assert (pair.generated_ids[-1] == END) == (pair.finish_reason == "stop")
    result = run_tool("generate.py", done[0], "--run-dir", done[1], "--iteration", 0)
    assert "already done" in result.stdout


def test_several_answers_a_prompt(copy: tuple[Config, RunDir]) -> None:
    config, run_dir = copy
    config = dataclasses.replace(config, generation=dataclasses.replace(config.generation, samples=2, shard_size=64))
    shutil.rmtree(run_dir.target(iteration=0).generated)
    generate(config, run_dir, 0)
    pairs, manifest = load_pairs(run_dir.target(iteration=0).pairs)
    assert manifest.counts["own"] == 80
    first, second = pairs[:40], pairs[40:]
    assert [(p.index, p.prompt_ids, p.real_ids) for p in first] == [(p.index, p.prompt_ids, p.real_ids) for p in second]
    assert sum(p.generated_ids != q.generated_ids for p, q in zip(first, second, strict=True)) > 20
    before, answers = (
        shards(run_dir),
        run_dir.target(iteration=0).generated / "shard_00000.json",
    )  # a shard with both answers of some prompts
    assert len(before) == 4
    answers.unlink()
    assert generate(config, run_dir, 0)["generated_now"] == 1 and shards(run_dir) == before


@pytest.mark.parametrize("damage", ["one token", "half a manifest", "no manifest", "a temporary file"])
def test_damaged_shards_are_generated_again(copy: tuple[Config, RunDir], damage: str) -> None:
    config, run_dir = copy
    before, directory = shards(run_dir), run_dir.target(iteration=0).generated
    answers, manifest = directory / "shard_00001.jsonl", directory / "shard_00001.json"
    if damage == "one token":
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        lines[3]["generated_ids"][0] ^= 1
        answers.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        (directory / ".shard_00003.jsonl.1.tmp").write_text("half")
    details = generate(config, run_dir, 0)
    assert details["generated_now"] == (damage != "a temporary file")
    assert shards(run_dir) == before
    assert not list(directory.glob(".*"))


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_do_not_depend_on_the_number_of_workers(
    copy: tuple[Config, RunDir], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    for name, value in ENVIRONMENT.items():  # the threads that generated the first time
        monkeypatch.setenv(name, value)
    config, run_dir = copy
    if engine == "vllm":  # its own answers to compare with
        config = with_generation(config, engine="vllm")
        shutil.rmtree(run_dir.target(iteration=0).generated)
        generate(config, run_dir, 0)
    before = shards(run_dir)
    shutil.rmtree(run_dir.target(iteration=0).generated)
    assert generate(with_generation(config, workers=2), run_dir, 0)["generated_now"] == 3
    assert shards(run_dir) == before
    assert len(list(run_dir.target(iteration=0).generated.glob("*.log"))) == 2


def test_a_killed_worker_is_one_line_and_what_was_finished_stays(
    copy: tuple[Config, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    config, run_dir = copy
    config = with_generation(config, workers=2)
    before, directory = shards(run_dir), run_dir.target(iteration=0).generated
    for name in ("shard_00001", "shard_00002"):
        (directory / f"{name}.json").unlink()
    killed = r"the generation process was killed by SIGKILL.*run again to continue$"
    with killing_one_worker(), pytest.raises(DeviceError, match=killed):
        generate(config, run_dir, 0)
    assert shards(run_dir).items() <= before.items() and (directory / "shard_00000.json").exists()
    assert workers_of_this_process() == []
    generate(config, run_dir, 0)
    assert shards(run_dir) == before


def workers_of_this_process() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "megatron_spin.generation.hf_worker" in " ".join(child.cmdline())]


@contextlib.contextmanager
def killing_one_worker() -> Iterator[None]:
    """Kills the first worker that this process starts, as the kernel does where memory runs out."""
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.01):
            for worker in workers_of_this_process():
                worker.kill()
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_another_opponent_is_refused(copy: tuple[Config, RunDir], tmp_path: Path) -> None:
    """One weight of the opponent differs in its last bit from what generated the shards."""
    config, run_dir = copy
    manifest = run_dir.target(iteration=0).generated / "shard_00002.json"
    write_json(manifest, {**read_json(manifest), "opponent": "0" * 64})
    with pytest.raises(RunDirError, match=r"shard_00002.json has opponent=000000000000\.\.\., where this run has"):
        generate(config, run_dir, 0)


def test_the_opponent_must_be_what_was_exported(copy: tuple[Config, RunDir]) -> None:
    config, run_dir = copy
    hf = run_dir.target(iteration=0).hf
    with pytest.raises(RunDirError, match="iteration 0 must be trained and exported first"):
        generate(config, run_dir, 1)
    shutil.copytree(config.model.hf, hf)
    run_dir.mark_done("export:0", seconds=0, identity="1" * 64)
    with pytest.raises(RunDirError, match=r"but iteration 0 exported 111111111111\.\.\."):
        generate(config, run_dir, 1)
    run_dir.mark_done("export:0", seconds=0, identity=identity(hf, "fp32"))
    generate(config, run_dir, 1)
    pairs, manifest = load_pairs(run_dir.target(iteration=1).pairs)
    assert manifest.counts["own"] == manifest.counts["previous"] == 40
    assert [pair.iteration for pair in pairs] == [1] * 40 + [0] * 40
    assert [p.generated_ids for p in pairs[:40]] != [p.generated_ids for p in pairs[40:]], (
        "each iteration has seeds of its own"
    )


def test_iteration_that_is_not_there(done: tuple[Path, Path]) -> None:
    result = run_tool("generate.py", done[0], "--run-dir", done[1], "--iteration", 2, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: iteration 2 is not in this run: it has 0 to 1 (spin.iterations=2")


def test_before_prepare(done: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_tool("generate.py", done[0], "--run-dir", tmp_path / "run", "--iteration", 0, check=False)
    assert result.returncode == 2
    assert "manifest.json is missing: an earlier phase has not run" in result.stderr
