from collections import Counter

import numpy as np
import pytest

from know_hf.evaluation import compare_with_naive, holm
from know_hf.evaluation.comparison import LOSS
from know_hf.evaluation.statistics import minimum_detectable_effect


def simulated(random, effects, num_seeds=12, draws=4, of_trajectory=1.0, of_draw=0.5):
    """Scores of arms whose differences from naive vary with the trajectory, and less with the draw."""
    shared = random.randn(num_seeds, 1) + 0.5 * random.randn(num_seeds, draws)
    scores = {"naive": shared}
    for name, effect in effects.items():
        noise = of_trajectory * random.randn(num_seeds, 1) + of_draw * random.randn(num_seeds, draws)
        scores[name] = shared + effect + noise
    return {name: values.tolist() for name, values in scores.items()}


def test_draws_that_are_alike_cause_no_false_positives():
    random, names, false, false_if_independent = np.random.RandomState(1), [f"arm-{i}" for i in range(6)], 0, 0
    for _ in range(100):
        scores = simulated(random, dict.fromkeys(names, 0.0))
        one_by_one = {name: [v for of_seed in values for v in of_seed] for name, values in scores.items()}
        comparison, independent = compare_with_naive(scores, names), compare_with_naive(one_by_one, names)
        false += bool(comparison.better or comparison.worse)
        false_if_independent += bool(independent.better or independent.worse)
    assert false / 100 < 0.08  # the level is 0.05 for all six arms together
    assert false_if_independent / 100 > 0.3


def test_planted_effects_are_detected_and_nulls_are_not():
    random, effect = np.random.RandomState(2), 1.25 * minimum_detectable_effect(12, 0.05 / 6)
    effects, detected = {"good": effect, "bad": -effect, **{f"null-{i}": 0.0 for i in range(4)}}, Counter()
    for _ in range(100):
        comparison = compare_with_naive(simulated(random, effects, of_draw=0.0), list(effects))
        detected.update({"good"} & {*comparison.better} | {"bad"} & {*comparison.worse})
        detected["null"] += any(name.startswith("null") for name in comparison.better + comparison.worse)
    assert detected["good"] > 80 and detected["bad"] > 80 and detected["null"] < 8


@pytest.mark.parametrize(
    ("methods", "controls", "limit"),
    [
        (1, {"shrink": 0.0, "average": 0.0}, 0.025),
        (9, {"shrink": None}, 0.045),  # about 0.2 without a correction for the nine methods
    ],
)
def test_methods_like_their_controls_are_rarely_better_than_all(methods, controls, limit):
    random, false, names = np.random.RandomState(7), 0, [f"method-{i}" for i in range(methods)]
    effects = {name: effect for name, effect in controls.items() if effect is not None}
    for _ in range(120):
        scores = simulated(random, {**dict.fromkeys(names, 0.0), **effects})
        for name in controls.keys() - effects.keys():  # a control like naive
            scores[name] = [[v + 1e-9 * random.randn() for v in of_seed] for of_seed in scores["naive"]]
        comparison = compare_with_naive(scores, [*names, *controls], controls=list(controls))
        false += bool(comparison.better_than_controls)
    assert false / 120 < limit


def test_a_method_worse_than_naive_is_not_better_than_every_control():
    scores = simulated(np.random.RandomState(5), {"method": -2.0, "average": -5.0}, of_trajectory=0.3)
    comparison = compare_with_naive(scores, ["method", "average"], controls=["average"])
    against = comparison.against_controls["method"]
    assert comparison.worse == ("method", "average") and against.differences["average"].mean > 0
    assert comparison.better_than_controls == () and against.hardest == "naive" and against.p_value > 0.9


def test_a_method_must_be_better_than_every_control():
    scores = simulated(np.random.RandomState(4), {"method": 3.0, "equal": 3.0, "shrink": 0.0}, of_trajectory=0.3)
    without = {name: values for name, values in scores.items() if name != "equal"}
    alone = compare_with_naive(without, ["method", "shrink"], controls=["shrink"])
    assert alone.better_than_controls == ("method",)
    assert "method is better than naive and every control." in alone.verdict_on_methods()
    both = compare_with_naive(scores, ["method", "equal", "shrink"], controls=["equal", "shrink"])
    assert both.better_than_controls == () and both.against_controls["method"].hardest == "equal"
    assert "no method" in both.verdict_on_methods() and "method minus equal" in both.verdict_on_methods()


def test_positive_controls():
    random = np.random.RandomState(5)
    scores = simulated(random, {"random": 0.0, "good": 5.0, "oracle": 6.0})
    comparison = compare_with_naive(scores, ["good"], "transfer")
    assert comparison.better == ("good",) and comparison.valid is False and comparison.headroom is True
    assert "positive control failed" in comparison.verdict() and "good" not in comparison.verdict()
    scores["random"] = (np.array(scores["naive"]) - 3 + 0.1 * random.randn(*np.shape(scores["naive"]))).tolist()
    assert compare_with_naive(scores, ["good"]).valid is True
    assert compare_with_naive({**scores, "pretrained": scores["naive"]}, ["good"]).valid is False
    del scores["random"]
    comparison = compare_with_naive(scores, ["good"])
    assert comparison.valid is None and comparison.headroom is True
    assert "oracle beats naive" in comparison.validity() and "unknown" in comparison.validity()


def test_a_lower_loss_is_better():
    effects = {"random": 4.0, "oracle": -4.0, "low": -4.0, "high": 4.0}
    scores = simulated(np.random.RandomState(6), effects, of_trajectory=0.3)
    comparison = compare_with_naive(scores, ["low", "high"], "loss", measure=LOSS)
    assert (comparison.better, comparison.worse) == (("low",), ("high",))
    assert comparison.valid is True and comparison.headroom is True


SCORES = {
    "naive": [0.50, 0.52, 0.48, 0.51],
    "random": [0.40, 0.43, 0.37, 0.41],
    "good": [0.55, 0.575, 0.53, 0.562],
    "same": [0.501, 0.519, 0.481, 0.509],
    "bad": [0.40, 0.42, 0.385, 0.41],
    "oracle": [0.60, 0.61, 0.58, 0.615],
}


def test_a_better_arm_is_named_with_its_difference():
    comparison = compare_with_naive(SCORES, ["good", "same", "bad"], "transfer")
    assert (comparison.better, comparison.worse) == (("good",), ("bad",))
    assert comparison.verdict().startswith("Transfer: good (+5.2 points, 95% interval [+4.")
    assert "4 seeds, Holm-corrected for 3 arms" in comparison.verdict()
    assert "the positive control passed: naive beats" in comparison.validity()
    assert "power of 80%" in comparison.sensitivity()
    data = comparison.to_dict()
    assert data["good"]["mean"] == pytest.approx(0.55425) and data["good"]["per_seed"] == SCORES["good"]
    assert data["good"]["ci95"][0] < 0.55425 < data["good"]["ci95"][1]
    p_values = {name: data[name]["minus_naive"]["p"] for name in ("good", "same", "bad")}
    assert {name: data[name]["minus_naive"]["p_holm"] for name in p_values} == holm(p_values)
    assert data["oracle"]["minus_naive"]["p_holm"] is None and "minus_naive" not in data["naive"]
    sentences = {"verdict": comparison.verdict(), "validity": comparison.validity()}
    assert comparison.to_record() == {"what": "transfer", "arms": data, **sentences}


@pytest.mark.parametrize(
    ("scores", "candidates", "words"),
    [
        (SCORES, ["same", "bad"], ["no arm is significantly better", "best is same with +0.0 points", "worse: bad"]),
        ({name: SCORES[name] for name in ("naive", "same")}, ["same"], ["no positive control"]),
        ({name: SCORES[name] for name in ("naive", "random", "oracle")}, [], ["references only"]),
        ({**SCORES, "oracle": SCORES["naive"][::-1]}, ["same"], ["does not significantly beat naive", "inconclusive"]),
    ],
)
def test_verdicts_without_a_better_arm(scores, candidates, words):
    comparison = compare_with_naive(scores, candidates)
    assert all(word in comparison.validity() + comparison.verdict() for word in words)


def test_a_table_has_one_line_per_arm_and_aligned_columns():
    lines = compare_with_naive(SCORES, ["good", "same", "bad"]).table({"rate": {"good": "1e-2"}}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(SCORES)
    assert lines[4].split()[-1] == "1e-2" and "reference" in lines[3]
    assert len({line.index("]") for line in lines[2:]}) == 1


def test_an_equal_gain_at_every_seed_fails_the_positive_control():
    scores = {"naive": [0.5, 0.7], "random": [0.25, 0.45], "method": [0.6, 0.8], "shrink": [0.5, 0.71]}
    comparison = compare_with_naive(scores, ["method", "shrink"], controls=["shrink"])
    assert comparison.better == comparison.better_than_controls == ()
    assert comparison.valid is False and comparison.without_spread == ("random", "method")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"naive": [[1.0, 2.0]] * 2, "x": [[1.0, 2.0], [1.0]]}, r"'x' \[2, 1\]"),
        ({"naive": [[], [1.0]], "x": [[], [1.0]]}, "not finite"),
        ({"x": [1.0, 2.0]}, "'naive' has no scores"),
        ({"naive": [1.0, 2.0]}, "'x' has no scores"),
    ],
)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_missing_scores_are_errors(scores, message):
    with pytest.raises(ValueError, match=message):
        compare_with_naive(scores, ["x"])
