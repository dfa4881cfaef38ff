"""Algorithm 1 as a list of phases, where each leaves its mark, and the seeds that keep them apart."""

import pytest

from rest_jax.rest import Phase, algorithm_1, mark_path, phase_directory, phase_seed


def phases(grow_steps, improve_steps, *, bc_long=True, restart_from_base=False):
    return algorithm_1(
        grow_steps=grow_steps, improve_steps=improve_steps, bc_long=bc_long, restart_from_base=restart_from_base
    )


def trained(steps):
    """(name, the policy it starts from) of all but the evaluations."""
    return [(phase.name, phase.policy) for phase in steps if phase.kind != "evaluate"]


def test_two_grow_steps_of_two_improve_steps():
    steps = phases(2, 2)
    assert trained(steps) == [
        ("bc", None),
        ("grow_1", "bc"),
        ("improve_1.1", "bc"),
        ("improve_1.2", "improve_1.1"),
        ("grow_2", "improve_1.2"),
        ("improve_2.1", "improve_1.2"),
        ("improve_2.2", "improve_2.1"),
        ("bc_long", "bc"),
    ]
    by_name = {phase.name: phase for phase in steps}
    assert (by_name["improve_2.1"].grow_step, by_name["improve_2.1"].improve_step) == (2, 1)
    assert (by_name["grow_2"].grow_step, by_name["bc"].grow_step, by_name["bc_long"].grow_step) == (2, 0, 0)


@pytest.mark.parametrize("restart_from_base", [False, True])
def test_every_policy_is_evaluated_right_after_it_is_trained(restart_from_base):
    steps = phases(2, 2, restart_from_base=restart_from_base)
    for number, phase in enumerate(steps):
        if phase.kind in ("bc", "improve", "bc_long"):
            assert steps[number + 1] == Phase(f"evaluate_{phase.name}", "evaluate", policy=phase.name)
    assert sum(phase.kind == "evaluate" for phase in steps) == 6


def test_restarting_from_the_base_trains_from_bc_and_samples_from_the_newest():
    assert trained(phases(2, 2, restart_from_base=True, bc_long=False)) == [
        ("bc", None),
        ("grow_1", "bc"),
        ("improve_1.1", "bc"),
        ("improve_1.2", "bc"),
        ("grow_2", "improve_1.2"),
        ("improve_2.1", "bc"),
        ("improve_2.2", "bc"),
    ]


@pytest.mark.parametrize("improve_steps", [0, 3])
def test_without_grow_steps_there_is_bc_alone(improve_steps):
    assert trained(phases(0, improve_steps, bc_long=False)) == [("bc", None)]
    assert trained(phases(0, improve_steps)) == [("bc", None), ("bc_long", "bc")]


def test_without_improve_steps_every_grow_samples_from_bc():
    assert trained(phases(2, 0, bc_long=False)) == [("bc", None), ("grow_1", "bc"), ("grow_2", "bc")]


@pytest.mark.parametrize(
    ("name", "directory"),
    [("bc", "bc"), ("bc_long", "bc_long"), ("grow_2", "grow_2"), ("improve_2.13", "grow_2/improve_13")],
)
def test_phases_leave_their_marks_where_the_design_says(tmp_path, name, directory):
    assert phase_directory(tmp_path, name) == tmp_path / directory
    assert mark_path(tmp_path, Phase(name, "")) == tmp_path / directory / "RESULT.json"
    evaluation = Phase(f"evaluate_{name}", "evaluate", policy=name)
    assert mark_path(tmp_path, evaluation) == tmp_path / "eval" / f"{name}.json"


def test_no_two_phases_share_a_mark_or_a_seed(tmp_path):
    steps = phases(3, 12)
    assert len({mark_path(tmp_path, phase) for phase in steps}) == len(steps)
    seeds = {phase_seed(seed, phase.name) for phase in steps for seed in (0, 1)}
    assert len(seeds) == 2 * len(steps)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_phases_seed_never_changes():
    # Another value would continue a run that is under way in another order: the first 4 bytes of sha256("0/bc").
    assert phase_seed(0, "bc") == 1680862258
    assert phase_seed(7, "improve_1.2") == 215159350
