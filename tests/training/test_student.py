"""What is trained, and with which optimiser."""

import copy

import pytest
import torch

from perflow_diffusers import load_miniature
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.student import build_student, load_trained, make_optimizer, trained


def output(network):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = torch.randn(2, 8, network.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network.eval()(z, torch.tensor([3, 700]), cond).sample


@pytest.mark.parametrize("options", [{}, {"lora_rank": 3}, {"gradient_checkpointing": True}])
def test_a_new_student_computes_what_the_teacher_computes(options):
    teacher = load_miniature().unet
    student = build_student(teacher, TrainingConfig(**options))
    assert torch.equal(output(student), output(teacher))


def test_a_lora_shares_the_frozen_weights_and_leaves_the_teacher_alone():
    teacher = load_miniature().unet
    before, answer = copy.deepcopy(teacher.state_dict()), output(teacher)
    student = build_student(teacher, TrainingConfig(lora_rank=3, lora_alpha=6.0, lora_target_modules=["to_q"]))
    own = trained(student)
    assert all("to_q.lora_" in name for name in own)
    assert {value.shape[0] for name, value in own.items() if "lora_A" in name} == {3}
    shared = {tensor.data_ptr() for tensor in teacher.parameters()}
    assert all(p.data_ptr() in shared for p in student.parameters() if not p.requires_grad)
    load_trained(student, {name: torch.ones_like(value) for name, value in own.items()})
    assert not torch.equal(output(student), answer)
    assert torch.equal(output(teacher), answer)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())


def test_trained_weights_are_float32_whatever_the_teacher():
    teacher = load_miniature(dtype=torch.bfloat16).unet
    lora = build_student(teacher, TrainingConfig(lora_rank=2))
    assert {value.dtype for value in trained(lora).values()} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {value.dtype for value in build_student(teacher, TrainingConfig()).parameters()} == {torch.float32}


def test_eight_bit_adam_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"`use_8bit_adam=true` needs (the package bitsandbytes|a CUDA GPU)"):
        make_optimizer(torch.nn.Linear(2, 2), TrainingConfig(use_8bit_adam=True))


def test_unknown_target_modules_are_named():
    with pytest.raises(ConfigError, match=r"`lora_target_modules=\['to_nowhere'\]`"):
        build_student(load_miniature().unet, TrainingConfig(lora_rank=2, lora_target_modules=["to_nowhere"]))
