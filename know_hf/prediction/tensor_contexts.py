"""What a trajectory records about its tensors besides the weights, for predictors of complete tensors."""

import re
from collections.abc import Mapping

from ..known import TensorContext
from ..predictors import relative_depths
from ..roles import TensorRole
from ..trajectory import WeightTrajectory
from ..trajectory.summary import loss_names


def tensor_contexts(trajectory: WeightTrajectory) -> dict[str, TensorContext]:
    """Return role, depth and recorded values of every tensor, by name.

    The share of data is relative to state 0. Of several losses, the first whose name has `train` is that of training,
    and the first other one that of evaluation.
    """
    states, first = trajectory.states, trajectory.states[0]
    if first.num_examples:
        fractions = tuple(None if s.num_examples is None else s.num_examples / first.num_examples for s in states)
    else:
        fractions = tuple(state.fraction for state in states)
    names = loss_names({name for state in states for name in state.metrics})
    train, evaluated = ([name for name in names if ("train" in name) is is_train] for is_train in (True, False))
    losses = [tuple(state.metrics.get(name) for state in states) for group in (train, evaluated) for name in group[:1]]
    depths, normalised = relative_depths(trajectory.names), followed_by_norm(trajectory.roles)
    return {
        name: TensorContext(
            trajectory.roles[name].role,
            depths[name],
            name in normalised,
            fractions,
            tuple(state.steps for state in states),
            losses[0] if train else (),
            losses[-1] if evaluated else (),
        )
        for name in trajectory.names
    }


def followed_by_norm(roles: Mapping[str, TensorRole]) -> set[str]:
    """Return the tensors of layers that a normalisation layer beside them seems to follow, by names alone.

    A checkpoint does not store the order of its modules. The guess: of two modules of one parent, the second is a norm
    with the next index of a `Sequential` (`0`, `1`), the same number (`conv1`, `bn1`) or neither has a number.
    """
    owners = {name: name.rpartition(".")[0] for name in roles}
    following = {_key(owners[name]) for name, role in roles.items() if role.role == "norm"}
    others = (name for name, role in roles.items() if role.role not in ("norm", "copied"))
    return {name for name in others if _key(owners[name], after=True) in following}


def _key(module: str, after: bool = False) -> tuple[str, str]:
    parent, _, name = module.rpartition(".")
    digits = "".join(re.findall(r"\d+$", name))
    return parent, str(int(digits) + 1) if after and digits and name == digits else digits
