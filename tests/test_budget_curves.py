"""Budget curves against enumeration of all draws of b trials."""

from itertools import combinations

import numpy as np
import pytest
from doubles.simulated_report import simulated_report

from know_hf.evaluation.comparison import ACCURACY, LOSS
from know_hf.evaluation.report.budget_curves import budget_curves, budget_sentence, expected_best
from know_hf.evaluation.report.tables import budget_table


def draws(scores):
    """One draw per trajectory, with the validation score as test score."""
    return [
        [{"trials": [{"validation": {"accuracy": s, "loss": 0.0}, "test": {"accuracy": s}} for s in of_seed]}]
        for of_seed in scores
    ]


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_draws(budget):
    validation, test = [0.3, 0.9, 0.5, 0.7, 0.1], [0.35, 0.6, 0.8, 0.75, 0.2]
    worst_first = [test[i] for i in np.argsort(validation)]
    means = np.mean([test[max(drawn, key=validation.__getitem__)] for drawn in combinations(range(5), budget)])
    assert expected_best(worst_first, budget) == pytest.approx(means, rel=1e-12)


def test_a_diverged_training_leaves_a_gap_where_it_could_be_selected():
    assert expected_best([None, 0.5, 0.7], 1) is None
    assert expected_best([None, 0.5, 0.7], 2) == pytest.approx((0.5 + 2 * 0.7) / 3)


def test_equal_best_scores_need_equal_trials_only_where_one_trial_suffices():
    """An arm that has naive's best score at every rate reaches with one trial what naive reaches with all."""
    naive = [[0.5, 0.6, 0.8], [0.4, 0.6, 0.7], [0.5, 0.5, 0.9]]
    flat = [[max(of_seed)] * 3 for of_seed in naive]
    curves = budget_curves({"naive": draws(naive), "flat": draws(flat)}, [ACCURACY, LOSS])
    assert curves["trials"] == [1, 2, 3]
    assert curves["arms"]["naive"]["mean"][0] == pytest.approx(np.mean(naive))
    assert curves["arms"]["naive"]["naive_trials"] == [1, 2, 3]
    assert curves["arms"]["flat"]["mean"] == pytest.approx([0.8, 0.8, 0.8])
    assert curves["arms"]["flat"]["naive_trials"] == [3, 3, 3]
    differences = [difference["mean"] for difference in curves["arms"]["flat"]["minus_naive"]]
    assert differences == pytest.approx([0.8 - np.mean(naive), 0.8 - curves["arms"]["naive"]["mean"][1], 0])
    sentence = budget_sentence(curves, "a probe", ACCURACY, ["flat"], "trajectory seeds")
    assert "flat reaches 80.0%" in sentence and "naive needs 3 trials" in sentence and "80.0% with 3" in sentence


def test_draws_of_a_trajectory_are_averaged_before_the_statistics():
    naive = [[{"trials": draws([scores])[0][0]["trials"]} for scores in seed] for seed in np.ones((4, 2, 2)) * 0.5]
    other = [[*of_seed] for of_seed in naive]
    curves = budget_curves({"naive": naive, "other": other}, [ACCURACY, LOSS])
    assert curves["arms"]["other"]["minus_naive"][0] == {"mean": 0.0, "ci95": [0.0, 0.0], "p": 1.0}


def test_no_curves_without_tuning_or_spread():
    assert budget_curves({"naive": draws([[0.5], [0.6]])}, [ACCURACY, LOSS]) is None
    assert budget_curves({"naive": draws([[0.5, 0.6]])}, [ACCURACY, LOSS]) is None


def test_the_report_has_curves_of_tuned_protocols():
    report = simulated_report()
    assert [entry["protocol"] for entry in report["budgets"]] == ["few-shot"]
    assert budget_table(report, "source") is None
    rows = {row[0]: row for row in budget_table(report, "few-shot").rows}
    assert rows["known-1"][-1] == "more than 3" and rows["naive"][-1] == "1"
    old = {key: value for key, value in report.items() if key != "budgets"}
    assert budget_table(old, "few-shot") is None
