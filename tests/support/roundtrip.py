"""Hugging Face -> Megatron -> Hugging Face: the models, and the check that the ranks of any layout run together."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import VOCABULARY, tiny_model

CASES: dict[str, dict[str, Any]] = {
    "llama": {"tied": False, "heads": 4, "kv_heads": 2},
    "llama_tied": {"tied": True, "heads": 4, "kv_heads": 2},
    "llama_one_kv_head": {"tied": False, "heads": 4, "kv_heads": 1},
    "llama_bf16_tied": {"tied": True, "heads": 2, "dtype": torch.bfloat16},
    "mistral": {"family": "mistral", "tied": False, "heads": 4, "kv_heads": 2, "sliding_window": 16},
    "mistral_tied": {"family": "mistral", "tied": True, "heads": 4, "kv_heads": 4, "sliding_window": 16},
}
"""Tiny models by name, as :func:`tiny_model` takes them; 100 tokens, so that the vocabulary needs padding."""


def make_model(directory: Path, case: str, *, layers: int = 4, **changes: Any) -> Path:
    """Writes the model of ``case`` with every kind of file that an export must keep."""
    tiny_model(directory, layers=layers, **{**CASES[case], **changes})
    (directory / "tokenizer.model").write_bytes(b"\x00sentencepiece\xff")
    (directory / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    return directory


def read_weights(hf_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, whatever its files."""
    return {name: tensor for path in hf_dir.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_model(exported: Path, original: Path) -> None:
    """Bitwise equal weights under equal names, and every other file byte for byte."""
    weights, expected = read_weights(exported), read_weights(original)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    for path in original.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            assert (exported / path.name).read_bytes() == path.read_bytes(), path.name


def start(
    hf_dir: Path, *, tp_size: int = 1, pp_size: int = 1, dtype: str = "fp32"
) -> tuple[list[torch.nn.Module], Any]:
    """(model filled with NaN, dims) of this rank: whatever is not loaded later shows itself."""
    from megatron_spin.config import Config, DataConfig, ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_spin.parallel.setup import choose_device

    device = choose_device("cpu")
    from megatron_spin.models.provider import build_model

    config = Config(
        name="roundtrip",
        model=ModelConfig(hf=str(hf_dir), make_vocab_size_divisible_by=16),
        data=DataConfig(path=""),
        device="cpu",
        parallel=ParallelConfig(tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size),
        precision=PrecisionConfig(dtype="bf16" if dtype == "bf16" else "fp32"),
    )
    dims = _initialized(config.parallel, device)
    model = build_model(config, dims)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    return list(model), dims


def _initialized(parallel: Any, device: torch.device) -> Any:
    """The layout, taken from the last call if it is the same: a new one costs a world dozens of gloo groups."""
    from megatron.core import parallel_state

    from megatron_spin.parallel.setup import initialize

    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    if _last and (_last[0].tp_size, _last[0].pp_size) == sizes and _last[0].pg_collection.tp is group:
        return _last[0]
    _last[:] = [initialize(parallel, device)]
    return _last[0]


_last: list[Any] = []


def roundtrip(hf_dir: Path, out_dir: Path, *, tp_size: int = 1, pp_size: int = 1, dtype: str = "fp32") -> str:
    """Loads, checks padding and tied copies, exports in small shards and compares with the original; every rank calls
    it.

    Returns:
        The identity, on every rank.
    """
    model, dims = start(hf_dir, tp_size=tp_size, pp_size=pp_size, dtype=dtype)
    from megatron_spin.conversion.export import export_hf
    from megatron_spin.conversion.identity import identity
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.conversion.parameters import global_named_parameters

    load_hf(model, hf_dir, dims)
    tied = json.loads((hf_dir / "config.json").read_text())["tie_word_embeddings"]
    _check_vocabulary(dict(global_named_parameters(model)), read_weights(hf_dir), tied=tied, dims=dims)
    exported = export_hf(model, hf_dir, out_dir, dims, dtype, max_shard_bytes=100_000).identity
    assert exported == identity(hf_dir, dtype)
    if dims.rank == 0:
        assert_same_model(out_dir, hf_dir)
        assert (out_dir / "model.safetensors.index.json").is_file()
        assert identity(out_dir, dtype) == exported
        assert not list(out_dir.parent.glob(".*.partial"))
    return exported


def load_error(hf_dir: Path, *, built_from: Path, tp_size: int, pp_size: int) -> str:
    """The message with which ``load_hf`` refuses ``hf_dir`` on this rank, for a model of ``built_from``."""
    from megatron_spin.errors import CheckpointError

    model, dims = start(built_from, tp_size=tp_size, pp_size=pp_size)
    from megatron_spin.conversion.load import load_hf

    try:
        load_hf(model, hf_dir, dims)
    except CheckpointError as error:
        return str(error)
    return ""


def untied_copies_error(hf_dir: Path, out_dir: Path) -> str:
    """What export says on this rank of PP2 after one bit of the last stage's copy of a tied embedding has changed."""
    from megatron_spin.errors import CheckpointError

    model, dims = start(hf_dir, pp_size=2)
    from megatron_spin.conversion.export import export_hf
    from megatron_spin.conversion.load import load_hf

    load_hf(model, hf_dir, dims)
    if dims.is_last_stage:
        copy = dict(model[0].named_parameters())["output_layer.weight"]
        copy.data.view(torch.int32)[3, 5] += 1
    try:
        export_hf(model, hf_dir, out_dir, dims, "fp32")
    except CheckpointError as error:
        return str(error)
    return ""


def export_without_space(hf_dir: Path, out_dir: Path, *, tp_size: int, pp_size: int, limit: int) -> int | None:
    """The system's error number with which an export ends on this rank if no file may grow beyond ``limit`` bytes."""
    model, dims = start(hf_dir, tp_size=tp_size, pp_size=pp_size)
    from megatron_spin.conversion.export import export_hf
    from megatron_spin.conversion.load import load_hf

    load_hf(model, hf_dir, dims)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        export_hf(model, hf_dir, out_dir, dims, "fp32", max_shard_bytes=50_000)
    except OSError as error:
        return error.errno
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return None


def gate_differences(
    hf_dir: Path, work: Path, *, tp_size: int, pp_size: int, faults: list[tuple[str, float]], dtype: str = "fp32"
) -> list[float | str]:
    """Sound model first, then each fault alone: the gate's largest difference in nats, or its message; on rank 0 (empty
    elsewhere).

    Args:
        faults: (tensor, relative change of its largest element).
    """
    from megatron_spin.errors import GateError

    model, dims = start(hf_dir, tp_size=tp_size, pp_size=pp_size, dtype=dtype)
    from megatron_spin.conversion.load import load_hf
    from megatron_spin.conversion.parity import BOUNDS, check_parity, parity_sample, random_sequences

    load_hf(model, hf_dir, dims)
    sample = parity_sample(
        model, random_sequences(json.loads((hf_dir / "config.json").read_text())), alignment=8, dims=dims
    )
    results: list[float | str] = []
    for name, change in [("model.norm.weight", 0.0), *faults] if dims.rank == 0 else []:
        altered = work / f"{name}_{change}"
        shutil.copytree(hf_dir, altered)
        weights = load_file(altered / "model.safetensors")
        flat = weights[name].view(-1)
        flat[flat.abs().argmax()] *= 1 + change
        save_file(weights, altered / "model.safetensors", metadata={"format": "pt"})
        try:
            results.append(
                check_parity(altered, sample, dtype=dtype, bound=BOUNDS[dtype], device=dims.device).largest_difference
            )
        except GateError as error:
            results.append(str(error))
    return results


def _check_vocabulary(
    parameters: dict[str, torch.Tensor], original: dict[str, torch.Tensor], *, tied: bool, dims: Any
) -> None:
    assert ("output_layer.weight" in parameters) == (dims.is_last_stage and not (tied and dims.is_first_stage))
    assert ("embedding.word_embeddings.weight" in parameters) == dims.is_first_stage
    for name, parameter in parameters.items():
        assert not parameter.isnan().any(), name
        if name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
            continue
        whole = original["lm_head.weight" if name.startswith("output") and not tied else "model.embed_tokens.weight"]
        first = dims.tp_rank * parameter.shape[0]
        real = max(0, min(VOCABULARY - first, parameter.shape[0]))
        assert torch.equal(parameter[:real], whole[first : first + real]), name
        assert not parameter[real:].any(), name
