"""Early warnings."""

import math

import pytest
import torch

from closed_form import GaussianWorld
from perflow_diffusers.flow import NoisePath
from perflow_training.buffer import SolvedWindows
from perflow_training.config import TrainingConfig
from perflow_training.diagnostics import TrainingStopped, Watch, answers_zero, check_start, expectation
from perflow_training.objective import Loss, student_loss
from perflow_training.teacher.backbone import Backbone
from perflow_training.teacher.conditions import Conditions

PATH = NoisePath.from_betas()


class Network(torch.nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, z, timestep, encoder_hidden_states, return_dict):
        return (self.factor * z * timestep.reshape(-1, 1, 1, 1),)


def batch():
    z = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([1000, 750, 500, 250])
    return SolvedWindows(z, z * 0.5, start, start - 250, Conditions({"encoder_hidden_states": torch.zeros(4, 1, 1)}))


def test_a_student_that_is_the_teacher_passes_at_the_teacher_s_own_timestep():
    teacher = Backbone(Network(), PATH, "epsilon", index_offset=-1)
    assert check_start(teacher.student(Network()), teacher, batch(), exact=True) == 0


@pytest.mark.parametrize(("factor", "exact", "stops"), [(1.01, True, True), (1.01, False, False), (1.1, False, True)])
def test_a_student_that_is_not_is_refused(factor, exact, stops):
    teacher = Backbone(Network(), PATH, "epsilon", index_offset=-1)
    student = teacher.student(Network(factor))
    if stops:
        with pytest.raises(TrainingStopped, match=f"differs from the teacher's by {factor - 1:.2%}"):
            check_start(student, teacher, batch(), exact)
    else:
        assert math.isclose(check_start(student, teacher, batch(), exact), 0.01, rel_tol=1e-3)


def test_answering_zero_loses_the_mean_squared_target():
    world = GaussianWorld(PATH)
    z = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ideal = world.student(z, 750, 750, 500, "ddim_eps")
    start = torch.full((8,), 750)
    solved = SolvedWindows(
        z, world.flow(z, 750, 500), start, start - 250, Conditions({"encoder_hidden_states": torch.zeros(8, 1, 1)})
    )
    losses = student_loss(answers_zero, PATH, solved, start, Loss("ddim_eps"), torch.ones(8))
    torch.testing.assert_close(losses.double(), ideal.pow(2).mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


def test_what_to_expect_names_a_wrong_teacher():
    said = expectation(TrainingConfig(), [0.02, 0.5], [1.0, 0.25])
    assert "0.02  0.5" in said
    assert "2 times worse than answering zero" in said
    assert "WARNING" not in expectation(TrainingConfig(), [0.02, 0.1], [1.0, 0.25])
    assert "does not predict velocities" in expectation(TrainingConfig(prediction_type="velocity"), [3.0], [1.0])


def test_nan_names_the_window():
    watch = Watch(TrainingConfig(), [0.1, 0.2])
    with pytest.raises(TrainingStopped, match=r"not finite at step 30, first in window 2 of 2"):
        watch.look(30, [0.1, math.nan], 3.0)


def test_a_gradient_that_is_no_number_stops_except_where_the_loss_is_scaled():
    with pytest.raises(TrainingStopped, match=r"gradient is not finite at step 30"):
        Watch(TrainingConfig(), [0.1]).look(30, [0.1], math.inf)
    Watch(TrainingConfig(mixed_precision="fp16"), [0.1]).look(30, [0.1], math.inf)


def test_a_teacher_whose_solve_is_no_number_is_told_from_a_wrong_student():
    teacher = Backbone(Network(), PATH, "epsilon", index_offset=-1)
    broken = batch()
    broken.z_end[0] = math.nan
    with pytest.raises(TrainingStopped, match="teacher's own answer or solve is not finite"):
        check_start(teacher.student(Network()), teacher, broken, exact=True)


def test_a_loss_above_its_start_for_long_stops_and_a_short_one_does_not():
    watch = Watch(TrainingConfig(divergence_steps=100, divergence_factor=1.5), [0.1, 0.3])
    for step, high in ((10, True), (60, True), (90, False), (100, True), (190, True)):
        watch.look(step, [0.5, 0.5] if high else [0.1, 0.1], 1.0)
    with pytest.raises(TrainingStopped, match=r"above 1\.5 times .* for 100 steps \(now 2\.5 times\)"):
        watch.look(200, [0.5, 0.5], 1.0)


def test_windows_without_samples_are_left_out_of_the_comparison():
    watch = Watch(TrainingConfig(divergence_steps=1), [10.0, 0.1])
    watch.look(10, [None, 0.2], 1.0)
    with pytest.raises(TrainingStopped, match="now 2 times"):
        watch.look(20, [None, 0.2], 1.0)


def test_zero_steps_never_stops():
    watch = Watch(TrainingConfig(divergence_steps=0), [0.1])
    for step in range(0, 10**5, 1000):
        watch.look(step, [100.0], 1.0)
