"""The judgement of the guards on figures made for each of them; tests/e2e/test_guards.py provokes them for real."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spin.config import GuardsConfig, from_dict, to_yaml
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.errors import ConfigError
from megatron_spin.evaluation.guards import Measures, Verdict, judge, outcome
from megatron_spin.evaluation.record import Evaluation
from megatron_spin.run.step_metrics import StepMetrics

STEPS = 40
BASE: dict[str, Any] = {"name": "n", "model": {"hf": "m"}, "data": {"path": "d"}}


def curve(
    *, change: float = 3.0, margin: float = 1.0, accuracy: float = 0.7, identical: float = 0.25, noise: float = 0.0
) -> list[dict[str, Any]]:
    """Steps in which real answers of -20 nats change by ``change`` nats in a straight line, under beta 0.1."""
    rows = []
    for step in range(1, STEPS + 1):
        moved = (step - 1) / (STEPS - 1) * change + noise * (-1) ** step
        batch = -20 + 5 * math.sin(step)  # batches differ by more than the change
        rows.append(
            {
                "step": step,
                "margin": margin * (step - 1) / STEPS,
                "accuracy": accuracy if step > 1 else 0.0,
                "identical": identical,
                "pairs": 64,
            }
        )
        rows[-1] |= {"real_logps": batch + moved, "real_reward": 0.1 * moved}
    return rows


def evaluation(**changes: Any) -> Evaluation:
    healthy = {
        "model": "0" * 64,
        "num_prompts": 400,
        "nll_per_token": 1.0,
        "nll_per_token_error": 0.01,
        "truncated_fraction": 0.05,
        "truncated_fraction_greedy": 0.02,
        "mean_response_tokens": 100.0,
        "mean_real_tokens": 110.0,
        "repeated_fraction": 0.03,
        "repeated_fraction_greedy": 0.05,
        "repeated_fraction_real": 0.02,
    }
    return Evaluation.from_json(healthy | changes)


def manifest(num_pairs: int, *, identical: int) -> PairsManifest:
    return PairsManifest(
        opponent="o",
        data="d",
        answers=("real", "generated"),
        num_pairs=num_pairs,
        counts={"identical": identical},
        identity="i",
    )


def measures(
    *, identical: int = 300, steps: list[dict[str, Any]] | None = None, opponent: Any = None, **policy: Any
) -> Measures:
    return Measures(
        beta=0.1,
        steps=rows(curve() if steps is None else steps),
        pairs=manifest(1000, identical=identical),
        policy=evaluation(**policy),
        opponent=evaluation(**(opponent or {})),
    )


def rows(steps: list[dict[str, Any]]) -> list[StepMetrics]:
    return [StepMetrics(step["step"], step) for step in steps]


def tripped(seen: Measures, guards: GuardsConfig | None = None) -> list[str]:
    return [verdict.guard for verdict in judge(guards or GuardsConfig(), seen) if verdict.tripped]


def value(seen: Measures, guard: str) -> float | None:
    return next(verdict.value for verdict in judge(GuardsConfig(), seen) if verdict.guard == guard)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (measures(), []),
        (measures(steps=curve(change=-5.0)), ["real_logps_fall"]),
        (measures(steps=curve(change=-5.0, margin=-1.0)), []),  # the margin fell: not this disease
        (measures(steps=curve(change=-1.0)), []),
        (measures(steps=curve(change=-2.3, noise=8.0)), []),  # beyond the threshold, within the noise
        (measures(nll_per_token=1.2), ["nll_rise"]),
        (measures(nll_per_token=1.2, nll_per_token_error=0.2), []),
        (measures(nll_per_token=0.0009, opponent={"nll_per_token": 0.0005}), []),  # nothing to lose
        (measures(nll_per_token=math.inf, nll_per_token_error=math.nan), ["nll_rise"]),
        (measures(nll_per_token=0.8, opponent={"nll_per_token": math.nan}), ["nll_rise"]),
        (measures(truncated_fraction=0.3), ["end_of_answer"]),
        # what samples hide
        (measures(truncated_fraction=0.0, truncated_fraction_greedy=0.96, nll_per_token=0.9), ["end_of_answer"]),
        (measures(truncated_fraction=0.6, opponent={"truncated_fraction": 0.9}), []),  # as bad as it is, it got better
        # one of eight prompts
        (measures(truncated_fraction=0.125, num_prompts=8, opponent={"truncated_fraction": 0.0}), []),
        (measures(mean_response_tokens=60.0), ["length"]),
        (measures(mean_response_tokens=170.0), ["length"]),
        (measures(mean_response_tokens=0.0), ["length"]),
        # on the way to the real length
        (measures(mean_response_tokens=50.0, opponent={"mean_response_tokens": 30.0}), []),
        (measures(mean_response_tokens=math.nan), ["length"]),
        (measures(repeated_fraction=0.4), ["repetition"]),
        (measures(repeated_fraction_greedy=0.5), ["repetition"]),
        (measures(repeated_fraction=0.4, opponent={"repeated_fraction": 0.5}), []),
        (measures(repeated_fraction=0.4, repeated_fraction_real=0.45), []),
        (measures(identical=960), ["converged"]),
        (measures(steps=curve(accuracy=0.75)), ["saturated"]),  # all of the three quarters that differ
        (measures(steps=curve(accuracy=0.75, identical=0.0)), []),
        (measures(steps=curve(accuracy=0.0, identical=1.0)), []),  # nothing to win
    ],
)
def test_each_guard_trips_on_its_own_figure(seen: Measures, expected: list[str]) -> None:
    assert tripped(seen) == expected


def test_values_are_in_the_thresholds_unit() -> None:
    steps = curve(change=-5.0)
    last = steps[-4:]
    opponent = sum(row["real_logps"] - row["real_reward"] / 0.1 for row in last)
    assert value(measures(steps=steps), "real_logps_fall") == pytest.approx(
        sum(row["real_reward"] / 0.1 for row in last) / opponent
    )
    assert value(measures(nll_per_token=1.2), "nll_rise") == pytest.approx(0.2)
    assert value(measures(truncated_fraction=0.3), "end_of_answer") == pytest.approx(0.25)
    assert value(measures(mean_response_tokens=200.0), "length") == pytest.approx(200 / 110)
    assert value(measures(mean_response_tokens=50.0), "length") == pytest.approx(2.0)
    assert value(measures(repeated_fraction_greedy=0.5), "repetition") == pytest.approx(0.45)
    assert value(measures(), "converged") == 0.3


@pytest.mark.parametrize(("first", "expected"), [(2, True), (5, True), (6, False), (STEPS - 1, False)])
def test_saturated_counts_the_steps_until_it_stays_so(first: int, expected: bool) -> None:
    steps = curve(accuracy=0.75)
    for row in steps[: first - 1]:
        row["accuracy"] = 0.7
    seen = measures(steps=steps)
    assert ("saturated" in tripped(seen)) is expected
    assert value(seen, "saturated") == (first if first <= STEPS - 2 else None)
    steps[-1]["accuracy"] = 0.0  # more than one in a hundred was lost later on
    assert value(measures(steps=steps[: first + 10]), "saturated") in (first, None)
    assert value(measures(steps=steps), "saturated") is None


def test_what_is_not_there_is_said_and_does_not_trip() -> None:
    blind = Measures(0.1, rows(curve()), manifest(10, identical=1))
    unseen = {verdict.guard: verdict.said for verdict in judge(GuardsConfig(), blind) if verdict.tripped is None}
    assert list(unseen) == ["nll_rise", "end_of_answer", "length", "repetition"]
    for said in unseen.values():
        assert "no evaluation" in said
    older = measures(repeated_fraction=None, steps=[{**row, "identical": None} for row in curve()])
    assert {verdict.guard for verdict in judge(GuardsConfig(), older) if verdict.tripped is None} == {
        "repetition",
        "saturated",
    }


def guards_of(**sections: Any) -> GuardsConfig:
    return from_dict({**BASE, "guards": sections}).guards


def test_the_gravest_action_counts_and_off_does_not_look() -> None:
    bad = measures(nll_per_token=2.0, mean_response_tokens=10.0, identical=1000)
    assert outcome(judge(GuardsConfig(), bad)) == "warn"
    assert outcome(judge(GuardsConfig(), measures())) == "pass"
    # A bare off is YAML's false.
    guards = guards_of(nll_rise={"action": "rollback"}, length={"action": "stop"}, converged={"action": False})
    assert outcome(judge(guards, bad)) == "stop"
    assert "converged" not in [verdict.guard for verdict in judge(guards, bad)]
    assert outcome(judge(guards_of(nll_rise={"action": "rollback"}), bad)) == "rollback"
    assert outcome(judge(guards_of(nll_rise={"action": "rollback"}), measures())) == "pass"


def test_a_line_says_what_was_measured_the_threshold_and_what_to_do() -> None:
    for verdict in judge(GuardsConfig(), measures(nll_per_token=2.0)):
        line = verdict.line
        assert verdict.said in line
        assert f"guards.{verdict.guard}.threshold is {verdict.threshold:g}: " in line
        assert "\n" not in line
    line = judge(GuardsConfig(), measures(nll_per_token=2.0))[1].line
    assert "held-out NLL per token is 2.0000, the opponent's 1.0000 (+100%)" in line


def test_settings_survive_yaml_and_are_checked(tmp_path: Path) -> None:
    from megatron_spin.config import load_config
    from megatron_spin.config.resume import changes

    config = from_dict({**BASE, "guards": {"length": {"action": "off", "threshold": 2}, "saturated": {"threshold": 9}}})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert load_config(path, ["guards.length.action=off"]) == config
    made = {"prepare", "import", "train:0", "evaluate:0"}
    assert {change.phase for change in changes(config, from_dict(BASE), made)} == {None}  # may change in a run
    for bad, message in {
        "guards.nll_rise.threshold=-1": "guards.nll_rise.threshold=-1.0 must not be negative",
        "guards.length.threshold=0.5": "guards.length.threshold=0.5 must be at least 1",
        "guards.converged.threshold=95": "must lie between 0 and 1",
        "guards.nll_rise.action=abort": "guards.nll_rise.action: 'abort' is not one of off, warn, stop, rollback",
        "guards.nll_raise.action=warn": "did you mean guards.nll_rise",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(path, [bad])


floats = st.floats(allow_nan=True, allow_infinity=True)
shares = st.one_of(st.floats(0, 1), st.just(math.nan))


@given(
    nll=st.tuples(floats, floats),
    share=st.tuples(shares, shares),
    tokens=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6)),
    change=floats,
    identical=st.integers(0, 1000),
    prompts=st.integers(1, 10**6),
)
def test_any_figures_give_a_verdict_of_every_guard(
    nll: tuple[float, float],
    share: tuple[float, float],
    tokens: tuple[float, float, float],
    change: float,
    identical: int,
    prompts: int,
) -> None:
    policy = {
        "nll_per_token": nll[0],
        "num_prompts": prompts,
        "truncated_fraction": share[0],
        "repeated_fraction_greedy": share[0],
    }
    policy |= {"mean_response_tokens": tokens[0], "mean_real_tokens": tokens[1]}
    opponent = {
        "nll_per_token": nll[1],
        "truncated_fraction": share[1],
        "repeated_fraction_greedy": share[1],
        "mean_response_tokens": tokens[2],
    }
    steps = curve()
    steps[-1] |= {"real_reward": change, "margin": change}
    verdicts: list[Verdict] = judge(
        GuardsConfig(), measures(steps=steps, identical=identical, opponent=opponent, **policy)
    )
    assert [verdict.guard for verdict in verdicts] == list(GuardsConfig().by_name())
    for verdict in verdicts:
        assert verdict.tripped is not None
        assert verdict.line
    if math.isnan(nll[0]) or math.isnan(share[0]):
        assert any(verdict.tripped for verdict in verdicts)


@given(nll=st.floats(0.1, 10), threshold=st.floats(0, 3), more=st.floats(0, 3))
def test_a_higher_threshold_never_trips_on_what_a_lower_one_passes(nll: float, threshold: float, more: float) -> None:
    low, high = (
        tripped(measures(nll_per_token=nll), guards_of(nll_rise={"threshold": limit}))
        for limit in (threshold, threshold + more)
    )
    assert set(high) <= set(low)
