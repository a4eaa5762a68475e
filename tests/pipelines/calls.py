"""What pipelines are called with besides prompts, how some guide, and what one loads before its call."""

import builders
import torch
from builders import SIDE, picture, right_half


def plain(rows, shift):
    return {}


def image(rows, shift):
    return {"image": [picture(i, shift) for i in rows]}


def two_images(rows, shift):
    """A list for every picture of the batch, with one condition for every net."""
    return {"image": [[picture(i, shift), picture(i, 1)] for i in rows]}


def image_and_control(rows, shift):
    return {**image(rows, 0), "control_image": [picture(i + 2, shift) for i in rows]}


def image_and_mask(rows, shift):
    return {**image(rows, shift), "mask_image": [right_half()] * len(rows)}


def image_mask_and_control(rows, shift):
    return {**image_and_mask(rows, 0), "control_image": [picture(i + 2, shift) for i in rows]}


def image_prompt(rows, shift):
    return {"ip_adapter_image": picture(5, shift)}


def frames(rows, shift):
    return {"num_frames": 3, "height": SIDE, "width": SIDE}


def video(rows, shift):
    return {"video": [[picture(3 * i + j, shift) for j in range(3)] for i in rows], "height": SIDE, "width": SIDE}


def depth(rows, shift):
    ramp = torch.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
    return {**image(rows, 0), "depth_map": torch.stack([ramp ** (1 + i + shift) for i in rows])}


def perturbed_control(rows, shift):
    return {**image(rows, shift), "pag_scale": 2.0}


def edited(rows, shift):
    return {**image(rows, shift), "image_guidance_scale": 1.5}


def perturbed(rows, shift):
    return {"pag_scale": 2.0 + shift}


def guided_by_image(chunks, guidance):
    """InstructPix2Pix: chunks with text and image, image alone, neither."""
    told, shown, neither = chunks
    return neither + guidance * (told - shown) + 1.5 * (shown - neither)


def guided_by_perturbation(chunks, guidance):
    """PAG: chunks without prompt, with it, with it and perturbed attention."""
    without, told, perturbed = chunks
    return without + guidance * (told - without) + 2.0 * (told - perturbed)


def with_ip_adapter(pipe, folder):
    """The pipeline after `load_ip_adapter` from files that are made for its UNet."""
    if not (folder / "ip-adapter.safetensors").exists():
        builders.save_ip_adapter(folder, pipe.unet)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name="ip-adapter.safetensors")
    pipe.set_ip_adapter_scale(0.6)
