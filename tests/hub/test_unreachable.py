"""Without a network every door asks the Hub at most once, waits for nothing, and says in words what to do."""

import json
import logging
import socket
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_pipes import make_pipe
from loopback import LoopbackHub
from safetensors.torch import save, save_file
from typer.testing import CliRunner

from perflow_diffusers import compute_delta, load_miniature, load_perflow, merge_delta, open_weights, set_scheduler
from perflow_diffusers.app.opening import open_studio
from perflow_diffusers.cli import app
from perflow_diffusers.hub import PeRFlowArtifact, describe, pull, push_perflow
from perflow_diffusers.pipelines.wonder3d import Wonder3DPipeline
from perflow_diffusers.weights import describe_weights, merge_files
from perflow_training.config import TrainingConfig
from perflow_training.teacher.load import load_pipeline

BASE = {"conv_in.bias": torch.zeros(2)}


class HangsUp:
    """A host that takes every request and hangs up without an answer; counts those about a model."""

    def __init__(self):
        self.count, self.socket = 0, socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            line = connection.recv(1 << 16).split(b"\r\n")[0]
            self.count += b"agent-harnesses" not in line  # the client's own question, once in a process
            connection.close()


def go_to(monkeypatch, port, cache):
    """Let the client ask 127.0.0.1 at `port`, with this cache; waiting between two tries is an error."""

    def waits(seconds):
        raise AssertionError(f"it waits {seconds} s")

    constants = huggingface_hub.constants
    url = f"http://127.0.0.1:{port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def said():
    """What the client logs."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("huggingface_hub").addHandler(handler)
    yield found
    logging.getLogger("huggingface_hub").removeHandler(handler)


@pytest.fixture
def nowhere(monkeypatch, tmp_path, said):
    monkeypatch.chdir(tmp_path)
    host = HangsUp()
    go_to(monkeypatch, host.socket.getsockname()[1], tmp_path / "cache")
    yield host
    host.socket.close()
    assert said == []


def perflow(*words):
    """The command; its error as an exception."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    raise ValueError(result.output)


def opened(model, accelerator=None):
    if accelerator is not None:
        load_miniature().save_pretrained("pipe")
    return open_studio(model, accelerator, device="cpu")


def an_original_file():
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, "original.safetensors")
    return "original.safetensors"


DOORS = {
    "open_weights": lambda: open_weights("some/id"),
    "open_weights of a short name": lambda: open_weights("perflow-sd15-delta"),
    "describe_weights": lambda: describe_weights("some/id"),
    "compute_delta": lambda: compute_delta("some/id", "other/id"),
    "merge_files": lambda: merge_files("some/id", BASE, "merged.safetensors"),
    "merge_delta": lambda: merge_delta(make_pipe("sd"), "some/id"),
    "load_perflow": lambda: load_perflow(make_pipe("sd"), "some/id"),
    "load_perflow of a short name": lambda: load_perflow(make_pipe("sd"), "perflow-sd15-delta"),
    "set_scheduler": lambda: set_scheduler(make_pipe("sd"), "some/id"),
    "from_pretrained": lambda: PeRFlowArtifact.from_pretrained("some/id"),
    "describe": lambda: describe("some/id"),
    "Wonder3DPipeline": lambda: Wonder3DPipeline.from_pretrained("some/id"),
    "training": lambda: load_pipeline(TrainingConfig(pretrained_model_name_or_path="some/id", output_dir="out")),
    "open_studio": lambda: opened("some/id"),
    "open_studio of an address": lambda: opened("https://huggingface.co/some/id"),
    "open_studio of a file": lambda: opened(an_original_file()),
    "open_studio with an accelerator": lambda: opened("pipe", "some/id"),
    "perflow info": lambda: perflow("info", "some/id"),
    "perflow diff": lambda: perflow("diff", "some/id", "other/id", "out.safetensors"),
    "perflow merge": lambda: perflow("merge", "some/id", "other/id", "out.safetensors"),
    "perflow extract-lora": lambda: perflow("extract-lora", "some/id", "lora"),
    "perflow combine": lambda: perflow("combine", "some/id", "other/id", "out.safetensors"),
    "perflow convert": lambda: perflow("convert", "some/id", "out.safetensors", "--to", "int8"),
    "perflow draw": lambda: perflow("draw", "a cat", "--model", "some/id"),
}


@pytest.mark.parametrize("name", DOORS)
def test_the_hub_is_asked_once_and_the_way_out_is_said(nowhere, name):
    with pytest.raises(ValueError) as caught:
        DOORS[name]()
    text = " ".join(str(caught.value).split())
    assert "cannot be reached" in text and "not in the cache" in text and "downloaded once" in text
    assert text.count("the network") <= 1 and "Traceback" not in text
    assert nowhere.count <= 1
    assert not Path("out.safetensors").exists() and not Path("lora").exists()


@pytest.mark.parametrize("more", ["tree/v2", "tree/main/unet", "blob/main/unet/diffusion_pytorch_model.safetensors"])
def test_a_studio_takes_whole_pipelines_of_the_main_branch(nowhere, more):
    with pytest.raises(ValueError, match=r"hf download some/id.* --local-dir FOLDER"):
        open_studio(f"https://huggingface.co/some/id/{more}", device="cpu")
    assert nowhere.count == 0


def test_a_copy_needs_the_network(nowhere):
    with pytest.raises(ValueError, match=r"cannot be reached for 'some/id' \(\w+\): check the network"):
        pull("some/id", "copy")
    assert nowhere.count == 1 and not Path("copy").exists()


def test_publishing_says_that_nobody_answered(nowhere, accelerators):
    with pytest.raises(ValueError, match=r"'me/new' was not published.*cannot be reached"):
        push_perflow(accelerators["sd"].folder, "me/new", licence="mit", token="hf_none")
    assert nowhere.count == 1


@pytest.mark.parametrize("name", ["open_weights", "load_perflow", "open_studio", "perflow info", "training"])
def test_a_closed_port_is_named_with_what_the_system_says(monkeypatch, tmp_path, said, name):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.chdir(tmp_path)
        port = closed.getsockname()[1]
        go_to(monkeypatch, port, tmp_path / "cache")
        with pytest.raises(ValueError, match="Connection refused") as caught:
            DOORS[name]()
    assert f"127.0.0.1:{port}" in str(caught.value).replace("\n", "") and said == []


def test_offline_mode_is_named_as_the_reason(monkeypatch, tmp_path, nowhere):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("open_weights", "load_perflow", "open_studio", "perflow info"):
        with pytest.raises(ValueError, match=r"was not asked.*HF_HUB_OFFLINE"):
            DOORS[name]()
    with pytest.raises(ValueError, match=r"was not asked.*local_files_only=True"):
        open_weights("some/id", local_files_only=True)
    assert nowhere.count == 0


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers' own
def test_what_was_downloaded_once_is_found_without_a_network(monkeypatch, tmp_path, said):
    """Also where another library downloaded a part of the repository."""
    monkeypatch.chdir(tmp_path)
    pipe = make_pipe("sd")
    pipe.save_pretrained("pipe")
    files = {
        path.relative_to("pipe").as_posix(): path.read_bytes() for path in Path("pipe").rglob("*") if path.is_file()
    }
    with LoopbackHub() as server:
        go_to(monkeypatch, server.server.server_port, tmp_path / "cache")
        server.put("me/pipe", {**files, "large.bin": b"nobody asked for it"})
        server.put("me/bare", {"diffusion_pytorch_model.safetensors": save(BASE), "large.bin": b"nor for this"})
        huggingface_hub.snapshot_download("me/pipe", allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        huggingface_hub.snapshot_download("me/bare", allow_patterns=["*.safetensors"])
    host = HangsUp()
    go_to(monkeypatch, host.socket.getsockname()[1], tmp_path / "cache")
    assert torch.equal(open_weights("me/bare")["conv_in.bias"], BASE["conv_in.bias"]) and host.count == 1
    weights = open_weights("me/pipe")
    assert torch.equal(weights["conv_in.bias"], pipe.unet.conv_in.bias) and host.count == 2
    config = TrainingConfig(pretrained_model_name_or_path="me/pipe", output_dir="out")
    assert torch.equal(load_pipeline(config, encoders=False).unet.conv_in.bias, pipe.unet.conv_in.bias)
    assert host.count == 3 and said == []
    assert json.loads(CliRunner().invoke(app, ["info", "me/pipe", "--json"]).output)["name"] == "me/pipe"
    host.socket.close()
