"""Random LoRAs for a small UNet, as files in the layouts of diffusers (new and old), PEFT and kohya."""

import json

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file

from perflow_diffusers.weights.read.lora import adapter_metadata

RANKS = (2, 3, 4)


def layers_of(unet):
    """{module: weight} of every linear layer and convolution."""
    return {
        name.removesuffix(".weight"): weight
        for name, weight in unet.state_dict().items()
        if name.endswith(".weight") and weight.dim() in (2, 4)
    }


def random_factors(unet, dtype=torch.float32, seed=5, size=0.2):
    """{module: (down, up, alpha)}: ranks 2 to 4, alphas beside the rank."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for number, (module, weight) in enumerate(layers_of(unet).items()):
        rank, kernel = RANKS[number % 3], weight.shape[2:]
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * size
        up = torch.randn(weight.shape[0], rank, *(1 for _ in kernel), generator=generator) * size
        factors[module] = (down.to(dtype), up.to(dtype), (1.0, float(rank), 2.5, 8.0)[number % 4])
    return factors


def products(factors):
    """{weight name: up @ down * alpha / rank} in float64."""
    found = {}
    for module, (down, up, alpha) in factors.items():
        whole = up.double().flatten(1) @ down.double().flatten(1) * (alpha / down.shape[0])
        found[f"{module}.weight"] = whole.reshape(up.shape[0], *down.shape[1:])
    return found


def write_diffusers(path, factors, **header):
    tensors = {f"unet.{module}.lora_A.weight": down for module, (down, _, _) in factors.items()}
    tensors |= {f"unet.{module}.lora_B.weight": up for module, (_, up, _) in factors.items()}
    config = adapter_metadata({module: (down.shape[0], alpha) for module, (down, _, alpha) in factors.items()})
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config), **header})
    return path


def write_old_diffusers(path, factors):
    """Attention processors and `.lora.down`; this layout has no place for alpha."""
    tensors = {}
    for module, (down, up, _) in factors.items():
        place, leaf = f"unet.{module}", module.rpartition(".")[2]
        stem = f"{place}.lora"
        if leaf in ("to_q", "to_k", "to_v"):
            stem = f"{place.removesuffix(f'.{leaf}')}.processor.{leaf}_lora"
        elif module.endswith(".to_out.0"):
            stem = f"{place.removesuffix('.to_out.0')}.processor.to_out_lora"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    save_file(tensors, path)
    return path


def write_kohya(path, factors, alpha_dtype=torch.float32, names=lambda module: module.replace(".", "_"), **header):
    tensors = {}
    for module, (down, up, alpha) in factors.items():
        stem = f"lora_unet_{names(module)}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=alpha_dtype)
    save_file(tensors, path, {"ss_network_module": "networks.lora", **header})
    return path


def write_peft(folder, factors):
    """As `PeftModel.save_pretrained` writes it: the weights, and alpha in `adapter_config.json` beside them."""
    folder.mkdir(exist_ok=True)
    stem = "base_model.model"
    tensors = {f"{stem}.{module}.lora_A.weight": down for module, (down, _, _) in factors.items()}
    tensors |= {f"{stem}.{module}.lora_B.weight": up for module, (_, up, _) in factors.items()}
    config = adapter_metadata({module: (down.shape[0], alpha) for module, (down, _, alpha) in factors.items()})
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya, "peft": write_peft}


def original_names(unet):
    """{name: original name}, found by giving diffusers' own converter a checkpoint whose numbers say their names."""
    parts = [f"input_blocks.{block}.{layer}" for block in range(1, 9) for layer in (0, 1)]
    parts += [f"output_blocks.{block}.{layer}" for block in range(9) for layer in (0, 1, 2)]
    parts += [f"middle_block.{layer}" for layer in range(3)]
    inner = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
    inner += ["op", "conv", "norm", "proj_in", "proj_out"]
    block = [f"norm{n}" for n in (1, 2, 3)] + ["ff.net.0.proj", "ff.net.2"]
    block += [f"attn{n}.{what}" for n in (1, 2) for what in ("to_q", "to_k", "to_v", "to_out.0")]
    inner += [f"transformer_blocks.{depth}.{name}" for depth in (0, 1) for name in block]
    names = ["input_blocks.0.0", "time_embed.0", "time_embed.2", "out.0", "out.2", "label_emb.0.0", "label_emb.0.2"]
    names += [f"{part}.{name}" for part in parts for name in inner]
    for block, kind in enumerate(unet.config["up_block_types"]):  # an upsampler stands behind the attention, if any
        last = (block + 1) * (unet.config["layers_per_block"] + 1) - 1
        names.remove(f"output_blocks.{last}.{1 if 'CrossAttn' in kind else 2}.conv")
    names = [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]
    marked = {f"model.diffusion_model.{name}": torch.tensor(float(number)) for number, name in enumerate(names)}
    found = convert_ldm_unet_checkpoint(marked, {"class_embed_type": None, **unet.config})
    return {name: names[int(found[name].item())] for name in unet.state_dict()}
