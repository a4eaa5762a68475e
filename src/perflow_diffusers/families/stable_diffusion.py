"""Stable Diffusion 1.x, 2.x and XL: one network class, told apart by the width of its text embedding."""

from types import MappingProxyType

from perflow_diffusers.families.family import Family, Network

UNET = Network(
    component="unet",
    class_name="UNet2DConditionModel",
    signature=(
        "cross_attention_dim",
        "block_out_channels",
        "layers_per_block",
        "transformer_layers_per_block",
        "addition_embed_type",
    ),
    first_layer="conv_in.weight",
    text_layer="attn2.to_k.weight",
    roots=(
        *("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_norm_out", "conv_out"),
        *("time_embedding", "add_embedding", "class_embedding", "time_emb_proj"),
        *("encoder_hid_proj", "position_net", "transformer_in"),
    ),
    # diffusers' words and those of the original code
    words=(
        *("down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks"),
        *("transformer_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "attn1", "attn2"),
        *("to_q", "to_k", "to_v", "to_out", "ff", "net", "proj_in", "proj_out", "proj", "conv_shortcut"),
        *("conv_in", "conv_norm_out", "conv_out", "conv1", "conv2", "conv", "norm1", "norm2", "norm3", "norm"),
        *("time_emb_proj", "time_embedding", "time_embed", "add_embedding", "class_embedding", "label_emb"),
        *("cond_proj", "linear_1", "linear_2", "linear"),
        *("in_layers", "out_layers", "emb_layers", "skip_connection", "op", "out"),
    ),
    # IP-Adapter, motion modules, GLIGEN, class and camera embeddings, guidance embedding, joint attention, and the
    # leftovers of fused projections
    extensions=(
        r"\.processor\.",
        r"(^|\.)encoder_hid_proj\.",
        r"(^|\.)(motion_modules|motion_module)\.",
        r"(^|\.)position_net\.",
        r"\.fuser\.",
        r"(^|\.)class_embedding\.",
        r"(^|\.)time_embedding\.cond_proj\.",
        r"_joint\w*\.",
        r"\.to_q?kv\.",
        r"(^|\.)image_proj",
        r"(^|\.)ref_unet\.",
    ),
    kohya_prefixes=("lora_unet_",),
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ),
    kernels=MappingProxyType(
        {**dict.fromkeys(("conv", "conv1", "conv2", "conv_in", "conv_out"), 3), "conv_shortcut": 1}
    ),
    sides=MappingProxyType({"down": "down_blocks", "up": "up_blocks"}),
    middle="mid_block",
)

_NOISE = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": False,
    }
)

SD1 = Family("SD 1.x", UNET, 768, {"sample_size": 64, "cross_attention_dim": 768}, _NOISE)
SD2 = Family(
    "SD 2.x",
    UNET,
    1024,
    {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    _NOISE,
)
SDXL = Family(
    "SDXL",
    UNET,
    2048,
    {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    _NOISE,
)
REFINER = Family("the SDXL refiner", UNET, 1280, noise=_NOISE)
T5 = Family("a T5-conditioned UNet", UNET, 4096)
