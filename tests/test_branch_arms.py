"""Arms made of branches, which a suite records once per seed, with the same Θ0 as the trajectory."""

from dataclasses import replace

import pytest
import torch
from doubles.small_suites import make_task

from know_hf import WeightTrajectory
from know_hf.evaluation import compare_arms, known_step_arms, make_arm
from know_hf.evaluation.measure import arm_sources
from know_hf.evaluation.protocols import ZeroShot
from know_hf.evaluation.suites.suite_task import SuiteTask
from know_hf.known import KNOWNConfig, KNOWNModel
from know_hf.prediction.choosing.cross_fit import CROSS_FIT_FAMILY
from know_hf.prediction.tensor_contexts import tensor_contexts
from know_hf.predictors import KNOWNCombination, TensorSnapshots

HEAD = "classifier.weight"


@pytest.fixture(scope="module")
def suite():
    return make_task(
        schedule={"ratio": 0.5, "num_states": 2, "tail_states": 1},
        training={"use_cpu": True, "num_train_epochs": 2, "learning_rate": 0.01},
    )


@pytest.fixture(scope="module")
def sources(suite, tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("branches"), suite.comparison_task()
    trajectory = task.trajectory(3, folder / "trajectories" / "seed-3")
    split, targets = task.splits(3, 1)
    return arm_sources(task, 3, trajectory, split, folder / "work" / "seed-3.naive", targets)


def test_branches_are_recorded_once_from_the_same_start(sources, monkeypatch):
    branches = sources.branch_trajectory()
    assert [(record.num_examples, record.steps) for record in branches.branches] == [(20, 6)] * 2
    assert [branches.num_states, branches.schedule.branch_from] == [1, "start"]
    for name in sources.trajectory.names:
        assert torch.equal(branches.tensor(name), sources.trajectory.tensor(name)), name
    monkeypatch.setattr(SuiteTask, "_trainer", lambda *_, **__: pytest.fail("the branches were recorded before"))
    assert sources.branch_trajectory().path == branches.path


def test_branches_are_those_of_a_recording_from_scratch(suite, sources, tmp_path):
    branches = sources.branch_trajectory()
    suite._record(3, tmp_path / "scratch", tmp_path / "work", branches.schedule)
    copied, recorded = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (branches.path, tmp_path / "scratch")
    )
    assert copied == recorded


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("branch_average", lambda theta, branches: sum(branches) / 2),
        ("jackknife", lambda theta, branches: 2 * theta - sum(branches) / 2),
        ({"name": "x", "predictor": "average", "tuned": [{"predictor": "branch_average"}, {"state": 0}]}, None),
    ],
)
def test_predictions_from_branches_are_controls(sources, name, expected):
    arm, branches = make_arm(name), sources.branch_trajectory()
    assert arm.needs == ("branch_trajectory",)
    tensors = [branches.tensor(HEAD, record.name) for record in branches.branches]
    weights = arm.initial_model(sources, arm.settings[0]).state_dict()[HEAD]
    if expected is None:
        torch.testing.assert_close(weights, sum(tensors) / 2)
        return
    torch.testing.assert_close(weights, expected(branches.tensor(HEAD), tensors))
    assert arm.role == "control" and arm.training_cost(branches) == 1 + 12 / 10
    with pytest.raises(ValueError, match="needs branch_trajectory of the sources"):
        arm.initial_model(replace(sources, branch_trajectory=None))


def test_a_comparison_records_what_branches_cost(suite, tmp_path):
    arms = ["naive", "jackknife", "branch_average", {"name": "start-interpolation", "tuned": [{"scale": 0.5}]}]
    task = suite.comparison_task()
    report = compare_arms(task, tmp_path / "out", protocols=[ZeroShot()], arms=arms, seeds=[0, 1], pages=False)
    assert [cell["training_cost"] for cell in report.cells] == [1, 2.2, 2.2, 1] * 2
    assert not (tmp_path / "out" / "work").exists()


@pytest.fixture(scope="module")
def combination(tmp_path_factory):
    """A KNOWN whose coefficients are not zero."""
    model = KNOWNModel(KNOWNConfig(variant="combination"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder := tmp_path_factory.mktemp("combination"))
    return model, str(folder)


def test_a_combination_reads_start_states_and_tail(sources, combination):
    model, folder = combination
    (arm, _), nested = known_step_arms([1], "x", folder), sources.trajectory
    assert arm.needs == ()
    assert make_arm(arm.to_dict()) == arm
    snapshots = TensorSnapshots(
        nested.tensor(HEAD),
        start=nested.tensor(HEAD, "start"),
        states=[nested.tensor(HEAD, 1)],
        tail=[nested.tensor(HEAD, "tail-0")],
        context=tensor_contexts(nested)[HEAD],
    )
    expected = KNOWNCombination(model).tensor(snapshots)
    torch.testing.assert_close(arm.initial_model(sources).state_dict()[HEAD], expected)
    assert arm.training_cost(nested) == 1.3


def test_another_theta_0_is_an_error(suite, sources, tmp_path):
    def other(seed, folder, trajectory):
        return suite.branch_trajectory(seed + 1, folder, suite.record(seed + 1, tmp_path / "trajectories" / "other"))

    task = replace(suite.comparison_task(), branch_trajectory=other)
    trajectory = WeightTrajectory(sources.trajectory.path)
    with pytest.raises(ValueError, match=r"branch_trajectory\(3, .*another Θ0.*classifier"):
        arm_sources(task, 3, trajectory, None, tmp_path / "x").branch_trajectory()


def test_cross_fitting_writes_what_it_chose_and_records_its_cost(sources):
    arm, branches = make_arm("cross-fit"), sources.branch_trajectory()
    model, choice = arm.initial_weights(sources)
    assert choice["num_candidates"] == 1 + len(CROSS_FIT_FAMILY)
    assert choice["forward_passes"] == 40 * choice["num_candidates"]
    members = {candidate.name: candidate for candidate in CROSS_FIT_FAMILY}
    expected = branches.tensor(HEAD)
    assert choice["kept"] is (choice["chosen"] not in members)
    if not choice["kept"]:
        chosen = members[choice["chosen"]]
        spec = {"name": "x", "predictor": chosen.predictor, "options": chosen.options}
        expected = make_arm(spec).initial_model(sources).state_dict()[HEAD]
    torch.testing.assert_close(model.state_dict()[HEAD], expected)
    assert arm.role == "method" and arm.training_cost(branches) == 2.2
    with pytest.raises(ValueError, match=r"not the one that .* was recorded from"):
        arm.initial_model(replace(sources, train=sources.source))
