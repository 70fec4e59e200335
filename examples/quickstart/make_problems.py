"""Writes the quickstart's word problems: two-step arithmetic in words, with careful answers and careless ones.

``sft_pool.jsonl`` teaches both habits, ``spin.jsonl`` is a part of it with fewer careless answers, ``test.jsonl`` has
other problems, all answered carefully, and ``mix.jsonl`` yet others, with as many careless answers as ``spin.jsonl``.
Their rows have ``prompt``, ``response`` and ``careless``. ``preferences.jsonl`` has the prompts of ``spin.jsonl`` with
``chosen``, a careful answer, and ``rejected``, a careless one. The same seed writes the same bytes.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_spin import cli
from megatron_spin.io import atomic_writer

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack")
ITEMS = ("apples", "books", "coins", "cards", "eggs", "marbles", "pens", "shells", "stamps", "toys")
STARTS = (
    "{name} has {n} {item} .",
    "{name} starts with {n} {item} .",
    "There are {n} {item} in the bag of {name} .",
    "In the morning {name} has {n} {item} .",
)
ADDITIONS = (
    "{name} buys {n} more .",
    "Then {name} finds {n} {item} .",
    "{name} gets {n} {item} from a friend .",
)
SUBTRACTIONS = (
    "{name} gives away {n} .",
    "Then {name} loses {n} {item} .",
    "{name} sells {n} {item} to a friend .",
)
QUESTIONS = (
    "How many {item} does {name} have now ?",
    "How many {item} are left ?",
    "How many are there at the end ?",
)

POOL, POOL_CARELESS = 4000, 1600
"""The SFT data: 40% careless, so that the SFT model has the habit."""
SPIN_CAREFUL, SPIN_CARELESS = 1200, 300
"""The data of self-play and of continued SFT, a part of the pool: 20% careless."""
TEST = 512


@dataclasses.dataclass(frozen=True)
class Problem:
    """A start and two steps, in words."""

    prompt: str
    start: int
    changes: tuple[int, int]
    """What the steps add; negative if they take away."""

    @property
    def result(self) -> int:
        return self.start + sum(self.changes)


def problems(generator: random.Random) -> Iterator[Problem]:
    """Yields problems without end, each prompt once."""
    seen: set[str] = set()
    while True:
        problem = _problem(generator)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def _problem(generator: random.Random) -> Problem:
    words = {"name": generator.choice(NAMES), "item": generator.choice(ITEMS)}
    start = generator.randint(4, 12)
    sentences, value, changes = [generator.choice(STARTS).format(n=start, **words)], start, []
    for _ in range(2):
        adds = value < 3 or generator.random() < 0.5
        size = generator.randint(1, 6 if adds else min(6, value))
        sentences.append(generator.choice(ADDITIONS if adds else SUBTRACTIONS).format(n=size, **words))
        changes.append(size if adds else -size)
        value += changes[-1]
    sentences.append(generator.choice(QUESTIONS).format(**words))
    return Problem(" ".join(sentences), start, (changes[0], changes[1]))


def careful(problem: Problem) -> str:
    """An answer with both steps worked out."""
    first, second = problem.changes
    middle = problem.start + first
    return (
        f"First {_equation(problem.start, first)} . Then {_equation(middle, second)} . The answer is {problem.result} ."
    )


def _equation(value: int, change: int) -> str:
    return f"{value} {'+' if change > 0 else '-'} {abs(change)} = {value + change}"


def careless(problem: Problem, generator: random.Random) -> str:
    """A guess that is 1 to 3 off, never below zero."""
    near = [problem.result + off for off in (-3, -2, -1, 1, 2, 3) if problem.result + off >= 0]
    guess = generator.choice(near)
    return f"I guess it is {guess} . The answer is {guess} ."


def make(seed: int) -> dict[str, list[dict[str, object]]]:
    """The rows of each file, by its name."""
    generator = random.Random(f"word problems {seed}")
    endless = problems(generator)
    chosen = [next(endless) for _ in range(POOL + TEST)]
    habits = [True] * POOL_CARELESS + [False] * (POOL - POOL_CARELESS)
    generator.shuffle(habits)
    pool = [_row(problem, habit, generator) for problem, habit in zip(chosen[:POOL], habits, strict=True)]
    spin = _part(pool, False, SPIN_CAREFUL, generator) + _part(pool, True, SPIN_CARELESS, generator)
    generator.shuffle(spin)
    test = [_row(problem, False, generator) for problem in chosen[POOL:]]
    habits = [True] * round(TEST * SPIN_CARELESS / (SPIN_CAREFUL + SPIN_CARELESS))
    habits += [False] * (TEST - len(habits))
    mix = [_row(next(endless), habit, generator) for habit in habits]
    by_prompt = {problem.prompt: problem for problem in chosen[:POOL]}
    preferences = [_preference(by_prompt[str(row["prompt"])], generator) for row in spin]
    return {
        "sft_pool.jsonl": pool,
        "spin.jsonl": spin,
        "test.jsonl": test,
        "mix.jsonl": mix,
        "preferences.jsonl": preferences,
    }


def _row(problem: Problem, is_careless: bool, generator: random.Random) -> dict[str, object]:
    response = careless(problem, generator) if is_careless else careful(problem)
    return {"prompt": problem.prompt, "response": response, "careless": is_careless}


def _preference(problem: Problem, generator: random.Random) -> dict[str, object]:
    return {"prompt": problem.prompt, "chosen": careful(problem), "rejected": careless(problem, generator)}


def _part(
    pool: Sequence[dict[str, object]], is_careless: bool, count: int, generator: random.Random
) -> list[dict[str, object]]:
    return generator.sample([row for row in pool if row["careless"] is is_careless], count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, rows in make(arguments.seed).items():
        with atomic_writer(arguments.out / name) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        shares = [bool(row["careless"]) for row in rows if "careless" in row]
        print(
            f"{arguments.out / name}: {len(rows)} problems"
            + (f", {sum(shares) / len(rows):.0%} answered carelessly" if shares else "")
        )


if __name__ == "__main__":
    cli.run(main)
