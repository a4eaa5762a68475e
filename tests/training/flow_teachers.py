"""Whole flow-matching pipelines of a few thousand random weights, with text encoders and tokenizers, as folders."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from perflow_diffusers.miniature import miniature_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from flow_builders import FLOW, TEXT

#: what each is called with beside captions, as the option `pipeline_arguments` has it
ARGUMENTS = {
    "sd3": "{height: 32, width: 32, max_sequence_length: 8}",
    "flux": "{height: 64, width: 64, max_sequence_length: 8}",
    "qwen": "{height: 64, width: 64}",
    "z": "{height: 64, width: 64}",
    "wan": "{height: 32, width: 32, num_frames: 5, max_sequence_length: 8}",
}


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(miniature_folder() / "avatars" / "tokenizer")


def _clip(kind: Any, tokenizer: CLIPTokenizer, width: int) -> torch.nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, projection_dim=width,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def _t5(kind: Any, config: Any, tokenizer: CLIPTokenizer) -> torch.nn.Module:
    return kind(config(vocab_size=len(tokenizer), d_model=TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


_QWEN = {
    "hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 1200,
}  # fmt: skip


def _encoders(name: str) -> dict[str, Any]:
    tokenizer = _tokenizer()
    if name == "sd3":  # 77 tokens of half the width each, side by side
        half = {f"text_encoder{n}": _clip(CLIPTextModelWithProjection, tokenizer, TEXT // 2) for n in ("", "_2")}
        return {**half, "tokenizer": tokenizer, "tokenizer_2": tokenizer}
    if name == "flux":
        clip, t5 = _clip(CLIPTextModel, tokenizer, TEXT), _t5(T5EncoderModel, T5Config, tokenizer)
        return {"text_encoder": clip, "text_encoder_2": t5, "tokenizer": tokenizer, "tokenizer_2": tokenizer}
    if name == "wan":
        return {"text_encoder": _t5(UMT5EncoderModel, UMT5Config, tokenizer), "tokenizer": tokenizer}
    if name == "z":
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        qwen = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **_QWEN))
        return {"text_encoder": qwen, "tokenizer": tokenizer}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": TEXT}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**_QWEN, "vocab_size": len(tokenizer), "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {"text_encoder": Qwen2_5_VLForConditionalGeneration(config), "tokenizer": tokenizer}


_BUILDERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "sd3": ("sd3-text-to-image", lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "flux": ("flux-text-to-image", lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    "qwen": ("qwen-image", lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    "z": ("z-image", lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "wan": ("wan-text-to-video", lambda: FlowMatchEulerDiscreteScheduler(shift=5.0)),
}


def save_teacher(name: str, folder: Path) -> Path:
    """A pipeline of ARGUMENTS, saved in `folder`."""
    row, scheduler = _BUILDERS[name]
    pipe = FLOW[row](scheduler()).pipe
    torch.manual_seed(1)
    for weight in pipe.transformer.parameters():  # what starts at zero says nothing
        weight.data.add_(0.05 * torch.randn_like(weight))
    for part, value in _encoders(name).items():
        setattr(pipe, part, value.eval() if isinstance(value, torch.nn.Module) else value)
        pipe.register_modules(**{part: value})
    pipe.save_pretrained(folder)
    return folder
