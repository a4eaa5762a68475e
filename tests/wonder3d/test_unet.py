"""The UNet against the original: recorded outputs, and attention written out row by row as the original has it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file, save_file

from perflow_diffusers.pipelines.wonder3d import UNetMV2DConditionModel
from perflow_diffusers.pipelines.wonder3d.unet import MultiViewTransformerBlock

TOLERANCE = 1e-5
DATA = Path(__file__).parent / "data"


class RowByRow(MultiViewTransformerBlock):
    """The same block, each row computed alone with the keys and values that the original lets it see."""

    def _across_views(self, tokens, kwargs):
        rows = []
        for row in range(len(tokens)):
            first = row - row % self.num_views
            seen = (first, row) if self.sparse else range(first, first + self.num_views)
            keys = torch.cat([tokens[other] for other in seen])[None]
            rows.append(self.attn1(tokens[row : row + 1], encoder_hidden_states=keys))
        return torch.cat(rows)

    def _across_domains(self, tokens):
        half = len(tokens) // 2
        rows = []
        for row in range(len(tokens)):
            keys = torch.cat([tokens[row % half], tokens[row % half + half]])[None]
            rows.append(self.attn_joint_mid(tokens[row : row + 1], encoder_hidden_states=keys))
        return torch.cat(rows)


def inputs(objects=1, views=6, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * objects * views
    return {
        "sample": torch.randn(rows, 8, height, width, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(rows, 1, 16, generator=generator),
        "class_labels": torch.randn(rows, 10, generator=generator),
    }


def blocks(unet):
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


@torch.no_grad()
def run(unet, **values):
    return unet(**values).sample


def difference(unet, io):
    out = run(unet, sample=io["x"], timestep=io["t"], encoder_hidden_states=io["ctx"], class_labels=io["cam"])
    return (out - io["y"]).abs().max()


def test_the_output_is_the_originals_to_within_1e_5_and_depends_on_both_attentions(original, original_unet):
    io = original[2]
    assert difference(original_unet, io) <= TOLERANCE
    for block in blocks(original_unet):
        block.attn_joint_mid = None
    assert difference(original_unet, io) > 100 * TOLERANCE
    for block in blocks(original_unet):
        block.multiview = False
    assert difference(original_unet, io) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "views", "sparse"),
    [("sparse", 6, True), ("four_views", 4, False), ("two_objects", 6, False), ("two_objects_sparse", 3, True)],
)
def test_other_sizes_more_objects_and_the_sparse_mode_equal_the_originals(original, case, views, sparse):
    """Recorded from the original's own transformer blocks, fed with rows in the order (domain, object, view)."""
    config, weights, _ = original
    recorded = load_file(DATA / "more_io.safetensors")
    unet = UNetMV2DConditionModel.from_config(config, num_views=views, sparse_mv_attention=sparse).eval()
    unet.load_state_dict(weights)
    assert difference(unet, {name: recorded[f"{case}.{name}"] for name in ("x", "t", "ctx", "cam", "y")}) <= TOLERANCE


@pytest.mark.parametrize(
    ("objects", "views", "height", "width", "sparse"),
    [(1, 6, 12, 8, True), (2, 4, 8, 8, False), (3, 2, 4, 8, True), (1, 1, 8, 8, False)],
)
def test_other_sizes_and_the_sparse_mode_equal_attention_row_by_row(make_unet, objects, views, height, width, sparse):
    unet = make_unet(num_views=views, sparse_mv_attention=sparse)
    values = inputs(objects, views, height, width)
    ours = run(unet, **values)
    for block in blocks(unet):
        block.__class__ = RowByRow
    assert (ours - run(unet, **values)).abs().max() <= TOLERANCE


def test_objects_of_one_batch_do_not_see_each_other(make_unet):
    unet = make_unet()
    values = inputs(objects=2)
    together = run(unet, **values).unflatten(0, (2, 2, 6))
    for one in range(2):
        alone = {
            name: value if name == "timestep" else value.unflatten(0, (2, 2, 6))[:, one].flatten(0, 1)
            for name, value in values.items()
        }
        assert (together[:, one].flatten(0, 1) - run(unet, **alone)).abs().max() <= TOLERANCE


def test_the_guidance_axis_is_one_more_object_so_that_domains_stay_together(make_unet):
    unet = make_unet()
    given = inputs()
    without = {**given, "encoder_hidden_states": torch.zeros_like(given["encoder_hidden_states"])}

    def both(name):
        return torch.stack([without[name].unflatten(0, (2, 6)), given[name].unflatten(0, (2, 6))], 1).flatten(0, 2)

    names = ("sample", "encoder_hidden_states", "class_labels")
    out = run(unet, timestep=given["timestep"], **{name: both(name) for name in names}).unflatten(0, (2, 2, 6))
    for part, values in enumerate((without, given)):
        assert (out[:, part].flatten(0, 1) - run(unet, **values)).abs().max() <= TOLERANCE


def test_without_both_attentions_it_is_the_stock_unet(make_unet):
    unet = make_unet(multiview_attention=False, cd_attention_mid=False)
    stock = UNet2DConditionModel.from_config(unet.config).eval()
    stock.load_state_dict(unet.state_dict())
    assert torch.equal(run(unet, **inputs()), run(stock, **inputs()))


def test_at_full_size_116_keys_are_added_to_sd15_and_only_conv_in_has_another_shape():
    sd15 = {"cross_attention_dim": 768}
    with torch.device("meta"):
        ours = UNetMV2DConditionModel(
            **sd15,
            sample_size=32,
            in_channels=8,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=10,
            down_block_types=("CrossAttnDownBlockMV2D",) * 3 + ("DownBlock2D",),
            mid_block_type="UNetMidBlockMV2DCrossAttn",
            up_block_types=("UpBlock2D", *("CrossAttnUpBlockMV2D",) * 3),
        ).state_dict()
        stock = UNet2DConditionModel(**sd15).state_dict()
    added = ours.keys() - stock.keys()
    assert (len(ours), len(stock), len(added)) == (802, 686, 116)
    assert sum("_joint_mid." in key for key in added) == 7 * 16
    assert sum(key.startswith("class_embedding.") for key in added) == 4
    assert [key for key in stock if stock[key].shape != ours[key].shape] == ["conv_in.weight"]


def test_gradient_checkpointing_gives_the_same_gradients(make_unet):
    unet = make_unet().requires_grad_(True).train()
    values = inputs(height=4)
    gradients = []
    for _ in range(2):
        unet.zero_grad()
        unet(**values).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
        unet.enable_gradient_checkpointing()
    assert all(module.gradient_checkpointing for module in unet.modules() if hasattr(module, "gradient_checkpointing"))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_attention_slicing_changes_nothing(make_unet, sparse):
    unet = make_unet(sparse_mv_attention=sparse)
    before = run(unet, **inputs())
    unet.set_attention_slice("max")
    assert (run(unet, **inputs()) - before).abs().max() <= TOLERANCE


def test_it_compiles_into_one_graph(pipe):
    values = inputs()
    eager = run(pipe.unet, **values)
    compiled = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, **values), eager)


def test_saved_and_reloaded_it_is_the_same(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path)
    again = UNetMV2DConditionModel.from_pretrained(tmp_path)
    before, after = pipe.unet.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (again.config.num_views, again.config.sparse_mv_attention) == (6, False)
    half = UNetMV2DConditionModel.from_pretrained(tmp_path, dtype=torch.float16, sparse_mv_attention=True)
    assert half.dtype == torch.float16 and all(block.sparse for block in blocks(half))


RELEASED = {"joint_attention": False, "joint_attention_twice": True, "cross_domain_attention": False}


@pytest.mark.parametrize("spelling", ["_joint_twice.", "_joint_mid."])
def test_released_spellings_of_keys_and_settings_are_understood(original, tmp_path, spelling):
    config, weights, io = original
    old = {key.replace("_joint_mid.", spelling): weight for key, weight in weights.items()}
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    own = {key: value for key, value in config.items() if key not in ("cd_attention_mid", "mvcd_attention")}
    own |= {"_class_name": "UNetMV2DConditionModel", "_diffusers_version": "0.19.3", **RELEASED}
    (tmp_path / "config.json").write_text(json.dumps(own))
    unet = UNetMV2DConditionModel.from_pretrained(tmp_path)
    assert difference(unet, io) <= TOLERANCE
    assert not set(RELEASED) & set(unet.config)
    assert UNetMV2DConditionModel.from_config(own).load_state_dict(old).missing_keys == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("conv_in.bias"), "1 missing, e.g. conv_in.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "1 unexpected, e.g. extra"),
    ],
)
def test_loading_is_strict(pipe, tmp_path, change, message):
    pipe.unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        UNetMV2DConditionModel.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(pipe, tmp_path):
    pipe.unet.save_config(tmp_path)
    torch.save(pipe.unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        UNetMV2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("setting", ["cd_attention_last", "mvcd_attention", "only_cross_attention"])
def test_settings_that_no_released_weights_use_are_refused(original, setting):
    with pytest.raises(ValueError, match=f"`{setting}` is set"):
        UNetMV2DConditionModel.from_config({**original[0], "_use_default_values": [], setting: True})


def test_a_batch_without_both_domains_is_refused(make_unet):
    unet = make_unet()
    values = inputs(views=3)
    with pytest.raises(ValueError, match="A batch of 6 rows; expected a multiple of 12"):
        run(unet, **values)
