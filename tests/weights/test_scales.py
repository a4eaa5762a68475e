"""A scale for each block: which weights it means is counted here by hand, and in files as in a live model."""

import pytest
import torch

from perflow_diffusers.weights import MergeError, merge_delta, merge_files, open_weights, set_delta_scale
from perflow_diffusers.weights.make.combine import combine
from perflow_diffusers.weights.read import lora_names
from perflow_diffusers.weights.scales import parse_scale, strength_of

RESNET = "resnets.0.conv1.weight"


def numbers(unet, scale):
    """What every weight's delta was multiplied by, measured: all deltas are 1, all weights 0."""
    state = unet.state_dict()
    for weight in state.values():
        weight.zero_()
    ones = {name: torch.ones_like(weight) for name, weight in state.items()}
    with merge_delta(unet, ones, scale):
        found = {name: set(weight.flatten().tolist()) for name, weight in unet.state_dict().items()}
    assert all(len(values) == 1 for values in found.values())
    return {name: values.pop() for name, values in found.items()}


def test_sides_and_the_rest(unet):
    for name, number in numbers(unet, {"down": 0.5, "mid": 0.25, "up": 2}).items():
        sides = {"down_blocks": 0.5, "mid_block": 0.25, "up_blocks": 2}
        assert number == sides.get(name.split(".")[0], 1), name


@pytest.mark.filterwarnings("ignore:scale=.* is far from")
def test_nested_as_in_diffusers(unet):
    """diffusers' own expansion of the same mapping is the judge for what it covers: attention layers."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    scale = {"down": {"block_0": [0.5]}, "mid": [0.25], "up": {"block_0": 4, "block_1": [2, 3]}}
    wanted = _maybe_expand_lora_scales(unet, [{**scale, "up": {"block_1": [2, 3]}}])[0]
    found = numbers(unet, scale)
    for layer, number in wanted.items():
        inside = {found[name] for name in found if name.startswith(f"{layer}.")}
        assert inside == {float(number)}, layer
    assert found["up_blocks.1.resnets.0.conv1.weight"] == 2 and found["up_blocks.1.resnets.1.conv1.weight"] == 3
    assert found["up_blocks.0.upsamplers.0.conv.weight"] == 4 and found["conv_in.weight"] == 1


@pytest.mark.filterwarnings("ignore:scale=.* is far from")
def test_the_closer_name_wins_in_any_order(unet):
    scale = {"up_blocks.1.attentions.0": 0.25, "up": 0, "up_blocks.1": 0.5, "conv_in.bias": 3}
    for given in (scale, dict(reversed(scale.items()))):
        found = numbers(unet, given)
        assert {number for name, number in found.items() if name.startswith("up_blocks.0.")} == {0}
        assert found["up_blocks.1." + RESNET] == 0.5 and found["up_blocks.1.attentions.0.proj_in.weight"] == 0.25
        assert found["conv_in.bias"] == 3 and found["conv_in.weight"] == 1 and found["conv_out.weight"] == 1


@pytest.mark.filterwarnings("ignore:scale=.* is far from")
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_web_uis_counting_is_that_of_the_original_code(make_unet, kind):
    """SD 1.x: twelve input and output blocks; SDXL: nine. Original names come from the table of LoRA names."""
    sides = {
        "sd": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
        "sdxl": (
            ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
    }
    down, up = sides[kind]
    blocks = {"block_out_channels": (8,) * len(down), "down_block_types": down, "up_block_types": up}
    unet = make_unet(**blocks, layers_per_block=2, attention_head_dim=4)
    count = 12 if kind == "sd" else 9
    names = [f"IN{number:02}" for number in range(count)] + ["M00"] + [f"OUT{number:02}" for number in range(count)]
    strength = strength_of({name: float(place + 2) for place, name in enumerate(names)}, unet.state_dict())
    seen = set()
    for name in unet.state_dict():
        if name.split(".")[0] not in ("down_blocks", "mid_block", "up_blocks", "conv_in"):
            assert strength.of(name) == 1
            continue
        original = lora_names.to_original(name.rpartition(".")[0]).split(".")
        counted = {"input_blocks": "IN", "output_blocks": "OUT"}.get(original[0])
        wanted = f"{counted}{int(original[1]):02}" if counted else "M00"
        seen.add(wanted)
        assert names[int(strength.of(name)) - 2] == wanted, name
    assert seen == set(names)
    with pytest.raises(MergeError, match=rf"names 'IN{count}'.*IN00 to OUT{count - 1:02}"):
        strength_of({f"IN{count}": 1.0}, unet.state_dict())


def test_bits_return_and_nothing_drifts(make_unet, make_delta, bits, same):
    unet = make_unet(torch.float16)
    before, first, second = bits(unet), make_delta(unet, seed=1), make_delta(unet, seed=2)
    blocks = {"down": 0.3, "up": {"block_1": -0.7}, "mid": 0}
    below = merge_delta(unet, first, blocks)
    above = merge_delta(unet, second, {"mid": 0.5})
    once = bits(unet)
    total = {
        name: weight.double() + strength_of(blocks, before).of(name) * first[name].double()
        for name, weight in before.items()
    }
    wanted = {
        name: (value + strength_of({"mid": 0.5}, before).of(name) * second[name].double()).half()
        for name, value in total.items()
    }
    differ = sum((once[name] != wanted[name]).sum().item() for name in wanted)
    assert differ < 0.003 * sum(weight.numel() for weight in before.values())  # fp32 sums beside a tie
    for scale in ({"mid": 3}, 0.1, {"IN00": 0, "OUT00": 2}):
        set_delta_scale(unet, scale)
        below.set_scale(scale)
    assert below.scale == {"IN00": 0, "OUT00": 2}
    below.set_scale(blocks)
    above.set_scale({"mid": 0.5})
    assert same(bits(unet), once) and "mid" in str(above.report)
    above.undo()
    below.undo()
    assert same(bits(unet), before)


def test_files_are_as_the_live_model(make_unet, make_delta, bits, same, tmp_path):
    unet = make_unet(torch.bfloat16)
    delta, out = make_delta(unet), tmp_path / "out.safetensors"
    scale = {"down": 0.8, "mid_block.resnets": 0.5}
    report = merge_files(unet.state_dict(), delta, out, scale=scale)
    merge_delta(unet, delta, scale)
    assert same(dict(open_weights(out)), bits(unet)) and report.scale == scale and '"down": 0.8' in str(report)


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        ({"encoder": 1}, r"'encoder', which this model has not.*down, mid, up; IN00 to OUT03;.*conv_in.*up_blocks"),
        ({"up_blocks.2": 1}, "'up_blocks.2'"),
        ({"up_block": 1}, "'up_block'"),
        ({"up": {"block_2": 1}}, r"'block_2'.*It has block_0, block_1"),
        ({"up": {"block_1": [1, 2, 3]}}, "3 numbers for up_blocks.1, which has 2 layers"),
        ({"mid": [1, 2]}, "scale of mid"),
        ({"mid": float("nan")}, "not a finite number"),
        ({"down": "strong"}, "not a finite number"),
        ({"down": 1, "down_blocks": 2}, "down_blocks twice"),
        ({3: 1.0}, "names 3"),
    ],
)
def test_scales_that_mean_nothing(unet, delta, bits, same, scale, match):
    before = bits(unet)
    handle = merge_delta(unet, delta)
    merged = bits(unet)
    for act in (lambda: merge_delta(unet, delta, scale), lambda: handle.set_scale(scale)):
        with pytest.raises(MergeError, match=match):
            act()
        assert same(bits(unet), merged)
    handle.undo()
    assert same(bits(unet), before)


def test_scales_as_typed():
    assert parse_scale("0.8") == 0.8 and parse_scale("1e-1") == 0.1
    assert parse_scale("down=0.8, mid=1,up_blocks.1=-2") == {"down": 0.8, "mid": 1.0, "up_blocks.1": -2.0}
    assert parse_scale('{"up": {"block_0": [1, 2]}}') == {"up": {"block_0": [1, 2]}}
    for text in ("strong", "down=", "down=a", '{"up": 1', "1,2"):
        with pytest.raises(MergeError, match="cannot be read"):
            parse_scale(text)


def test_a_scale_by_block_where_no_model_is_at_hand_says_what_it_has_to_be(tmp_path):
    delta = {"conv_in.weight": torch.ones(2, 2, 3, 3)}
    with pytest.raises(MergeError, match=r"scale={'down': 0.5} is by block. Here it is one number"):
        combine([delta, delta], tmp_path / "both.safetensors", [{"down": 0.5}, 1])
    assert not list(tmp_path.iterdir())


def test_a_handle_shows_the_strength_of_now(unet):
    delta = {name: torch.full_like(weight, 0.1) for name, weight in unet.state_dict().items()}
    handle = merge_delta(unet, delta, 0.5)
    assert " x 0.5 into " in repr(handle) and repr(handle).endswith("; active)")
    handle.set_scale({"up": 0.25})
    assert " ".join(repr(handle).split()).endswith('; now x {"up": 0.25})')
    handle.undo()
    assert repr(handle).endswith("; undone)")
    permanent = merge_delta(unet, delta, 0.5, backup="none")
    assert repr(permanent).endswith("; no backup, cannot be undone)")
