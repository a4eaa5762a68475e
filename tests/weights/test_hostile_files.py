"""Files of others: what the safetensors library reads is read; all else ends in an error of this room."""

import contextlib
import json
import random
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from perflow_diffusers import compute_delta, convert_lora, extract_lora, merge_delta, open_weights, shrink_delta
from perflow_diffusers.weights import (
    DeltaError,
    MergeError,
    WeightSourceError,
    WeightWriteError,
    describe_weights,
    merge_files,
)

OURS = (WeightSourceError, DeltaError, MergeError, WeightWriteError)
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DEEP = "[" * 50_000
PLAIN = json.dumps(ENTRY)

HEADERS = {
    "null metadata": {"__metadata__": None, "a": ENTRY},
    "no metadata": {"a": ENTRY},
    "more keys in an entry": {"a": {**ENTRY, "more": [[1]]}},
    "unsigned": {"a": {**ENTRY, "dtype": "U16", "shape": [4]}},
    "complex": {"a": {**ENTRY, "dtype": "C64", "shape": [1]}},
    "a name twice": f'{{"a": {PLAIN}, "a": {PLAIN}}}',
    "list metadata": {"__metadata__": [], "a": ENTRY},
    "number in the metadata": {"__metadata__": {"a": 1}, "a": ENTRY},
    "deep metadata": f'{{"__metadata__": {DEEP}, "a": {PLAIN}}}',
    "deep": DEEP,
    "text": '"x"',
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": json.dumps({"a": ENTRY}).encode("utf-16"),
    "offsets as text": {"a": {**ENTRY, "data_offsets": ["0", "8"]}},
    "no offsets": {"a": {**ENTRY, "data_offsets": []}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "no entry": {"a": None},
    "negative": {"a": {**ENTRY, "shape": [-2]}},
    "overflowing": {"a": {**ENTRY, "shape": [2**62, 2**62]}},
    "floating offsets": {"a": {**ENTRY, "data_offsets": [0.0, 8.0]}},
    "NaN": '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
    "nothing": b"",
    "deep values": {
        "__metadata__": {
            **dict.fromkeys(("lora_adapter_metadata", "window_boundaries", "recommended_steps", "network"), DEEP),
            "perflow_format": "delta-1",
        },
        "conv_in.bias": ENTRY,
    },
    "deep LoRA config": {
        "__metadata__": {"lora_adapter_metadata": DEEP, "perflow_spelling": DEEP, "ss_network_args": DEEP},
        "unet.conv_in.lora_A.weight": {**ENTRY, "shape": [1, 2]},
    },
}
JSONS = {
    "deep": DEEP.encode(),
    "not UTF-8": b"\xff\xfe\xff",
    "list": b"[]",
    "null": b"null",
    "empty": b"",
    "no map": b"{}",
    "a list of shards": b'{"weight_map": [1]}',
    "numbers as shards": b'{"weight_map": {"a": 5}}',
    "lists as shards": b'{"weight_map": {"a": ["x"]}}',
    "no shards": b'{"weight_map": {}}',
    "elsewhere": b'{"weight_map": {"a": "../x.safetensors"}}',
    "odd values": b'{"_class_name": {}, "in_channels": {}, "block_out_channels": [[1]], "rank_pattern": 5, "r": "x"}',
}


def raw(path, header, body=b"\0" * 8):
    text = (
        header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    )
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def doors(source, out):
    """Every function of the room that reads a file, as (name, call)."""
    model = {"conv_in.bias": torch.zeros(2)}
    return {
        "open": lambda: list(open_weights(source).values()),
        "describe": lambda: str(describe_weights(source)),
        "base": lambda: merge_files(source, model, out / "base.safetensors"),
        "folder": lambda: merge_files(source, model, out / "folder"),
        "delta": lambda: merge_files(model, source, out / "delta.safetensors"),
        "merge": lambda: merge_delta(torch.nn.ModuleDict({"conv_in": torch.nn.Linear(2, 2)}), source),
        "compute": lambda: compute_delta(source, model),
        "extract": lambda: extract_lora(source, out / "lora.safetensors", rank=1),
        "shrink": lambda: shrink_delta(source, out / "int8.safetensors", "int8"),
        "kohya": lambda: convert_lora(source, out / "kohya.safetensors", "kohya"),
        "diffusers": lambda: convert_lora(source, out / "diffusers.safetensors", "diffusers"),
    }


def only_our_errors(source, out):
    for name, call in doors(source, out).items():
        try:
            call()
        except OURS as error:
            assert str(source)[-8:] in str(error) or len(str(error)) > 30, name
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_read_as_the_library_reads_it_or_refused_by_name(name, tmp_path):
    path = raw(tmp_path / "file.safetensors", HEADERS[name])
    try:
        wanted = load_file(path)
    except (SafetensorError, ValueError):
        with pytest.raises(WeightSourceError, match=r"file\.safetensors is not an intact"):
            open_weights(path)
    else:
        opened = open_weights(path)
        assert set(opened) == set(wanted)
        assert all(torch.equal(opened[key], wanted[key]) and opened.dtypes[key] is wanted[key].dtype for key in wanted)
    only_our_errors(path, tmp_path)


@pytest.mark.parametrize("name", JSONS)
def test_json_of_others_is_never_an_error_of_another_kind(name, tmp_path):
    index, peft, config = (tmp_path / part for part in ("index", "peft", "config"))
    for folder in (index, peft, config):
        folder.mkdir()
    (index / "diffusion_pytorch_model.safetensors.index.json").write_bytes(JSONS[name])
    save_file({"a": torch.zeros(2)}, index / "m-00001-of-00002.safetensors")
    with pytest.raises(WeightSourceError, match=r"index|no tensor"):
        open_weights(index)
    only_our_errors(index, tmp_path)
    factors = {"lora_A": torch.zeros(1, 4, 3, 3), "lora_B": torch.zeros(8, 1, 1, 1)}
    tensors = {f"base_model.model.conv_in.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(tensors, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_bytes(JSONS[name])
    only_our_errors(peft, tmp_path)
    weights = {"conv_in.weight": torch.zeros(3, 4, 1, 1)}
    save_file(weights, config / "diffusion_pytorch_model.safetensors")
    (config / "config.json").write_bytes(JSONS[name])
    with pytest.raises(WeightSourceError, match=r"config\.json is not"):
        merge_files(config, weights, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_any_damage_to_a_file_is_an_error_of_this_room(tmp_path):
    generator = random.Random(0)
    facts = {"perflow_format": "delta-1", "prediction_type": "ddim_eps"}
    intact = save({"conv_in.bias": torch.zeros(2), "a.weight": torch.zeros(2, 2)}, facts)
    for number in range(150):
        content = bytearray(intact)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content[: generator.randrange(len(content))] if number % 3 == 0 else content)
        for call in list(doors(path, tmp_path).values())[:2]:
            with contextlib.suppress(OURS):
                call()


def test_a_folder_gets_the_config_of_its_unet_and_no_other(tmp_path):
    weights = {"conv_in.weight": torch.zeros(320, 9, 3, 3), "x.attn2.to_k.weight": torch.zeros(320, 768)}
    for number, (config, wrong) in enumerate(
        (
            ({"_class_name": "AutoencoderKL", "in_channels": 9}, "one of AutoencoderKL"),
            ({"architectures": ["CLIPTextModel"], "hidden_size": 768}, "neither its class nor its channels"),
            ({"_class_name": "UNet2DConditionModel", "in_channels": 4}, r"in_channels is 4, .* have 9"),
            ({"_class_name": "UNet2DConditionModel", "cross_attention_dim": 2048}, r"is 2048, .* have 768"),
            ({"in_channels": 9, "block_out_channels": [128, 256]}, r"\[128, 256\], .* have 320"),
            ({"_class_name": "UNet2DConditionModel", "in_channels": 9, "cross_attention_dim": [768] * 4}, None),
            ({"in_channels": 9, "block_out_channels": [320, 640], "cross_attention_dim": 768}, None),
        )
    ):
        folder, out = tmp_path / f"base-{number}", tmp_path / f"out-{number}"
        folder.mkdir()
        save_file(weights, folder / "single.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        if wrong is None:
            merge_files(folder / "single.safetensors", weights, out)
            assert json.loads((out / "config.json").read_text()) == config
            continue
        with pytest.raises(WeightSourceError, match=wrong):
            merge_files(folder / "single.safetensors", weights, out)
        assert not out.exists()
        merge_files(folder / "single.safetensors", weights, tmp_path / f"file-{number}.safetensors")
