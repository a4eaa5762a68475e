"""Further text-to-image and video pipelines around tiny random transformers."""

from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    PRXTransformer2DModel,
    SkyReelsV2Transformer3DModel,
)
from flow_parts import ATTENTION_MASKS, FILMS, TEXT, Built, embeds, pipeline, random, texts, tiny_vae

_CALL = {"guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "latent"}


def aura_flow(scheduler):
    transformer = random(
        AuraFlowTransformer2DModel,
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=TEXT,
        pos_embed_max_size=64,
    )
    pipe = pipeline("AuraFlowPipeline", scheduler, transformer, tiny_vae())
    return Built(pipe, {**texts(ATTENTION_MASKS), **_CALL, "height": 16, "width": 16}, told=lambda sigma: sigma)


def lumina2(scheduler):
    transformer = random(
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT,
    )
    pipe = pipeline("Lumina2Pipeline", scheduler, transformer, tiny_vae())
    return Built(pipe, {**texts(ATTENTION_MASKS), **_CALL}, told=lambda sigma: 1 - sigma, calls_a_step=2)


def lumina(scheduler):
    transformer = random(
        LuminaNextDiT2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT,
    )
    pipe = pipeline("LuminaPipeline", scheduler, transformer, tiny_vae())
    return Built(pipe, {**texts(ATTENTION_MASKS), **_CALL, "negative_prompt": None}, told=lambda sigma: 1 - sigma)


def cogview4(scheduler):
    transformer = random(
        CogView4Transformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        condition_dim=4,
    )
    return Built(
        pipeline("CogView4Pipeline", scheduler, transformer, tiny_vae()), {**texts(), **_CALL}, calls_a_step=2
    )


def prx(scheduler):
    transformer = random(
        PRXTransformer2DModel,
        patch_size=1,
        in_channels=4,
        context_in_dim=TEXT,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[8, 8],
    )
    given = {**texts(ATTENTION_MASKS), **_CALL, "use_resolution_binning": False}
    return Built(pipeline("PRXPipeline", scheduler, transformer, tiny_vae()), given, told=lambda sigma: sigma)


def hidream(scheduler):
    transformer = random(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[TEXT, TEXT],
        text_emb_dim=2 * TEXT,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    given = dict(_CALL)
    for i, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds_t5"] = embeds(1, 5, TEXT, seed=i)
        given[f"{prefix}prompt_embeds_llama3"] = embeds(2, 1, 5, TEXT, seed=i)
        given[f"{prefix}pooled_prompt_embeds"] = embeds(1, 2 * TEXT, seed=i)
    return Built(pipeline("HiDreamImagePipeline", scheduler, transformer, tiny_vae()), given)


def hunyuan_video(scheduler):
    transformer = random(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=TEXT,
        rope_axes_dim=(2, 4, 4),
    )
    given = {
        "prompt_embeds": embeds(1, 5, TEXT),
        "pooled_prompt_embeds": embeds(1, TEXT),
        "prompt_attention_mask": texts(("mask",))["mask"],
    }
    return Built(pipeline("HunyuanVideoPipeline", scheduler, transformer), {**given, **_CALL, "num_frames": 5})


def skyreels(scheduler):
    transformer = random(SkyReelsV2Transformer3DModel, in_channels=4, **FILMS)
    given = {**texts(), **_CALL, "height": 32, "width": 32, "num_frames": 5}
    return Built(pipeline("SkyReelsV2Pipeline", scheduler, transformer), given, calls_a_step=2)
