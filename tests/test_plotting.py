import sys

import numpy as np
import pytest

from know_hf.plotting import plot_forgetting, save_figure

SIZES = [1600, 800, 400]


def test_the_curve_is_the_mean_over_runs_with_the_sizes_below():
    runs = np.array([[0.9, 0.8, 0.6], [0.7, 0.6, 0.4]])
    axes = plot_forgetting(SIZES, runs, title="Forgetting here", chance=0.1).axes[0]
    mean = next(line for line in axes.lines if line.get_label() == "mean of 2 runs")
    assert mean.get_ydata() == pytest.approx([0.8, 0.7, 0.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Θ0\n1,600 (all)", "Θ1\n800", "Θ2\n400"]
    assert [text.get_text() for text in axes.texts] == ["0.800", "0.700", "0.500"]
    assert axes.get_title() == "Forgetting here"
    assert "accuracy" in axes.get_ylabel()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["2 single runs", "mean of 2 runs", "guessing: 0.10"]


def test_one_run_is_drawn_alone():
    axes = plot_forgetting(SIZES, [0.9, 0.8, 0.6]).axes[0]
    assert [line.get_label() for line in axes.lines] == ["one run"]


def test_a_figure_is_written_without_pyplot(tmp_path):
    before = set(sys.modules)
    path = save_figure(plot_forgetting(SIZES, [0.9, 0.8, 0.6]), tmp_path / "new" / "forgetting.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_scores_that_do_not_fit_the_states_are_an_error():
    with pytest.raises(ValueError, match="scores of shape \\(2,\\) do not give one score to each of 3 states"):
        plot_forgetting(SIZES, [0.9, 0.8])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="know_hf\\[plot\\]"):
        plot_forgetting(SIZES, [0.9, 0.8, 0.6])
