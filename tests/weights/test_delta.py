"""Computing deltas and writing files: numbers, headers, atomicity, bad input."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perflow_diffusers.io import writer
from perflow_diffusers.weights import (
    DeltaError,
    WeightWriteError,
    compute_delta,
    content_hash,
    merge_delta,
    open_weights,
)


@pytest.fixture
def pair(make_unet, make_delta):
    """Base and tuned UNets; two tensors are identical."""
    base, tuned = make_unet(), make_unet()
    for name, change in make_delta(base).items():
        if not name.startswith("conv_out"):
            tuned.state_dict()[name].add_(change.float())
    return base, tuned


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_numbers(pair, tmp_path, dtype):
    base, tuned = pair
    out = tmp_path / "delta.safetensors"
    delta = compute_delta(base, tuned, out, dtype)
    old, new = base.state_dict(), tuned.state_dict()
    wanted = {name: (new[name] - old[name]).to(dtype or torch.float32) for name in old}
    for found in (delta, load_file(out), compute_delta(base, tuned, dtype=dtype)):
        assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert set(delta.identical) == {"conv_out.weight", "conv_out.bias"} and "2 tensors identical" in str(delta)
    assert 0 < delta.relative_norm < 1 and delta.files == (out,)


def test_half_precision_checkpoints_are_subtracted_in_fp32(make_unet):
    base, tuned = make_unet(torch.float16), make_unet(torch.bfloat16, seed=3)
    delta = compute_delta(base, tuned, dtype=torch.float32)
    old, new = base.state_dict(), tuned.state_dict()
    assert all(torch.equal(delta[name], new[name].float() - old[name].float()) for name in old)
    assert compute_delta(base, make_unet(torch.float16, seed=3)).dtypes["conv_in.bias"] == torch.float16


def test_base_plus_delta_is_tuned(pair, bits, same, tmp_path):
    base, tuned = pair
    base.save_pretrained(tmp_path / "base" / "unet")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    delta = compute_delta(tmp_path / "base", str(tmp_path / "tuned"), tmp_path / "d.safetensors")
    assert delta.metadata["base"] == "base" and delta.metadata["tuned"] == "tuned"
    with merge_delta(SimpleNamespace(unet=base), delta):
        found, wanted = bits(base), bits(tuned)
        assert all(torch.allclose(found[name], wanted[name], atol=1e-7) for name in wanted)


def test_header(pair, tmp_path):
    base, tuned = pair
    metadata = {"prediction_type": "ddim_eps", "num_time_windows": 4, "guidance_scale": 7.5, "steps": [4, 8]}
    delta = compute_delta(base, tuned, tmp_path / "d.safetensors", torch.float16, metadata)
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        header = file.metadata()
    assert header == dict(delta.metadata) == dict(open_weights(tmp_path / "d.safetensors").metadata)
    assert header["format"] == "pt" and header["perflow_format"] == "delta-1" and header["dtype"] == "F16"
    assert header["num_time_windows"] == "4" and header["guidance_scale"] == "7.5" and header["steps"] == "[4, 8]"
    assert header["base_hash"] == content_hash(base) != content_hash(tuned)
    assert delta.kind == "delta"
    assert compute_delta(base, tuned).metadata["base_hash"] == header["base_hash"]
    with pytest.raises(DeltaError, match="base_hash"):
        compute_delta(base, tuned, metadata={"base_hash": "mine"})


def test_the_hash_is_of_the_content_only(unet, tmp_path):
    wanted = content_hash(unet)
    unet.save_pretrained(tmp_path, max_shard_size="50KB")
    assert content_hash(tmp_path) == wanted == content_hash(dict(reversed(unet.state_dict().items())))
    unet.conv_in.bias[0] += 1e-6
    assert content_hash(unet) != wanted


def test_shards(pair, tmp_path):
    base, tuned = pair
    delta = compute_delta(base, tuned, tmp_path / "d", torch.float16, {"steps": 4}, max_shard_size=20_000)
    assert len(delta.files) > 3 and all(path.stat().st_size < 40_000 for path in delta.files)
    again, whole = open_weights(tmp_path / "d"), compute_delta(base, tuned, dtype=torch.float16)
    assert all(torch.equal(again[name], whole[name]) for name in whole) and len(again) == len(whole)
    assert again.metadata["steps"] == "4" and again.metadata["base_hash"] == content_hash(base)
    assert again.kind == "delta"
    loaded = type(base).from_config(base.config).from_pretrained
    base.save_config(tmp_path / "d")
    state = loaded(tmp_path / "d", torch_dtype=torch.float16).state_dict()
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_progress(pair, tmp_path):
    seen = []
    compute_delta(*pair, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 208) for number in range(1, 209)]
    compute_delta(
        *pair, tmp_path / "d", max_shard_size=50_000, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[208:] == seen[:208]


def test_only_a_few_tensors_are_alive_at_once(tmp_path):
    tensors = {f"{number:02}": torch.full((100,), float(number)) for number in range(20)}
    alive = []

    def stream():
        for name, tensor in tensors.items():
            alive.append(name)
            assert (tmp_path / "x.safetensors").exists() is False
            yield name, tensor

    writer.write_safetensors(tmp_path / "x.safetensors", writer.specs_of(tensors), stream())
    assert len(alive) == 20 and torch.equal(load_file(tmp_path / "x.safetensors")["07"], tensors["07"])


def test_writer_keeps_every_dtype_aligned(tmp_path):
    dtypes = [torch.uint8, torch.float64, torch.bool, torch.bfloat16, torch.int16, torch.float8_e4m3fn, torch.float32]
    tensors = {f"t{number}": torch.ones(3).to(dtype) for number, dtype in enumerate(dtypes)}
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.zeros(0, 4)
    tensors["strided"] = torch.arange(6.0).reshape(2, 3).t()
    writer.write_safetensors(tmp_path / "x.safetensors", writer.specs_of(tensors), tensors.items(), {"a": "é"})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name].double(), tensors[name].double()) for name in tensors)
    assert open_weights(tmp_path / "x.safetensors").metadata == {"a": "é"}


def test_writer_checks_what_comes(tmp_path):
    specs = {"a": ((2,), torch.float32)}
    for given in ([], [("b", torch.ones(2))], [("a", torch.ones(3))], [("a", torch.ones(2))] * 2):
        with pytest.raises(ValueError, match=r"never came|each name once"):
            writer.write_safetensors(tmp_path / "x.safetensors", specs, given)
    with pytest.raises(ValueError, match="must be strings"):
        writer.write_safetensors(tmp_path / "x.safetensors", specs, [("a", torch.ones(2))], {"steps": 4})
    assert not list(tmp_path.iterdir())


class FullDisk:
    """A file that takes some bytes and then says that the disk is full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def test_disk_full_leaves_the_old_file(pair, tmp_path, monkeypatch):
    out = tmp_path / "delta.safetensors"
    compute_delta(*pair, out)
    old = out.read_bytes()
    real = type(out).open
    monkeypatch.setattr(type(out), "open", lambda self, *mode: FullDisk(real(self, *mode), 50_000))
    with pytest.raises(WeightWriteError, match=r"No space left.*unchanged"):
        compute_delta(*pair, out, dtype=torch.float32, overwrite=True)
    monkeypatch.undo()
    assert out.read_bytes() == old and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_interrupt_while_writing_leaves_the_old_file(pair, tmp_path):
    out = tmp_path / "delta.safetensors"
    compute_delta(*pair, out)
    old = out.read_bytes()

    def stop(done, total):
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_delta(*pair, out, overwrite=True, progress=stop)
    assert out.read_bytes() == old and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_targets_that_cannot_be_written(pair, tmp_path, monkeypatch):
    out = tmp_path / "delta.safetensors"
    compute_delta(*pair, out)
    with pytest.raises(WeightWriteError, match="overwrite=True"):
        compute_delta(*pair, out)
    with pytest.raises(WeightWriteError, match="is a folder"):
        compute_delta(*pair, tmp_path)
    with pytest.raises(WeightWriteError, match="There is no folder"):
        compute_delta(*pair, tmp_path / "no" / "delta.safetensors")
    with pytest.raises(WeightWriteError, match="could not be written"):
        compute_delta(*pair, tmp_path / ("x" * 300 + ".safetensors"))
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(WeightWriteError, match="10 left"):
        compute_delta(*pair, tmp_path / "new.safetensors")


def test_read_only_folder_leaves_the_old_file(pair, tmp_path, monkeypatch):
    """Simulated, because root may write everywhere."""
    out = tmp_path / "delta.safetensors"
    compute_delta(*pair, out)
    old, real = out.read_bytes(), type(out).open

    def forbidden(self, mode="r", *rest, **options):
        if "x" in mode or "w" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(type(out), "open", forbidden)
    with pytest.raises(WeightWriteError, match=r"Permission denied.*unchanged.*where you may"):
        compute_delta(*pair, out, dtype=torch.float16, overwrite=True)
    monkeypatch.undo()
    assert out.read_bytes() == old and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_file_may_replace_its_own_base(pair, tmp_path):
    base, tuned = pair
    path = tmp_path / "w.safetensors"
    save_file(base.state_dict(), path)
    delta = compute_delta(path, tuned, path, overwrite=True)
    assert delta.kind == "delta" and torch.equal(delta["conv_out.bias"], torch.zeros(4))


def test_pairs_that_do_not_match(make_unet, unet):
    with pytest.raises(DeltaError, match=r"different shapes.*\(8, 16\) and \(8, 32\)"):
        compute_delta(unet, make_unet(cross_attention_dim=32))
    with pytest.raises(DeltaError, match="only in a state dict"):
        compute_delta(unet, {**unet.state_dict(), "extra": torch.ones(1)})
    with pytest.raises(DeltaError, match=r"not floating point.*conv_in\.bias"):
        compute_delta(unet, {**unet.state_dict(), "conv_in.bias": torch.ones(8, dtype=torch.int8)})
    with pytest.raises(DeltaError, match="empty"):
        compute_delta(unet, {})
    with pytest.raises(DeltaError, match="more than one tensor"):
        compute_delta(unet, {**unet.state_dict(), "_orig_mod.conv_in.bias": torch.ones(8)})


def test_numbers_that_are_not_finite(make_unet, unet, tmp_path):
    broken = make_unet(seed=3)
    broken.conv_in.bias[0] = float("nan")
    with pytest.raises(DeltaError, match=r"conv_in\.bias of .* NaN or Inf"):
        compute_delta(unet, broken, tmp_path / "d.safetensors")
    broken.conv_in.bias[0] = 1e6
    with pytest.raises(DeltaError, match=r"float16.*float32"):
        compute_delta(unet, broken, tmp_path / "d.safetensors", torch.float16)
    assert not list(tmp_path.iterdir())


def test_index_is_json_that_diffusers_reads(pair, tmp_path):
    compute_delta(*pair, tmp_path / "d", max_shard_size=50_000)
    content = json.loads((tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(content) == {"metadata", "weight_map"} and len(content["weight_map"]) == 208
    with pytest.raises(WeightWriteError, match="overwrite"):
        compute_delta(*pair, tmp_path / "d", max_shard_size=50_000)
    with pytest.raises(ValueError, match="max_shard_size=0"):
        compute_delta(*pair, tmp_path / "e", max_shard_size=0)


@pytest.mark.parametrize("dtype", [torch.int8, "int4", torch.complex64])
def test_dtypes_that_hold_no_difference(pair, tmp_path, dtype):
    with pytest.raises(DeltaError, match="cannot hold a difference"):
        compute_delta(*pair, tmp_path / "delta.safetensors", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("drop", [False, True])
def test_fp8_checkpoints_are_subtracted_in_fp32(make_unet, drop):
    base = {name: weight.to(torch.float8_e4m3fn) for name, weight in make_unet().state_dict().items()}
    tuned = make_unet(torch.float16, seed=1).state_dict()
    delta = compute_delta(base, tuned, drop_identical=drop)
    for name, value in delta.items():
        assert torch.equal(value, (tuned[name].float() - base[name].float()).half())


def test_in_parts_it_is_the_same_difference():
    """A tensor of more numbers than are subtracted at once (2^22), its last part short."""
    generator = torch.Generator().manual_seed(3)
    base = {"conv_in.weight": torch.randn(2100, 2003, generator=generator)}
    tuned = {"conv_in.weight": base["conv_in.weight"] + 0.1 * torch.randn(2100, 2003, generator=generator)}
    exact = tuned["conv_in.weight"].double() - base["conv_in.weight"].double()
    delta = compute_delta(base, tuned)
    assert torch.equal(delta["conv_in.weight"], exact.float())
    relative = (exact.norm() / base["conv_in.weight"].double().norm()).item()
    assert delta.relative_norm == pytest.approx(relative, rel=1e-4)  # norms are summed in fp32
