"""Original-format names of a UNet's modules, by walking it as the original code builds it: places in lists."""

import torch
from diffusers import UNet2DConditionModel

RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}

_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
#: What the published models' configs say.
CONFIGS = {
    "SD 1.5": {"cross_attention_dim": 768},
    "SD 2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": _SDXL,
    "SDXL refiner": {
        **_SDXL,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
    "SSD-1B": {
        **_SDXL,
        "transformer_layers_per_block": (1, 2, 4),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "KOALA-1B": {**_SDXL, "layers_per_block": 1, "transformer_layers_per_block": (1, 2, 6)},
    "KOALA-700M": {
        **_SDXL,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, 5),
        "mid_block_type": None,
    },
    "BK-SDM": {"cross_attention_dim": 768, "layers_per_block": 1},
    "BK-SDM tiny": {
        "cross_attention_dim": 768,
        "layers_per_block": 1,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "mid_block_type": None,
    },
}


def ldm_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """`{module: original-format module}` of every linear layer and convolution."""
    layers = [name for name, weight in unet.state_dict().items() if name.endswith(".weight") and weight.dim() > 1]
    return _originals(unet, [name.removesuffix(".weight") for name in layers])


def ldm_state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """All weights of a UNet by the names that the original code gives them, `input_blocks.0.0.weight` first."""
    state = unet.state_dict()
    names = _originals(unet, [name.rpartition(".")[0] for name in state])
    return {
        f"{names[module]}.{leaf}": value.clone()
        for name, value in state.items()
        for module, _, leaf in [name.rpartition(".")]
    }


def _originals(unet: UNet2DConditionModel, modules: list[str]) -> dict[str, str]:
    places = {}
    number = 1
    for b, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            places[f"down_blocks.{b}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{b}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            places[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for b, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            parts = [f"up_blocks.{b}.resnets.{layer}"]
            if hasattr(block, "attentions"):
                parts.append(f"up_blocks.{b}.attentions.{layer}")
            if block.upsamplers and layer == len(block.resnets) - 1:
                parts.append(f"up_blocks.{b}.upsamplers.0.conv")
            for place, part in enumerate(parts):
                places[part] = f"output_blocks.{number}.{place}" + (".conv" if "upsamplers" in part else "")
            number += 1
    for place, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        places[f"mid_block.{part}"] = f"middle_block.{place}"
    names = {}
    for module in modules:
        if module in TOP or module in places:
            names[module] = TOP.get(module) or places[module]
            continue
        part = next(part for part in places if module.startswith(f"{part}."))
        rest = module.removeprefix(f"{part}.")
        names[module] = f"{places[part]}.{RESNET.get(rest, rest) if 'resnets' in part else rest}"
    return names
