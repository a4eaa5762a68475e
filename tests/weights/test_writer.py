"""Files that belong together are replaced together: shards and their index, a LoRA and its residual."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch

from perflow_diffusers.weights import WeightWriteError, compute_delta, convert_lora, extract_lora, open_weights


@contextmanager
def files_of_at_most(nbytes):
    """The kernel refuses to make a file longer than that, as a full disk does in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def deltas(unet, make_unet, tmp_path):
    """Two deltas of one base, as files."""
    paths = []
    for seed in (4, 5):
        compute_delta(unet, make_unet(seed=seed), path := tmp_path / f"{seed}.safetensors")
        paths.append(path)
    return paths


def test_a_set_of_shards_is_replaced_whole_or_not_at_all(unet, make_unet, tmp_path):
    folder, first, second = tmp_path / "shards", make_unet(seed=4), make_unet(seed=5)
    compute_delta(unet, first, folder, max_shard_size=40_000)
    before = content(folder)
    sizes = sorted(len(data) for data in before.values())
    with files_of_at_most(sizes[-1] - 1), pytest.raises(WeightWriteError, match=r"File too large.*unchanged"):
        compute_delta(unet, second, folder, max_shard_size=40_000, overwrite=True)
    assert content(folder) == before
    with pytest.raises(WeightWriteError, match="overwrite=True"):
        compute_delta(unet, second, folder, max_shard_size=40_000)
    delta = compute_delta(unet, second, folder, max_shard_size=120_000, overwrite=True)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert {path.name for path in folder.iterdir()} == shards | {"diffusion_pytorch_model.safetensors.index.json"}
    for name, value in open_weights(folder).items():
        assert torch.equal(value, second.state_dict()[name] - unet.state_dict()[name])
    assert len(shards) < len(before) - 1 and delta.kind == "delta"


def test_a_lora_and_its_residual_stay_a_pair(deltas, tmp_path):
    place = tmp_path / "lora"
    place.mkdir()
    extract_lora(deltas[0], place / "l.safetensors", rank=8)
    before = content(place)
    residual, lora = (len(before[name]) for name in sorted(before, key=lambda name: len(before[name])))
    with files_of_at_most((residual + lora) // 2), pytest.raises(WeightWriteError, match=r"lora/l\.safetensors could"):
        extract_lora(deltas[1], place / "l.safetensors", rank=8, overwrite=True)
    assert content(place) == before
    extract_lora(deltas[1], tmp_path / "other.safetensors", rank=8)
    with files_of_at_most((residual + lora) // 2), pytest.raises(WeightWriteError, match=r"lora/l\.safetensors could"):
        convert_lora(tmp_path / "other.safetensors", place / "l.safetensors", "kohya", overwrite=True)
    assert content(place) == before
