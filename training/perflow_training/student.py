"""The network that is trained, a copy of the teacher's or its own weights with a LoRA; and its optimiser."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LRScheduler

from perflow_diffusers.families.stable_diffusion import UNET
from perflow_diffusers.weights import open_weights
from perflow_training.config import ConfigError, TrainingConfig

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def lora_config(config: TrainingConfig) -> LoraConfig:
    """The LoRA that the options ask for, as PEFT describes it; it starts at zero difference."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,  # type: ignore[arg-type]  # PEFT divides whatever it is
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or list(UNET.lora_targets),
        init_lora_weights="gaussian",
    )


def build_student(teacher: nn.Module, config: TrainingConfig, *, share: bool = True, copied: bool = True) -> nn.Module:
    """A network that computes what `teacher` computes, with the parameters to be trained in float32.

    `copied=False` makes it of the teacher itself, which is not needed any more.

    With a LoRA the frozen weights are the teacher's own tensors (`share`), which halves their memory; False copies
    them, which sharded training needs.
    """
    if not copied:
        network: Any = teacher
    elif config.lora_rank and share:
        own = {id(tensor): tensor for tensor in [*teacher.parameters(), *teacher.buffers()]}
        network = copy.deepcopy(teacher, own)
    else:
        network = copy.deepcopy(teacher)
    if config.lora_rank:
        network.requires_grad_(False)
        try:
            network.add_adapter(lora_config(config))
        except ValueError as error:
            raise ConfigError(f"`lora_target_modules={config.lora_target_modules}`: {error}") from error
        cast_training_params([network], dtype=torch.float32)
    else:
        network.float().requires_grad_(True)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}


def check_trained(parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ConfigError if weights of these `shapes` are not those of the trained `parameters`."""
    odd = sorted(set(shapes) ^ set(parameters))
    odd += [name for name in set(shapes) & set(parameters) if tuple(shapes[name]) != tuple(parameters[name].shape)]
    if odd:
        raise ConfigError(
            f"The checkpoint's weights are not those of this network: {len(odd)} differ, for example {odd[0]}. "
            "Use the `pretrained_model_name_or_path` and `lora_rank` that it was made with."
        )


def load_trained(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` into the trained parameters. Raises ConfigError if they belong to another network."""
    parameters = trained(network)
    check_trained(parameters, open_weights(weights).shapes)
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


@contextmanager
def values_in_place(network: nn.Module, values: Iterable[Tensor]) -> Iterator[None]:
    """The trained parameters of `network` hold `values` meanwhile; what they held waits on the CPU."""
    _scatter(network)
    mine = [_local(parameter) for parameter in trained(network).values()]
    held = [tensor.cpu().clone() for tensor in mine]
    _fill(network, mine, map(_local, values))
    try:
        yield
    finally:
        _fill(network, mine, held)


def _local(tensor: Tensor) -> Tensor:
    """This process's own part: operations on sharded tensors are not all there (`_foreach_copy_` is not)."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


@torch.no_grad()
def _fill(network: nn.Module, tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
    _scatter(network)


def _scatter(network: nn.Module) -> None:
    """Gives up what a forward without gradients left gathered: the outermost parameters, as they were at that time."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, in 8 bits if asked for."""
    kind: Any = torch.optim.AdamW
    if config.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                "`use_8bit_adam=true` needs the package bitsandbytes: pip install bitsandbytes, or set it to false."
            ) from error
        if not torch.cuda.is_available():
            raise ConfigError("`use_8bit_adam=true` needs a CUDA GPU. Set it to false here.")
        kind = AdamW8bit
    return kind(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def make_learner(
    teacher: nn.Module, config: TrainingConfig, accelerator: Accelerator, *, keep: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler]:
    """(student, optimiser, learning-rate schedule), ready for a run; `teacher` is put in its place and frozen.

    `keep=False`: the teacher becomes the student.
    """
    dtype = DTYPES[accelerator.mixed_precision]
    teacher.to(accelerator.device)
    if config.lora_rank:  # the student shares the frozen weights
        _cast(teacher, dtype)
    share = accelerator.distributed_type != DistributedType.FSDP
    student = build_student(teacher, config, share=share, copied=keep)
    if keep:
        _cast(teacher, dtype).eval().requires_grad_(False)
    network, optimizer = accelerator.prepare(student, make_optimizer(student, config))
    # not prepared: accelerate would step it once for each process, and the schedule would depend on their number
    schedule = get_scheduler(
        config.lr_scheduler,
        getattr(optimizer, "optimizer", optimizer),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    accelerator.register_for_checkpointing(schedule)
    return network, optimizer, schedule


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`network.to(dtype)`, which diffusers comments on even where nothing is to be done."""
    return network if network.dtype == dtype else network.to(dtype)
