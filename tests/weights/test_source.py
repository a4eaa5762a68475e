"""Opening weights: what is accepted, what is chosen, and what is refused with which words."""

import json
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from perflow_diffusers.weights import SHORT_NAMES, WeightSourceError, open_weights
from perflow_diffusers.weights.read.locate import HubSpec
from perflow_diffusers.weights.read.lora import as_delta


@pytest.fixture
def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4).half()}


@pytest.fixture
def file(tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt", "steps": "4"})
    return path


def check(source, tensors):
    assert dict(source.shapes) == {name: tuple(value.shape) for name, value in tensors.items()}
    assert dict(source.dtypes) == {name: value.dtype for name, value in tensors.items()}
    assert len(source) == len(tensors) and all(torch.equal(source[name], tensors[name]) for name in tensors)
    assert "a.weight" in source and "c" not in source
    with pytest.raises(KeyError):
        source["c"]


def test_state_dict_file_and_source(tensors, file):
    check(open_weights(tensors), tensors)
    source = open_weights(file)
    check(source, tensors)
    assert open_weights(source) is source and open_weights(str(file)).metadata["steps"] == "4"
    assert source.files == (file,) and source.nbytes == 32 and source.kind == "weights"


def test_opening_reads_no_tensor(tmp_path):
    path = tmp_path / "large.safetensors"
    header = json.dumps({"w": {"dtype": "F16", "shape": [1 << 30], "data_offsets": [0, 2 << 30]}}).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + (2 << 30))
    source = open_weights(path)
    assert source.shapes == {"w": (1 << 30,)} and source["w"][-3:].tolist() == [0, 0, 0]


def test_kinds(tensors, tmp_path):
    save_file(tensors, tmp_path / "d.safetensors", {"perflow_format": "delta-1"})
    assert open_weights(tmp_path / "d.safetensors").kind == "delta"
    assert open_weights({"unet.x.to_q.lora_A.weight": torch.ones(1)}).kind == "lora"


def test_model_folder_variants_and_pipeline(unet, bits, same, tmp_path):
    folder = tmp_path / "pipe" / "unet"
    unet.save_pretrained(folder)
    half = {name: value.half() for name, value in unet.state_dict().items()}
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    wanted = bits(unet)
    assert same(dict(open_weights(folder)), wanted)
    assert same(dict(open_weights(tmp_path / "pipe")), wanted)
    assert same(dict(open_weights(tmp_path / "pipe", subfolder="unet", variant="fp16")), half)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    save_file(half, tmp_path / "pipe" / "all-in-one.safetensors")
    assert same(dict(open_weights(tmp_path / "pipe")), wanted)
    with pytest.raises(WeightSourceError, match=r"no weights of variant 'bf16'.*fp16"):
        open_weights(folder, variant="bf16")
    with pytest.raises(WeightSourceError, match="no subfolder 'transformer'"):
        open_weights(tmp_path / "pipe", subfolder="transformer")


def test_sharded_folder(unet, bits, same, tmp_path):
    unet.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    unet.save_pretrained(tmp_path / "variant", max_shard_size="60KB", variant="fp16")
    assert len(list((tmp_path / "plain").glob("*-of-*.safetensors"))) > 2
    wanted = bits(unet)
    assert same(dict(open_weights(tmp_path / "plain")), wanted)
    assert same(dict(open_weights(tmp_path / "variant", variant="fp16")), wanted)
    next((tmp_path / "plain").glob("*-00002-of-*")).unlink()
    with pytest.raises(WeightSourceError, match="not beside it"):
        open_weights(tmp_path / "plain")
    index = next((tmp_path / "variant").glob("*.json.*"), None) or next((tmp_path / "variant").glob("*.index*.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = content["weight_map"]["conv_in.bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightSourceError, match=r"lack tensors.*ghost"):
        open_weights(tmp_path / "variant", variant="fp16")
    content["weight_map"]["ghost"] = "../plain/secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(WeightSourceError, match="not beside it"):
        open_weights(tmp_path / "variant", variant="fp16")
    index.write_text("[]")
    with pytest.raises(WeightSourceError, match="not a sharded-weights index"):
        open_weights(tmp_path / "variant", variant="fp16")


def test_folder_with_one_file_many_files_or_none(tensors, tmp_path):
    save_file(tensors, tmp_path / "one.safetensors")
    check(open_weights(tmp_path), tensors)
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(WeightSourceError, match=r"2 weights without a variant.*one.safetensors, two.safetensors"):
        open_weights(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightSourceError, match="holds: nothing"):
        open_weights(empty)
    (empty / "vae").mkdir()
    save_file(tensors, empty / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightSourceError, match=r"holds no safetensors weights.*vae/diffusion"):
        open_weights(empty)
    (empty / "transformer").mkdir()
    save_file(tensors, empty / "transformer" / "diffusion_pytorch_model.safetensors")
    check(open_weights(empty), tensors)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_pickle_is_refused_and_never_loaded(tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / f"diffusion_pytorch_model{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    for given in (path, tmp_path):
        with pytest.raises(WeightSourceError, match=r"pickle.*save_file"):
            open_weights(given)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(path.read_bytes())
    with pytest.raises(WeightSourceError, match="pickle"):
        open_weights(disguised)
    assert not (tmp_path / "exploded").exists()


def test_truncated_file(file):
    data = file.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 20, 8, 3, 0):
        file.write_bytes(data[:length])
        with pytest.raises(WeightSourceError, match=r"x\.safetensors is not an intact safetensors file"):
            open_weights(file)
    file.write_bytes(data + b"more")
    with pytest.raises(WeightSourceError, match="longer than its header says"):
        open_weights(file)


def write_header(path, header, payload):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"w": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2]}},
        ["w"],
        b"{not json",
        b"",
    ],
)
def test_header_that_lies(tmp_path, header):
    path = tmp_path / "liar.safetensors"
    write_header(path, header, bytes(8))
    with pytest.raises(WeightSourceError, match=r"liar\.safetensors"):
        open_weights(path)


def test_lfs_pointer_and_other_files(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(WeightSourceError, match="git lfs pull"):
        open_weights(path)
    path.write_text("hello, I am a text file")
    with pytest.raises(WeightSourceError, match="no readable header"):
        open_weights(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs file permissions")
def test_file_without_permission(file):
    file.chmod(0)
    with pytest.raises(WeightSourceError, match="permissions"):
        open_weights(file)


def test_odd_state_dicts():
    with pytest.raises(WeightSourceError, match="under 'state_dict'"):
        open_weights({"state_dict": {"w": torch.ones(1)}})
    with pytest.raises(WeightSourceError, match="'step' of the given one is a int"):
        open_weights({"w": torch.ones(1), "step": 3})
    with pytest.raises(WeightSourceError, match="offloaded"):
        open_weights(torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(WeightSourceError, match="Cannot read weights from None"):
        open_weights(None)


def test_names(tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightSourceError, match=r"miniature.*, perflow-sd15-delta"):
        open_weights("perflow-sd14")
    monkeypatch.setitem(SHORT_NAMES, "packaged", lambda: tmp_path / "gone.safetensors")
    with pytest.raises(WeightSourceError, match="Reinstall"):
        open_weights("packaged")
    save_file(tensors, tmp_path / "kept.safetensors", {"steps": "4"})
    monkeypatch.setitem(SHORT_NAMES, "packaged", lambda: tmp_path / "kept.safetensors")
    source = open_weights("packaged")
    check(source, tensors)
    assert source.name == "packaged" and source.metadata["steps"] == "4"
    Path("packaged").mkdir()
    save_file({"local": torch.ones(1)}, "packaged/w.safetensors")
    assert list(open_weights("packaged")) == ["local"]
    assert SHORT_NAMES["miniature"]().name == "perflow.safetensors"


@pytest.fixture
def hub(tensors, tmp_path, monkeypatch):
    """A Hub with one repository: variants at the root, a pipeline inside `sub/`; records what is downloaded."""
    store, downloads = tmp_path / "store", []
    (store / "sub" / "unet").mkdir(parents=True)
    for name in ("diffusion_pytorch_model.v0-0", "diffusion_pytorch_model.v0-1"):
        save_file(tensors, store / f"{name}.safetensors")
    save_file(tensors, store / "sub" / "unet" / "diffusion_pytorch_model.safetensors")
    (store / "sub" / "model_index.json").write_text("{}")
    state = SimpleNamespace(online=True, downloads=downloads, store=store, cached=True)

    class Api:
        def __init__(self, token=None):
            self.token = token

        def model_info(self, repo_id, revision=None, timeout=None):
            if not state.online:
                raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
            if repo_id != "hansyan/perflow-sd15-delta-weights":
                response = SimpleNamespace(headers={}, status_code=404, request=None)
                raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)

        def list_repo_tree(self, repo_id, recursive=False, revision=None):
            for path in sorted(store.rglob("*")):
                if path.is_file():
                    name, size = str(path.relative_to(store)), path.stat().st_size
                    yield huggingface_hub.hf_api.RepoFile(path=name, size=size, oid="0" * 40)

    def download(repo_id, name, revision=None, token=None):
        downloads.append((repo_id, name, revision, token))
        return str(store / name)

    def snapshot(repo_id, revision=None, local_files_only=False):
        if not state.cached:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(store)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return state


def test_hub(hub, tensors):
    source = open_weights("perflow-sd15-delta", revision="abc", token="secret")
    check(source, tensors)
    repo = "hansyan/perflow-sd15-delta-weights"
    assert hub.downloads == [(repo, "diffusion_pytorch_model.v0-1.safetensors", "abc", "secret")]
    assert source.metadata == {"prediction_type": "diff_eps", "num_time_windows": "4"} and source.name == repo
    check(open_weights(repo, subfolder="sub"), tensors)
    assert hub.downloads[-1][1] == "sub/unet/diffusion_pytorch_model.safetensors"
    open_weights("perflow-sd15-delta", variant="v0-0")
    assert hub.downloads[-1][1] == "diffusion_pytorch_model.v0-0.safetensors"
    with pytest.raises(WeightSourceError, match="2 weights without a variant"):
        open_weights(repo)
    with pytest.raises(WeightSourceError, match="The Hub has no 'someone/else'"):
        open_weights("someone/else")
    assert isinstance(SHORT_NAMES["perflow-sd15-delta"], HubSpec)


def test_companions_of_a_lora_come_from_the_hub_too(hub, tmp_path):
    for path in hub.store.glob("*.safetensors"):
        path.unlink()
    factors = {"unet.conv_in.lora_A.weight": torch.ones(1, 2), "unet.conv_in.lora_B.weight": torch.ones(2, 1)}
    save_file(factors, hub.store / "perflow.safetensors", {"perflow_residual": "perflow.residual.safetensors"})
    save_file({"conv_in.bias": torch.ones(2)}, hub.store / "perflow.residual.safetensors")
    repo = "hansyan/perflow-sd15-delta-weights"
    source = open_weights(repo)
    assert source.kind == "lora" and torch.equal(as_delta(source)["conv_in.bias"], torch.ones(2))
    assert [name for _, name, _, _ in hub.downloads] == ["perflow.residual.safetensors", "perflow.safetensors"]
    assert open_weights(hub.store).kind == "lora"
    (hub.store / "perflow.safetensors").unlink()
    assert list(open_weights(hub.store)) == ["conv_in.bias"]


def test_hub_offline(hub, tensors):
    count = len(hub.downloads)
    check(open_weights("perflow-sd15-delta", local_files_only=True), tensors)
    hub.online = False
    check(open_weights("perflow-sd15-delta"), tensors)
    hub.cached = False
    with pytest.raises(WeightSourceError, match=r"not in the cache.*downloaded once"):
        open_weights("perflow-sd15-delta")
    assert len(hub.downloads) == count
