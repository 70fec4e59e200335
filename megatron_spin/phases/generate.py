"""The generation phase of one iteration: the opponent answers every prompt, shard by shard, then the training pairs are written."""

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from megatron_spin.config import Config, Truncated, at_iteration
from megatron_spin.conversion.identity import identity
from megatron_spin.data.pairs import Pair, build_pairs, previous_pairs, save_pairs
from megatron_spin.data.rows import Row, hash_rows, load_rows
from megatron_spin.errors import ConfigError, RunDirError
from megatron_spin.generation.engine import answer_caps, engine_settings, open_session
from megatron_spin.generation.shards import GeneratedRow, Origin, Shard, ShardStore, plan_shards
from megatron_spin.io import read_json
from megatron_spin.run.directory import RunDir
from megatron_spin.spin.objective import num_iterations, objective_class


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of ``generation`` in one iteration."""

    engine: Any
    temperature: float
    top_p: float
    max_new_tokens: int
    samples: int
    shard_size: int
    seed: int

    @classmethod
    def of(cls, config: Config, iteration: int) -> "Sampling":
        return cls(
            **{
                field.name: at_iteration(getattr(config.generation, field.name), iteration)
                for field in dataclasses.fields(cls)
            }
        )


def generate_iteration(config: Config, run_dir: RunDir, iteration: int) -> dict[str, Any]:
    """Generates what is missing of ``iteration`` and writes its pairs; returns details for ``state.json``.

    Raises:
        ConfigError: the configuration has no such iteration.
        RunDirError: an earlier phase has not run, or what is there came from another opponent, other data or other settings.
        CheckpointError, DeviceError: the opponent cannot be read, or the engine cannot run it.
        DataError: no pair is left.
    """
    if not 0 <= iteration < num_iterations(config) or not objective_class(config).generates:
        raise ConfigError(
            f"iteration {iteration} has nothing to generate: the config has spin.iterations={config.spin.iterations} (0 to "
            f"{config.spin.iterations - 1}) and training.objective={config.training.objective}"
        )
    rows, data = _rows(run_dir)
    opponent = _opponent(config, run_dir, iteration)
    sampling, manifest = Sampling.of(config, iteration), read_json(run_dir.data / "manifest.json")
    settings = {
        **dataclasses.asdict(sampling),
        "max_length": config.data.max_length,
        "end_token_id": manifest["end_token_id"],
        "dtype": config.precision.export_dtype,
    }
    target = run_dir.target(iteration=iteration)
    store = ShardStore(target.generated, Origin(opponent, data, iteration, settings))
    rows = [
        dataclasses.replace(row, real_ids=row.real_ids[: sampling.max_new_tokens]) for row in rows
    ]  # capped as the generated ones are
    rows = rows * sampling.samples  # all prompts once, then again
    shards = plan_shards(rows, shard_size=sampling.shard_size, seed=sampling.seed, iteration=iteration)
    store.clean()
    missing = [shard for shard in shards if not store.is_done(shard)]
    tokens, seconds = _generate(config, run_dir, iteration, store, missing, total=len(rows)) if missing else (0, 0.0)

    previous: list[Pair] = []
    if config.spin.reuse_previous and iteration > 0:
        previous = previous_pairs(run_dir.target(iteration=iteration - 1).pairs, iteration=iteration - 1, data=data)
    truncated: Truncated = at_iteration(config.generation.truncated, iteration)
    answers = objective_class(config).answers
    own = _own_pairs(store.read(shards), iteration, answers, _initial_answers(run_dir, iteration, answers, data))
    built = build_pairs(own, truncated=truncated, previous=previous)
    pairs = save_pairs(target.pairs, built, answers=answers, opponent=opponent, data=data)
    print(f"{pairs['num_pairs']} pairs: " + ", ".join(f"{count} {name}" for name, count in built.counts.items()))
    return {
        "opponent": opponent,
        "pairs": pairs["identity"],
        "num_pairs": pairs["num_pairs"],
        "shards": len(shards),
        "generated_now": len(missing),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def _initial_answers(run_dir: RunDir, iteration: int, answers: Sequence[str], data: str) -> dict[int, list[list[int]]]:
    """What the model that the run starts from answered to each prompt, by the prompt's index, one entry per sample.

    Empty in iteration 0, where the opponent is that model, and for objectives that do not ask for it.
    """
    initial: dict[int, list[list[int]]] = collections.defaultdict(list)
    if "initial" in answers and iteration > 0:
        for pair in previous_pairs(run_dir.target(iteration=0).pairs, iteration=0, data=data):
            initial[pair.index].append(pair.generated_ids)
    return initial


def _own_pairs(
    generated: Sequence[GeneratedRow], iteration: int, answers: Sequence[str], initial: Mapping[int, list[list[int]]]
) -> list[Pair]:
    """The iteration's pairs; a prompt whose initial answer was dropped in iteration 0 gives none."""
    pairs = []
    seen: collections.Counter[int] = collections.Counter()
    for row in generated:
        by_name = {"real": row.real_ids, "generated": row.generated_ids, "initial": row.generated_ids}
        if "initial" in answers and iteration > 0:
            given = initial.get(row.index, [])
            if not given:
                continue
            # The k-th sample of a prompt meets the k-th initial answer; where there were fewer, they are taken in turn.
            by_name["initial"] = given[seen[row.index] % len(given)]
            seen[row.index] += 1
        pairs.append(
            Pair(
                index=row.index,
                iteration=iteration,
                prompt_ids=row.prompt_ids,
                answers=tuple(by_name[answer] for answer in answers),
                finish_reason=row.finish_reason,
            )
        )
    return pairs


def _rows(run_dir: RunDir) -> tuple[list[Row], str]:
    """The prepared rows and their identity, checked."""
    manifest = read_json(run_dir.data / "manifest.json")
    rows = load_rows(run_dir.data / "train.parquet")
    if hash_rows(rows) != manifest["identity"]:
        raise RunDirError(
            f"{run_dir.data / 'train.parquet'} is not what its manifest.json says: use a new --run-dir and prepare again"
        )
    return rows, manifest["identity"]


def _opponent(config: Config, run_dir: RunDir, iteration: int) -> str:
    """Identity of the opponent, which must be what the previous iteration exported."""
    hf = run_dir.opponent_hf(config, iteration)
    if iteration > 0 and not hf.is_dir():
        raise RunDirError(
            f"{hf} does not exist: iteration {iteration - 1} must be trained and exported first; run tools/spin.sh"
        )
    found = identity(hf, config.precision.export_dtype)
    phases = read_json(run_dir.state)["phases"] if run_dir.state.exists() else {}
    exported = phases.get(f"export:{iteration - 1}", {}).get("identity")
    if exported is not None and found != exported:
        raise RunDirError(
            f"the opponent {hf} is {found[:12]}..., but iteration {iteration - 1} exported {exported[:12]}...: its weights were changed "
            "since; export again"
        )
    return found


def _generate(
    config: Config, run_dir: RunDir, iteration: int, store: ShardStore, missing: list[Shard], *, total: int
) -> tuple[int, float]:
    """Generates and writes each shard of ``missing`` of ``total`` prompts; returns tokens and seconds, the engine's start not counted."""
    sampling: dict[str, Any] = store.origin.settings
    target = run_dir.target(iteration=iteration)
    target.generated.mkdir(parents=True, exist_ok=True)
    settings = engine_settings(
        config,
        iteration,
        hf_dir=run_dir.opponent_hf(config, iteration),
        end_token_id=sampling["end_token_id"],
        log=target.generated / "vllm.log",
    )
    done = total - sum(len(shard.rows) for shard in missing)
    tokens = 0
    print(f"starting {settings.engine} on {settings.hf_dir}", flush=True)
    with (
        open_session(settings) as session,
        tqdm(total=total, initial=done, desc=f"generate {iteration}", unit="prompt") as bar,
    ):
        started = time.monotonic()

        def progress(prompts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
            bar.update(prompts)

        for shard in missing:
            prompts = [row.prompt_ids for row in shard.rows]
            caps = answer_caps(prompts, max_new_tokens=sampling["max_new_tokens"], max_length=sampling["max_length"])
            completions = session.generate(
                prompts,
                max_new_tokens=caps,
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
                seed=shard.seed,
                progress=progress,
            )
            store.write(shard, completions)
        return tokens, time.monotonic() - started
