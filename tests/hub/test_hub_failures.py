"""Whatever a Hub answers, or does not, every door ends in an error of this package that names the repository."""

from pathlib import Path, PurePosixPath, PureWindowsPath

import huggingface_hub
import pytest
import torch
from hub_pipes import make_pipe
from loopback import Fault, LoopbackHub
from safetensors.torch import save

from perflow_diffusers import compute_delta, merge_delta, open_weights
from perflow_diffusers.hub import ArtifactError, PeRFlowArtifact, PushError, describe, load_perflow, pull, push_perflow
from perflow_diffusers.hub.push import name_in
from perflow_diffusers.pipelines.wonder3d import Wonder3DPipeline
from perflow_diffusers.weights import MergeError, WeightSourceError, describe_weights, merge_files

OURS = (ArtifactError, MergeError, WeightSourceError)
BASE = {"conv_in.bias": torch.zeros(2)}


@pytest.fixture(scope="module")
def artifact(accelerators):
    folder = accelerators["sd"].folder
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch, tmp_path, artifact):
    """The client speaks to a server with one artefact, tries again without waiting, and has patience for a second."""
    constants = huggingface_hub.constants
    with LoopbackHub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        server.put("me/artifact", artifact)
        server.put("me/bare", {"diffusion_pytorch_model.safetensors": save(BASE)})
        yield server


DOORS = {
    "open_weights": lambda: open_weights("me/bare"),
    "describe_weights": lambda: describe_weights("me/bare"),
    "compute_delta": lambda: compute_delta("me/bare", BASE),
    "merge_files": lambda: merge_files("me/bare", BASE, "merged.safetensors"),
    "merge_delta": lambda: merge_delta(make_pipe("sd"), "me/bare"),
    "from_pretrained": lambda: PeRFlowArtifact.from_pretrained("me/artifact"),
    "load_perflow": lambda: load_perflow(make_pipe("sd"), "me/artifact"),
    "describe": lambda: describe("me/artifact"),
    "pull": lambda: pull("me/artifact", "copy"),
    "Wonder3DPipeline": lambda: Wonder3DPipeline.from_pretrained("me/artifact"),
}


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
@pytest.mark.parametrize("path", ["api/models/[^/]+/[^/]+(/revision/.*)?$", "/tree/", "/resolve/"])
def test_every_answer_is_explained(hub, path, status):
    hub.faults = [Fault("status", path, status, method=method, times=999) for method in ("GET", "HEAD")]
    for name, door in DOORS.items():
        try:
            door()
        except OURS as error:
            assert "me/" in str(error), name
        except ValueError as error:
            assert name == "Wonder3DPipeline" and "artifact" in str(error), (name, error)  # or its place in the cache
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("kind", ["short", "cut"])
def test_half_a_file_is_named_and_never_used(hub, kind):
    hub.faults = [Fault(kind, "/resolve/.*safetensors", 50, times=999)]
    for name in ("open_weights", "merge_files", "from_pretrained", "load_perflow", "pull"):
        with pytest.raises(OURS, match="me/"):
            DOORS[name]()
    assert not Path("merged.safetensors").exists()


def test_nobody_there_is_said_at_once(hub, monkeypatch):
    hub.server.shutdown()
    hub.server.server_close()
    for name, door in DOORS.items():
        with pytest.raises(ValueError, match="me/"):
            door()
        assert not Path("copy").exists(), name


def test_names_in_a_repository_have_slashes_on_every_system():
    folder, path = PureWindowsPath(r"C:\Users\me\pipe"), PureWindowsPath(r"C:\Users\me\pipe\unet\model.safetensors")
    assert name_in(folder, path) == "unet/model.safetensors"
    assert name_in(PurePosixPath("/me"), PurePosixPath("/me/a/b.json")) == "a/b.json"


@pytest.mark.parametrize("card", [b"---\n" + b"[" * 5000 + b"\n---\n", b"\xff\xfe", b"---\n[]\n---\n"])
def test_a_card_that_cannot_be_read_is_named(card, tmp_path):
    pipe = make_pipe("sd")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(card)
    with pytest.raises(PushError, match=r"README\.md.*Mend or delete it"):
        push_perflow(tmp_path, "me/x", licence="mit", token="hf_none")
    assert describe(tmp_path).licence is None
