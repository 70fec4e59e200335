"""Memory-mapped tables: what is hashed and read is what a plain reader sees, and opening a large one costs nothing."""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spin.data.batcher import Example
from megatron_spin.data.examples import examples_of
from megatron_spin.data.pairs import PairsFile, PairsManifest, schema
from megatron_spin.data.table import ROWS_PER_BATCH, TOKENS, Table, identity_of, record_batches, write_table
from megatron_spin.errors import RunDirError
from megatron_spin.io import write_json
from tests.support.tables import hashed_line_by_line, random_pairs, to_parquet

ANSWERS = ("real", "generated")
SCHEMA = pa.schema([("index", pa.int64()), ("ids", TOKENS), ("cut", pa.bool_()), ("reason", pa.string())])
NUM_PAIRS = 200_000
ids = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 300_000), max_size=5)
rows = st.lists(st.tuples(st.integers(-9, 2**40), ids, st.booleans(), st.sampled_from(["stop", "length"])), max_size=9)


@given(rows=rows)
def test_identity_is_that_of_lines_of_json(rows: list[tuple[int, list[int], bool, str]]) -> None:
    assert identity_of(record_batches(rows, SCHEMA)) == hashed_line_by_line(rows)


def test_many_batches_make_the_round_trip(tmp_path: Path) -> None:
    rows = [(n, [n] * (n % 7), n % 2 == 0, "stop") for n in range(2 * ROWS_PER_BATCH + 5)]
    identity = write_table(tmp_path / "t.arrow", rows, SCHEMA)
    assert identity == hashed_line_by_line(rows)
    table = Table(tmp_path / "t.arrow", SCHEMA)
    assert [tuple(table.row(n).values()) for n in range(len(table))] == rows
    assert table.tokens("ids")[ROWS_PER_BATCH].tolist() == rows[ROWS_PER_BATCH][1]
    assert table.identity() == identity
    to_parquet(tmp_path / "t.arrow")
    assert Table(tmp_path / "t.arrow", SCHEMA).identity() == identity
    with pytest.raises(IndexError):
        table.tokens("ids")[len(rows)]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_table(path, [(1, [5], True, "stop")], SCHEMA)
    with pytest.raises(RunDirError, match="another version wrote it"):
        Table(path, schema(ANSWERS))
    pyarrow.feather.write_feather(pa.table({"ids": [[1, None]]}, pa.schema([("ids", TOKENS)])), path, "uncompressed")
    with pytest.raises(RunDirError, match="damaged"):
        Table(path, pa.schema([("ids", TOKENS)]))
    path.write_bytes(b"")
    with pytest.raises(RunDirError, match="damaged"):
        Table(path, SCHEMA)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of pairs with about 300 tokens each."""
    directory = tmp_path_factory.mktemp("large")
    random_pairs(directory / "pairs.arrow", schema(ANSWERS), num_pairs=NUM_PAIRS)
    identity = Table(directory / "pairs.arrow", schema(ANSWERS)).identity()
    manifest = PairsManifest(opponent="o", data="d", answers=ANSWERS, num_pairs=NUM_PAIRS, counts={}, identity=identity)
    write_json(directory / "manifest.json", vars(manifest))
    return directory


def opened(directory: Path, check: bool, results: "multiprocessing.Queue[tuple[float, int]]") -> None:
    """Reports the seconds and the bytes of memory that it takes to open the pairs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = peak_memory(), time.monotonic()
    pairs = PairsFile(directory, answers=ANSWERS)
    if check:
        pairs.check()
    examples = examples_of(pairs.table, ANSWERS)
    assert len(examples) == NUM_PAIRS and examples[NUM_PAIRS - 1].longest
    results.put((time.monotonic() - started, peak_memory() - before))


def peak_memory() -> int:
    # Not getrusage: its peak of a new process begins with that of the process that started it.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("check", [False, True])
def test_a_million_pairs_take_seconds_and_200_megabytes(large: Path, check: bool) -> None:
    """Measured of a fifth of them, in a process of its own. The check of rank 0 needs buffers besides, whose size does
    not depend on the number of pairs.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=opened, args=(large, check, results))
    process.start()
    seconds, memory = results.get(timeout=120)
    process.join()
    print(f"{seconds:.2f} s, {memory / 2**20:.1f} MiB")
    assert memory <= (120e6 if check else 40e6)
    assert seconds < (20 if check else 2)


def test_examples_are_what_a_plain_reader_sees(large: Path) -> None:
    examples = examples_of(PairsFile(large).table, ANSWERS)
    table = pyarrow.feather.read_table(large / "pairs.arrow")
    for n in np.random.default_rng(1).integers(0, NUM_PAIRS, 200).tolist():
        row = table.slice(n, 1).to_pylist()[0]
        plain = Example(row["prompt_ids"], (row["real_ids"], row["generated_ids"]))
        assert examples[n].prompt_ids.tolist() == plain.prompt_ids
        assert [answer.tolist() for answer in examples[n].answers] == list(plain.answers)
        assert examples[n].lengths == plain.lengths
        assert examples[n].identical == plain.identical
