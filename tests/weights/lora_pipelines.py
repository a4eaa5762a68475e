"""Pipelines of three families, tiny but with every layer of the real ones, and LoRAs for all their parts."""

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from ldm_names import ldm_names
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

_UNET = {"sample_size": 8, "norm_num_groups": 2}
_SD = {**_UNET, "block_out_channels": (4, 4, 8, 8), "cross_attention_dim": 8}
UNETS = {
    "sd15": {**_SD, "attention_head_dim": 2},
    "sd21": {**_SD, "attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True},
    "sdxl": {
        **_UNET,
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 20,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 36,
    },
}
FAMILIES = tuple(UNETS)
CLIP_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection")


def make_pipe(family):
    """Always with the same random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS[family])
    config = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 20, "max_position_embeddings": 7}
    text = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=12, **config))
    parts = {"vae": None, "text_encoder": text, "tokenizer": None, "unet": unet, "scheduler": None}
    if family != "sdxl":
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=12, intermediate_size=16, projection_dim=12, **config)
    )
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=None)


def parts_of(pipe):
    """{component: model} of the parts that a LoRA can change."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def layers_of_part(name, part):
    """{module: weight} of what is adapted: every layer of a UNet, attention, MLP and projection of a text encoder."""
    wanted = {
        module.removesuffix(".weight"): weight
        for module, weight in part.state_dict().items()
        if module.endswith(".weight") and weight.dim() in (2, 4)
    }
    return wanted if name == "unet" else {k: v for k, v in wanted.items() if k.endswith(CLIP_LAYERS)}


def random_layers(pipe, uniform=False, seed=7):
    """{(component, module): (down, up, alpha)}; ranks and alphas all different, or all 3 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, part in parts_of(pipe).items():
        for number, (module, weight) in enumerate(layers_of_part(name, part).items()):
            rank = 3 if uniform else (2, 3, 4)[number % 3]
            down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.1
            up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator) * 0.1
            found[name, module] = (down, up, 1.5 if uniform else (1.0, float(rank), 2.5, 8.0)[number % 4])
    return found


def kohya_file_tensors(pipe, layers):
    """The LoRA as sd-scripts writes it: SDXL's UNet as the original code calls it, CLIP as transformers 4 did."""
    xl = hasattr(pipe, "text_encoder_2")
    original = ldm_names(pipe.unet) if xl else {}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    tensors = {}
    for (name, module), (down, up, alpha) in layers.items():
        if name == "unet":
            module = original.get(module, module)
        elif module.startswith("encoder."):
            module = f"text_model.{module}"
        stem = f"{prefixes[name]}_{module}".replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def save_with_diffusers(pipe, layers, folder):
    """The LoRA as diffusers' training scripts write it: adapters by PEFT, `save_lora_weights` with their configs."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    given = {}
    for name, part in parts_of(pipe).items():
        own = {module: layer for (component, module), layer in layers.items() if component == name}
        config = LoraConfig(
            r=3,
            lora_alpha=1.5,
            rank_pattern={f"^{module}": len(down) for module, (down, _, _) in own.items()},
            alpha_pattern={f"^{module}": alpha for module, (_, _, alpha) in own.items()},
            target_modules=list(own),
        )
        part.add_adapter(config)
        for module, (down, up, _) in own.items():
            layer = part.get_submodule(module)
            layer.lora_A["default"].weight.data.copy_(down)
            layer.lora_B["default"].weight.data.copy_(up)
        given[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
        given[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, **given)
    return folder / "pytorch_lora_weights.safetensors"


def fused(family, *files):
    """All weights of a fresh pipeline after plain diffusers loaded and fused the LoRAs."""
    pipe = make_pipe(family)
    for file in files:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(components=list(parts_of(pipe)))
    pipe.unload_lora_weights()
    return {
        f"{name}.{key}": value for name, part in parts_of(pipe).items() for key, value in part.state_dict().items()
    }


def added(family, layers):
    """The same by the formula, in float64: weight + up @ down * alpha / rank."""
    weights = {}
    for name, part in parts_of(make_pipe(family)).items():
        weights |= {f"{name}.{key}": value.double() for key, value in part.state_dict().items()}
    for (name, module), (down, up, alpha) in layers.items():
        key = f"{name}.{module}.weight"
        product = up.double().flatten(1) @ down.double().flatten(1) * (alpha / len(down))
        weights[key] = weights[key] + product.reshape(weights[key].shape)
    return weights


def distance(first, second):
    """Largest difference of any weight; every name must be in both."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)
