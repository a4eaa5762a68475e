"""A caption file, the command line of a short run, and tiny pipelines with their own text encoders."""

import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import train_perflow
from perflow_diffusers.miniature import miniature_folder

CAPTIONS = ("a person with red hair", "a happy person with glasses on a blue background", "a dog", "a green hat")


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    return path


@pytest.fixture
def words(tmp_path, captions):
    """Options of a run of a few small steps on the miniature; later ones win."""

    def give(*more):
        return [
            f"pretrained_model_name_or_path={miniature_folder() / 'avatars'}",
            f"train_captions={captions}",
            f"output_dir={tmp_path / 'out'}",
            "solve_batch_size=2",
            "solver_steps=2",
            "train_batch_size=4",
            "logging_steps=1",
            "dataloader_num_workers=0",
            *more,
        ]

    return give


@pytest.fixture
def run(tmp_path, monkeypatch, words):
    """The command itself; returns the output folder."""

    def start(*more):
        monkeypatch.setattr(sys, "argv", ["train_perflow.py", *words(*more)])
        train_perflow.main()
        return tmp_path / "out"

    return start


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of an SDXL pipeline with random weights and two text encoders of a few thousand weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(miniature_folder() / "avatars" / "tokenizer")
    length = tokenizer.model_max_length
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=12, eos_token_id=tokenizer.eos_token_id, bos_token_id=0,
        pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, sample_size=16, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state for a process's life; each test decides anew about precision and processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
