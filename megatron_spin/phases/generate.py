"""The generation phase: the opponent answers every prompt, shard by shard; then the pairs are written."""

import collections
import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_spin.config import Config, Engine, Truncated, at_iteration
from megatron_spin.data.lazy import LazySequence
from megatron_spin.data.manifest import DataManifest
from megatron_spin.data.pairs import BuiltPairs, Pair, PairsManifest, previous_pairs, save_pairs
from megatron_spin.data.rows import TRAIN, Row, load_rows, open_rows
from megatron_spin.errors import ConfigError, RunDirError
from megatron_spin.generation.engine import EngineSettings, Session, answer_caps, engine_settings
from megatron_spin.generation.pool import run_all
from megatron_spin.generation.shards import GeneratedRow, Origin, Shard, ShardStore, plan_shards
from megatron_spin.log import Progress, logger
from megatron_spin.phases.opponent import Opponent, read_opponent
from megatron_spin.run.devices import generation_groups, gpus_of
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.spin.objective import objective_class


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of ``generation`` in one iteration that the answers depend on."""

    engine: Engine
    temperature: float
    top_p: float
    max_new_tokens: int
    samples: int
    shard_size: int
    seed: int

    @classmethod
    def of(cls, config: Config, iteration: int) -> "Sampling":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: at_iteration(getattr(config.generation, name), iteration) for name in names})


class _Throughput:
    """Counts what all workers generate, from the moment when the first of them is ready; their threads call it."""

    def __init__(self, bar: Progress) -> None:
        self.tokens = 0
        self._bar = bar
        self._started: float | None = None
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        return 0.0 if self._started is None else time.monotonic() - self._started

    def start(self) -> None:
        with self._lock:
            if self._started is None:
                self._started = time.monotonic()

    def add(self, prompts: int, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens
            self._bar.update(prompts, note=f"{self.tokens / self.seconds:,.0f} tokens/s")


class Generate:
    """The phase."""

    def __init__(self, config: Config, run_dir: RunDir, target: Target) -> None:
        assert target.iteration is not None
        self.config = config
        self.run_dir = run_dir
        self.target = target
        self.iteration = target.iteration
        self.sampling = Sampling.of(config, target.iteration)

    def check(self) -> None:
        """Reads the prompts.

        Raises:
            ConfigError: the objective generates nothing.
            RunDirError: the data are not prepared, or not what their manifest says.
        """
        config = self.config
        if not objective_class(config).generates:
            raise ConfigError(
                f"iteration {self.iteration} has nothing to generate: training.objective={config.training.objective} "
                "needs no generated answers"
            )
        caps = config.generation.max_new_tokens
        if "initial" in objective_class(config).answers and isinstance(caps, list) and len(set(caps)) > 1:
            raise ConfigError(
                f"generation.max_new_tokens={caps} differs between iterations, but training.objective="
                f"{config.training.objective} compares iteration 0's answers with later ones: their lengths would tell "
                "them apart; give one value"
            )
        self.manifest = DataManifest.load(self.run_dir.data)
        table = open_rows(self.run_dir.data / TRAIN)
        if table.identity() != self.manifest.identity:
            raise RunDirError(f"{table.path} is not what its manifest.json says: use a new --run-dir and prepare again")
        self.rows = load_rows(self.run_dir.data / TRAIN)

    def run(self) -> dict[str, Any]:
        """Generates what is missing and writes the pairs.

        Raises:
            RunDirError: the opponent is not there, or what is there came from another opponent, data or settings.
            CheckpointError, DeviceError: the opponent cannot be read, or the engine cannot run it.
            DataError: no pair is left.
        """
        opponent = read_opponent(self.config, self.run_dir, self.iteration)
        store = ShardStore(self.target.generated, self._origin(opponent))
        rows = self._rows_to_answer()
        shards = plan_shards(
            rows, shard_size=self.sampling.shard_size, seed=self.sampling.seed, iteration=self.iteration
        )
        store.clean()
        missing = [shard for shard in shards if not store.is_done(shard)]
        tokens, seconds = self._generate(opponent, store, missing, total=len(rows)) if missing else (0, 0.0)
        manifest = self._write_pairs(opponent, store, shards)
        return {
            "opponent": opponent.identity,
            "pairs": manifest.identity,
            "num_pairs": manifest.num_pairs,
            "shards": len(shards),
            "generated_now": len(missing),
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        }

    def _origin(self, opponent: Opponent) -> Origin:
        settings = {
            **dataclasses.asdict(self.sampling),
            "max_length": self.config.data.max_length,
            "end_token_id": self.manifest.end_token_id,
            "dtype": self.config.precision.export_dtype,
        }
        return Origin(opponent.identity, self.manifest.identity, self.iteration, settings)

    def _rows_to_answer(self) -> Sequence[Row]:
        """All prompts once per sample; the real answers are capped as the generated ones are."""

        def capped(number: int) -> Row:
            row = self.rows[number % len(self.rows)]
            return dataclasses.replace(row, real_ids=row.real_ids[: self.sampling.max_new_tokens])

        return LazySequence(capped, range(len(self.rows) * self.sampling.samples))

    def _generate(
        self, opponent: Opponent, store: ShardStore, missing: Sequence[Shard], *, total: int
    ) -> tuple[int, float]:
        """Generates the shards ``missing`` of ``total`` prompts; returns tokens and seconds without the start."""
        config, sampling = self.config, self.sampling
        self.target.generated.mkdir(parents=True, exist_ok=True)
        engines = self._engines(opponent, most=len(missing))
        logger.info(f"starting {engines[0].engine} on {engines[0].hf_dir}, {self._where(engines)}")
        done = total - sum(len(shard.rows) for shard in missing)
        with Progress(f"generate {self.iteration}", total=total, done=done, unit="prompt") as bar:
            throughput = _Throughput(bar)

            def generate(session: Session, shard: Shard) -> None:
                throughput.start()
                prompts = [row.prompt_ids for row in shard.rows]
                completions = session.generate(
                    prompts,
                    max_new_tokens=answer_caps(
                        prompts, max_new_tokens=sampling.max_new_tokens, max_length=config.data.max_length
                    ),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=shard.seed,
                    progress=throughput.add,
                )
                store.write(shard, completions)

            run_all(engines, missing, generate)
            return throughput.tokens, throughput.seconds

    def _engines(self, opponent: Opponent, *, most: int) -> list[EngineSettings]:
        """One engine per worker of this machine, at most ``most``."""
        groups = generation_groups(self.config, self.iteration, gpus_of(self.config))[:most]
        engines = []
        for number, gpus in enumerate(groups):
            log = f"{self.sampling.engine}.log" if len(groups) == 1 else f"{self.sampling.engine}_{number}.log"
            settings = engine_settings(
                self.config,
                self.iteration,
                hf_dir=opponent.hf,
                end_token_id=self.manifest.end_token_id,
                log=self.target.generated / log,
            )
            engines.append(dataclasses.replace(settings, gpus=gpus, processes=len(groups)))
        return engines

    def _where(self, engines: Sequence[EngineSettings]) -> str:
        per_engine = len(engines[0].gpus)
        if not per_engine:
            return "on the CPU" if len(engines) == 1 else f"{len(engines)} at a time on the CPU"
        return f"{len(engines)} at a time with {per_engine} of {gpus_of(self.config)} each"

    def _write_pairs(self, opponent: Opponent, store: ShardStore, shards: Sequence[Shard]) -> PairsManifest:
        """Writes the pairs, with those of the iteration before if the config says so; returns their manifest."""
        config, data = self.config, self.manifest.identity
        answers = objective_class(config).answers
        previous: Sequence[Pair] = ()
        if config.spin.reuse_previous and self.iteration > 0:
            before = self.run_dir.target(iteration=self.iteration - 1)
            previous = previous_pairs(before.pairs, iteration=self.iteration - 1, data=data, answers=answers)
        truncated: Truncated = at_iteration(config.generation.truncated, self.iteration)
        initial = _InitialAnswers(self.run_dir, self.iteration, answers, data)
        own = _own_pairs(store.read(shards), self.iteration, answers, initial)
        built = BuiltPairs(own, truncated=truncated, previous=previous)
        manifest = save_pairs(self.target.pairs, built, answers=answers, opponent=opponent.identity, data=data)
        num_generated = sum(len(shard.rows) for shard in shards)
        num_paired = built.counts["own"] + built.counts["dropped"]
        if num_paired < num_generated:
            logger.warning(
                f"{num_generated - num_paired} of {num_generated} answers give no pair: iteration 0 dropped its "
                "answers to their prompts (generation.truncated=drop)"
            )
        counts = ", ".join(f"{count} {name}" for name, count in built.counts.items())
        logger.info(f"{manifest.num_pairs} pairs: {counts}")
        return manifest


class _InitialAnswers:
    """What the model that the run starts from answered to each prompt, one answer per sample.

    Empty in iteration 0, where the opponent is that model, and for objectives that do not ask for it.
    """

    def __init__(self, run_dir: RunDir, iteration: int, answers: Sequence[str], data: str) -> None:
        self.needed = "initial" in answers and iteration > 0
        self._pairs: Sequence[Pair] = ()
        self._places: dict[int, list[int]] = collections.defaultdict(list)
        if self.needed:
            first = run_dir.target(iteration=0).pairs
            self._pairs = previous_pairs(first, iteration=0, data=data, answers=answers)
        for place, pair in enumerate(self._pairs):
            self._places[pair.index].append(place)

    def of(self, index: int, sample: int) -> list[int] | None:
        """The answer to the prompt ``index``; None if iteration 0 dropped all answers to it.

        The k-th sample of a prompt meets the k-th initial answer; if there were fewer, they are taken in turn.
        """
        places = self._places.get(index)
        if not places:
            return None
        return self._pairs[places[sample % len(places)]].generated_ids


def _own_pairs(
    generated: Iterable[GeneratedRow], iteration: int, answers: Sequence[str], initial: _InitialAnswers
) -> Iterator[Pair]:
    """The iteration's pairs; a prompt whose initial answer was dropped in iteration 0 gives none."""
    num_seen: collections.Counter[int] = collections.Counter()
    for row in generated:
        initial_ids: list[int] | None = row.generated_ids  # in iteration 0 the opponent is the initial model
        if initial.needed:
            initial_ids = initial.of(row.index, num_seen[row.index])
            num_seen[row.index] += 1
        if initial_ids is None:
            continue
        by_name = {"real": row.real_ids, "generated": row.generated_ids, "initial": initial_ids}
        yield Pair(
            index=row.index,
            iteration=iteration,
            prompt_ids=row.prompt_ids,
            answers=tuple(by_name[answer] for answer in answers),
            finish_reason=row.finish_reason,
        )
