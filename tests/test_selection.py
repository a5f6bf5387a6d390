"""Choosing among candidates by their losses on the same examples."""

import json
from dataclasses import replace

import numpy as np
import pytest

from know_hf.prediction import choose
from know_hf.prediction.choosing.screening import screen_and_choose


def noise(random, kind, size):
    if kind == "normal":
        return random.normal(size=size)
    if kind == "skewed":
        return random.exponential(size=size) - 1
    if kind == "heavy right tail":
        return np.exp(1.5 * random.normal(size=size)) - np.exp(1.5**2 / 2)
    return 5.0 * (random.random(size) < 0.02) - 0.1  # rare disasters: mean 0, most values below it


@pytest.mark.parametrize("kind", ["normal", "heavy right tail", "rare disasters"])
@pytest.mark.parametrize("count", [20, 200])
def test_noise_is_rarely_chosen(kind, count):
    random = np.random.default_rng(count)
    chosen = 0
    for run in range(60):
        reference = random.exponential(size=count)
        own = noise(random, kind, (6, count))
        losses = {f"candidate {k}": reference + 0.3 * values for k, values in enumerate(own)}
        result = choose({"Θ0": reference, **losses}, num_resamples=199, seed=run)
        chosen += not result.is_reference
    # level 0.05; of 60 runs 9 or more are seen with probability 0.003 then
    assert chosen <= 8


def chosen_of_30(random, kind, count, gain, run, **options):
    """Choose among 30 candidates, of which the first is better by `gain` and the others are noise."""
    reference = random.exponential(size=count)
    losses = {"Θ0": reference} | {str(k): reference + 0.3 * noise(random, kind, count) for k in range(30)}
    losses["0"] = losses["0"] - gain

    def evaluate(name, numbers):
        return losses[name] if numbers is None else losses[name][numbers]

    return screen_and_choose(list(losses), evaluate, seed=run, num_resamples=199, **options)


def test_a_table_shows_the_best_candidates_and_the_requested_one():
    reference = np.random.default_rng(0).exponential(size=20)
    random = np.random.default_rng(1)
    losses = {str(k): reference + 0.01 * k + 0.001 * random.normal(size=20) for k in range(1, 31)}
    result = replace(choose({"Θ0": reference, **losses}, num_resamples=199), requested="29")
    names = [line.split()[0] for line in result.table.splitlines()[1:-1]]
    assert names == ["Θ0", *map(str, range(1, 11)), "29"]
    assert result.table.splitlines()[-1] == "19 more in the model card"


@pytest.mark.parametrize(("kind", "count"), [("normal", 40), ("normal", 100), ("skewed", 100)])
def test_theta_0_is_kept_in_95_percent_of_1000_runs_with_30_planted_nulls(kind, count):
    random = np.random.default_rng(0)
    kept = sum(chosen_of_30(random, kind, count, 0.0, run).is_reference for run in range(1000))
    assert kept >= 950


@pytest.mark.parametrize(("count", "screens"), [(40, False), (100, True)])
def test_a_planted_gain_among_30_candidates_is_found(count, screens):
    random = np.random.default_rng(0)
    results = [chosen_of_30(random, "normal", count, 0.3, run) for run in range(50)]
    assert sum(result.chosen == "0" for result in results) >= 48
    assert {bool(result.screened) for result in results} == {screens}
    if screens:
        assert {(len(r.candidates), len(r.screened), r.num_values, r.num_screening_values) for r in results} == {
            (6, 25, 80, 20)
        }


def test_screening_can_be_turned_off_and_skips_what_is_not_finite():
    random = np.random.default_rng(0)
    result = chosen_of_30(random, "normal", 100, 0.3, 0, screening=0.0)
    assert (result.num_values, result.num_screening_values, len(result.candidates)) == (100, 0, 31)
    losses = {"Θ0": np.linspace(1, 2, 100)} | {str(k): np.full(100, np.nan) for k in range(9)}
    result = screen_and_choose(list(losses), lambda name, numbers: losses[name][numbers or slice(None)])
    assert result.is_reference and len(result.screened) == 9
    assert "no other candidate has a finite" in result.sentence
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_largest_gain_is_chosen():
    random = np.random.default_rng(0)
    chosen = []
    for run in range(20):
        reference = random.exponential(size=200)
        losses = {"Θ0": reference}
        for gain in (0.0, 0.1, 0.2, 0.4):
            losses[f"gain {gain}"] = reference - gain + 0.5 * random.normal(size=200)
        result = choose(losses, num_resamples=199, seed=run)
        chosen.append(result.chosen)
        best = next(candidate for candidate in result.candidates if candidate.name == "gain 0.4")
        assert best.low < -0.4 < best.high
    assert chosen == ["gain 0.4"] * 20


def test_intervals_cover_all_candidates_at_once():
    random = np.random.default_rng(1)
    missed = 0
    for run in range(60):
        reference = random.exponential(size=100)
        losses = {str(k): reference + 0.1 * k + random.normal(size=100) for k in range(6)}
        result = choose({"Θ0": reference, **losses}, num_resamples=199, seed=run)
        missed += any(not c.low < 0.1 * k < c.high for k, c in enumerate(result.candidates[1:]))
    assert missed <= 8


def test_one_candidate_of_normal_values_agrees_with_the_t_test():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(2)
    reference = random.normal(size=400)
    other = reference + random.normal(-0.1, 1, size=400)
    result = choose({"Θ0": reference, "other": other}, num_resamples=9999)
    test = stats.ttest_rel(other, reference)
    candidate = result.candidates[1]
    assert candidate.p_value == pytest.approx(test.pvalue, abs=0.01)
    interval = test.confidence_interval(0.95)
    assert [candidate.low, candidate.high] == pytest.approx([interval.low, interval.high], abs=0.005)


def test_more_candidates_need_more_evidence():
    random = np.random.default_rng(3)
    reference = random.normal(size=100)
    noise = random.normal(size=100)
    good = reference + noise - noise.mean() - 0.2
    alone = choose({"Θ0": reference, "good": good}).candidates[1]
    others = {str(k): reference + random.normal(size=100) for k in range(20)}
    among = choose({"Θ0": reference, "good": good, **others}).candidates[1]
    assert among.p_value > 2 * alone.p_value
    assert among.high - among.low > 1.3 * (alone.high - alone.low)


def test_a_gain_must_exceed_the_margin_and_the_dictionary_has_every_candidate():
    random = np.random.default_rng(4)
    reference = random.normal(size=100)
    losses = {"Θ0": reference, "good": reference - 0.2 + 0.1 * random.normal(size=100)}
    assert choose(losses, margin=0.1).chosen == "good"
    refused = choose(losses, margin=0.3)
    assert refused.is_reference and "below -0.3 (95%" in refused.rule
    result = choose(losses, metric="error")
    record = result.to_dict()
    assert (record["metric"], record["chosen"], list(record["scores"])) == ("error", "good", ["Θ0", "good"])
    assert record["sentence"] in str(result) and record["rule"] in str(result) and "below 0 (95%" in record["rule"]
    assert record["candidates"][1]["p_value"] == result.candidates[1].p_value


def test_losses_that_are_not_finite_or_have_no_spread_are_not_chosen():
    reference = np.linspace(1, 2, 20)
    result = choose({"Θ0": reference, "diverged": [*reference[:-1] - 1, np.nan], "shifted": reference - 0.5})
    assert result.is_reference
    diverged, shifted = result.candidates[1:]
    assert (diverged.loss, diverged.p_value) == (None, None)
    assert (shifted.difference, shifted.low, shifted.high, shifted.p_value) == (-0.5, None, None, None)
    assert result.scores == {"Θ0": 1.5, "shifted": 1.0}

    assert "validation loss 1, 0.5 below Θ0 on every value" in result.sentence
    assert "only if a margin is set" in result.rule


def test_equal_differences_are_chosen_by_the_margin_alone():
    random = np.random.default_rng(6)
    reference = random.exponential(size=50).astype(np.float32)
    moved = [reference - np.float32(0.3), reference - np.float32(0.1)]
    losses = {"Θ0": reference, "more": moved[0], "less": moved[1], "noisy": reference + random.normal(size=50)}
    assert moved[0].astype(float).std() != reference.astype(float).std()  # but for the rounding of float32
    assert choose(losses).is_reference and choose(losses, margin=0.0).is_reference
    assert choose(losses, margin=0.4).is_reference
    result = choose(losses, margin=0.2)
    assert result.chosen == "more"
    assert "Chose more:" in result.sentence and "0.3 below Θ0 on every value" in result.sentence
    assert "more than 0.2" in result.rule
    assert result.candidates[3].p_value is not None
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_gain_on_a_single_example_is_not_enough():
    result = choose({"Θ0": np.ones(20), "lucky": np.r_[0.0, np.ones(19)]})
    assert result.is_reference and result.candidates[1].low is None
    assert "interval unbounded" in result.sentence
    json.dumps(result.to_dict(), allow_nan=False)


def test_one_number_is_compared_with_the_margin():
    losses = {"Θ0": 1.0, "a": 0.95, "b": 0.92}
    assert choose(losses, margin=0.1).is_reference
    result = choose(losses, margin=0.06)
    assert result.chosen == "b"
    assert "no test" in result.rule
    assert result.sentence == "Chose b: validation loss 0.92, 0.08 below Θ0; 2 candidates."


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ({"a": [1.0] * 10}, {}, "no 'Θ0'"),
        ({"Θ0": 1.0, "a": 0.5}, {}, "one number.*margin="),
        ({"Θ0": [1.0] * 9, "a": [0.5] * 9}, {}, "9 losses of Θ0.*10"),
        ({"Θ0": [], "a": []}, {}, "0 losses of Θ0"),
        ({"Θ0": [1.0] * 9 + [np.nan], "a": [0.5] * 10}, {}, "losses of Θ0.*finite"),
        ({"Θ0": [1.0] * 10, "a": [0.5] * 11}, {}, r"a has losses of shape \(11,\).*\(10,\)"),
        ({"Θ0": [1.0] * 10}, {"level": 1.0}, "level.*1.0"),
        ({"Θ0": [1.0] * 10}, {"margin": -0.1}, "margin.*-0.1"),
    ],
)
def test_losses_that_cannot_be_compared_are_an_error(losses, options, message):
    with pytest.raises(ValueError, match=message):
        choose(losses, **options)
