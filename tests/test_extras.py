"""A missing optional package is an error with the command that installs it from a clone."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from know_hf.evaluation.report.html_page import ReportSection, html_page
from know_hf.evaluation.statistics import mean_and_interval
from know_hf.evaluation.suites.suite_data import digits_in_frames
from know_hf.known import KNOWNConfig, KNOWNModel
from know_hf.known.kernels import prepare
from know_hf.plotting import plot_forgetting

ROOT = Path(__file__).parents[1]


def kernel(name):
    return prepare(KNOWNModel(KNOWNConfig(num_states=3)), "conv", name)


@pytest.mark.parametrize(
    ("module", "package", "extra", "call"),
    [
        ("scipy", "scipy", "compare", lambda: mean_and_interval([1.0, 2.0])),
        ("markdown_it", "markdown-it-py", "compare", lambda: html_page(ReportSection("report", "text"), [], {})),
        ("sklearn.datasets", "scikit-learn", "demo", lambda: digits_in_frames(16)),
        ("matplotlib.figure", "matplotlib", "plot", lambda: plot_forgetting([4, 2], [0.9, 0.8])),
        ("h5py", "h5py", "keras", lambda: KNOWNModel.from_keras("folder")),
        ("llvmlite", "llvmlite", "fast", lambda: kernel("cpu")),
        ("triton", "triton", "triton", lambda: kernel("triton")),
    ],
)
def test_a_missing_package_names_the_command(monkeypatch, module, package, extra, call):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, module, None)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(re.match(package, requirement) for requirement in extras[extra])
    command = f'in a clone of know_hf, run: pip install -c constraints.txt ".[{extra}]"'
    with pytest.raises(ImportError, match=re.escape(f"needs {package}; {command}")):
        call()


def test_no_other_hint_installs_from_the_index():
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "know_hf").rglob("*.py")}
    assert [path for path, text in texts.items() if re.search(r"pip install \S?know_hf", text)] == []


def test_the_table_of_tested_versions_has_the_bounds_and_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(requirement.split(">=") for requirement in project["dependencies"])
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    table = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$", table, re.MULTILINE)
    assert len(rows) == 8
    for name, low, suite in rows:
        assert (Version(low), suite) == (Version(lowest[name]), pinned[name]), name
