"""Weights that are spread over processes: in a world of one, and as `accelerate launch` spreads them over two."""

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from live_tensors import live_bytes
from PIL import Image
from run_log import logged
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import train_perflow
from perflow_training import checkpoint
from perflow_training.checkpoint import copy_into, full_tensors, whole, write_gathered
from perflow_training.student import values_in_place

FSDP2 = Path(train_perflow.__file__).parent / "configs" / "accelerate" / "fsdp2.yaml"
#: large steps, so that EMA and weights are far apart when validation changes them for each other
OPTIONS = (
    "max_train_steps=3", "learning_rate=2e-3", "lr_warmup_steps=0", "lr_scheduler=constant", "solve_guidance=2",
    "validation_prompts=[a dog]", "validation_samplings=[[4, 1]]", "validation_teacher_steps=2",
)  # fmt: skip


@pytest.fixture
def sharded():
    """A linear layer whose parameters are DTensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4)
    plain = {name: value.detach().clone() for name, value in layer.named_parameters()}
    yield fully_shard(layer, mesh=mesh), plain
    dist.destroy_process_group()


def test_the_ema_of_sharded_weights_is_that_of_whole_ones(sharded):
    layer, plain = sharded
    parameters = list(layer.parameters())
    assert hasattr(parameters[0], "full_tensor")
    ema = EMAModel(parameters, decay=0.9, use_ema_warmup=True, power=0.75, foreach=True)
    reference = EMAModel(plain.values(), decay=0.9, use_ema_warmup=True, power=0.75)
    for value in plain.values():
        value.requires_grad_(True)
    for step in range(4):
        with torch.no_grad():
            for parameter, value in zip(parameters, plain.values(), strict=True):
                parameter.add_(step + 1)
                value.add_(step + 1)
        ema.step(parameters)
        reference.step(plain.values())
    got = full_tensors(dict(zip(plain, ema.shadow_params, strict=True)))
    for value, wanted in zip(got.values(), reference.shadow_params, strict=True):
        torch.testing.assert_close(value, wanted)
        assert type(value) is torch.Tensor


def test_whole_tensors_go_back_into_sharded_ones(sharded):
    layer, plain = sharded
    wanted = torch.arange(12.0).reshape(4, 3)
    copy_into(layer.weight, wanted)
    assert torch.equal(whole(layer.weight), wanted)
    copy_into(plain["weight"], wanted)
    assert torch.equal(plain["weight"], wanted)
    assert whole(1.5) == 1.5


def test_values_are_in_place_and_taken_out_again_bit_for_bit():
    """Also in the outermost parameters, which stay gathered after a forward without gradients."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
        own = {name: value.detach().clone() for name, value in network.named_parameters()}
        other = [torch.randn_like(value) for value in own.values()]
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(network[0], mesh=mesh)
        fully_shard(network, mesh=mesh)
        shadow = [parameter.detach().clone() for parameter in network.parameters()]
        for value, wanted in zip(shadow, other, strict=True):
            copy_into(value, wanted)
        x = torch.randn(4, 3)

        def expected(values):
            return (x @ values[0].T + values[1]) @ values[2].T + values[3]

        with torch.no_grad():
            torch.testing.assert_close(network(x), expected(list(own.values())))
            with values_in_place(network, shadow):
                torch.testing.assert_close(network(x), expected(other))
            torch.testing.assert_close(network(x), expected(list(own.values())))
        for name, value in network.named_parameters():
            assert torch.equal(whole(value), own[name])
    finally:
        dist.destroy_process_group()


def launch(runs):
    """Two processes under the launch file itself, one run after the other; accelerate's own command starts them."""
    probes = [socket.socket() for _ in range(len(runs) + 1)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    path = os.pathsep.join([str(FSDP2.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", "2"]
    started = subprocess.run(
        [*command, "--main_process_port", str(ports[-1]), str(Path(__file__).with_name("sharded_process.py")),
         json.dumps(list(zip(ports, runs, strict=False)))],
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr[-3000:]
    return started.stderr


def weights(out):
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def test_sharded_over_two_processes_is_one_process_with_validation_checkpoints_and_resuming(
    run, words, tmp_path, tiny_sdxl
):
    """The numbers of one process with the same global batch; a resumed run bit for bit those of a whole one."""
    one, two, again = (tmp_path / name for name in ("one", "out", "again"))
    options = (f"pretrained_model_name_or_path={tiny_sdxl}", *OPTIONS)  # few blocks: each waits for the other process
    run(*options, "validation_steps=1", f"output_dir={one}", "solve_batch_size=4", "train_batch_size=4")
    half = ("solve_batch_size=2", "train_batch_size=2")
    sharded = (*options, *half, "mixed_precision=no", "checkpointing_steps=2", "validation_steps=1")
    said = launch(
        [
            words(*sharded),
            words(*sharded, f"output_dir={again}", f"resume_from_checkpoint={two / 'checkpoint-2'}"),
            words(
                options[0],
                *half,
                f"output_dir={tmp_path / 'lora'}",
                "lora_rank=2",
                "max_train_steps=1",
                "checkpointing_steps=1",
            ),
        ]
    )
    assert "The launcher asks for mixed_precision bf16 and the options for no" in said
    lora = json.loads((tmp_path / "lora" / "checkpoint-1" / "config.json").read_text())
    assert lora["mixed_precision"] == "bf16"  # the launch file's, for the options say nothing
    assert load_file(tmp_path / "lora" / "lora" / "pytorch_lora_weights.safetensors")
    assert len(logged(one)) == len(logged(two)) == 3
    for alone, together in zip(logged(one), logged(two), strict=True):
        for one_loss, two_loss in zip(alone["loss"], together["loss"], strict=True):
            assert one_loss == (two_loss and pytest.approx(two_loss, rel=1e-3, abs=1e-5))
        assert alone["grad_norm"] == pytest.approx(together["grad_norm"], rel=1e-3)
    for step in (1, 2, 3):
        drawn = [np.asarray(Image.open(out / "validation" / f"step-00000{step}.png")) for out in (one, two)]
        assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 2
    first, second = weights(one), weights(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    assert all(torch.equal(value, second[name]) for name, value in weights(again).items())


def _gathers_on_two(rank, folder):
    """Two processes write their shards' whole tensors: the one without a path holds one of them at a time."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = {f"weight.{i}": torch.randn(64, 40) for i in range(6)}
    mesh = dist.init_device_mesh("cpu", (2,))
    values = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in plain.items()}
    del plain
    gc.freeze()  # all that was imported: what is counted below is what comes after
    sizes, gather = [], checkpoint.whole

    def looked_at(value):
        sizes.append(live_bytes())
        return gather(value)

    checkpoint.whole = looked_at
    before = live_bytes()
    write_gathered(values, Path(folder) / "ema.safetensors" if rank == 0 else None)
    within = max(sizes) - before < 2 * 64 * 40 * 4
    full = full_tensors(values, keep=rank == 0)
    try:
        write_gathered(values, Path(folder) / "none" / "ema.safetensors" if rank == 0 else None)
        refused = False
    except OSError:
        refused = True
    dist.barrier()  # both have come through what one of them could not write
    (Path(folder) / f"{rank}.json").write_text(json.dumps([within, len(sizes), len(full), refused]))
    dist.destroy_process_group()


def test_shards_are_gathered_one_tensor_at_a_time_for_the_process_that_writes(tmp_path):
    torch.multiprocessing.spawn(_gathers_on_two, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    wanted = {f"weight.{i}": torch.randn(64, 40) for i in range(6)}
    got = load_file(tmp_path / "ema.safetensors")
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == [True, 18, 6, True]
    assert second == [True, 18, 0, False]
