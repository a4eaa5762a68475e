"""Push, load, and everything that can go wrong between them, through huggingface_hub's own client over HTTP."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_pipes import draw as draw_tiny
from hub_pipes import make_pipe
from loopback import TOKEN, Fault, LoopbackHub
from safetensors.torch import load_file, save

from perflow_diffusers import load_miniature
from perflow_diffusers.hub import PeRFlowArtifact, load_perflow
from perflow_diffusers.miniature import miniature_folder

HERE = Path(__file__).parent


def run(server, work, what):
    """One scenario in a fresh process with a fresh cache; returns its results and all that it printed."""
    out = work / what
    out.mkdir()
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(out / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, str(HERE / "loopback_scenario.py"), what, str(work), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    return json.loads((out / f"{what}.json").read_text()), text


@pytest.fixture(scope="module")
def world(artifact_folder, accelerators, tmp_path_factory):
    """Results of both scenarios, and the server with what they left on it."""
    work = tmp_path_factory.mktemp("loopback")
    shutil.copytree(artifact_folder, work / "artifact")
    for kind in ("sd", "sdxl"):
        shutil.copytree(accelerators[kind].folder, work / kind)
    (work / "token").write_text(TOKEN)
    (work / "artifact" / "notes.txt").write_text("not part of it")
    artifact = PeRFlowArtifact.from_folder(artifact_folder)
    bare = replace(artifact, license=None, base_model=None, files={"delta": artifact.files["delta"]})
    bare.save(work / "unlicensed")
    replace(bare, base_model="someone/base").save(work / "with-base")
    with LoopbackHub() as server:
        server.put("someone/base", {"README.md": b"---\nlicense: openrail\n---\n", ".gitattributes": b""})
        pushed, push_text = run(server, work, "push")
        _prepare_faults(server, artifact_folder)
        loaded, load_text = run(server, work, "load")
        yield {
            "push": pushed,
            "load": loaded,
            "text": push_text + load_text,
            "server": server,
            "work": work,
            "pictures": dict(np.load(work / "load" / "pictures.npz")),
        }


def _prepare_faults(server, folder):
    """Repositories whose downloads fail in one way each, and hostile ones."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    delta = "perflow.safetensors"
    for name in ("cut", "short", "busy", "etag", "garbage", "gated"):
        server.put(f"faulty/{name}", files)
    weights = "{}/resolve/.*safetensors"
    server.faults += [
        Fault("cut", weights.format("faulty/cut"), 1_000_000),
        Fault("short", weights.format("faulty/short"), 1_000_000),
        Fault("status", "faulty/busy/tree", 429),
        Fault("status", weights.format("faulty/busy"), 429),
        Fault("status", "faulty/gated/tree", 403),
        Fault("etag", weights.format("faulty/etag"), "e" * 64, method="HEAD", times=9),
        Fault("etag", weights.format("faulty/garbage"), "d" * 64, method="HEAD", times=9),
        Fault("garbage", weights.format("faulty/garbage")),
    ]
    huge = {**files, "perflow.json": b'{"format_version": 1, "recipe": "' + b"x" * (2 << 20) + b'"}'}
    server.put("hostile/huge", huge)
    settings = json.loads(files["perflow.json"])
    settings["weights"]["delta"] = "../../../../etc/passwd.safetensors"
    server.put("hostile/path", {**files, "perflow.json": json.dumps(settings).encode()})
    server.put("bare/header", {delta: files[delta], ".gitattributes": b""})
    published = {f"diffusion_pytorch_model.{v}.safetensors": save(_delta_without_header()) for v in ("v0-0", "v0-1")}
    server.put("hansyan/perflow-sd15-delta-weights", published)


def _delta_without_header():
    return load_file(miniature_folder() / "delta" / "perflow.safetensors")


def reference(folder, weights="delta"):
    """The picture of the scenario, made from the local folder."""
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    artifact = load_perflow(pipe, folder, weights)
    return pipe(
        "a happy person with red hair",
        num_inference_steps=artifact.steps,
        guidance_scale=artifact.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def test_what_is_pushed_is_one_commit_of_the_files_that_belong_to_it(world, artifact_folder):
    repo = world["server"].repositories["me/perflow"]
    assert repo.messages[1] == "First"
    first = list(repo.commits.values())[1]
    expected = {str(p.relative_to(artifact_folder)) for p in artifact_folder.rglob("*") if p.is_file()}
    assert set(first) == expected | {".gitattributes"}
    for name in expected - {"README.md"}:
        assert first[name] == (artifact_folder / name).read_bytes()
    posts = [path for method, path in world["server"].requests if method == "POST" and "/me/perflow/commit" in path]
    assert len(posts) == 4  # First, again, on v2, the pull request


def test_options_of_pushing(world):
    server, pushed = world["server"], world["push"]
    assert server.repositories["me/secret"].private and not server.repositories["me/perflow"].private
    branches = server.repositories["me/perflow"].branches
    assert set(branches) == {"main", "v2", "refs/pr/1"} and len(set(branches.values())) == 3
    assert pushed["pr"].endswith("/me/perflow/discussions/1") and "/me/perflow/commit/" in pushed["push"]
    assert server.repositories["me/perflow"].messages[3] == "On v2"


def test_the_card_names_the_repository_and_the_licence(world):
    def card(repo):
        found = world["server"].repositories[repo]
        return found.commits[found.branches["main"]]["README.md"].decode()

    assert 'pf.load_perflow(pipe, "me/perflow")' in card("me/perflow") and "license: apache-2.0" in card("me/perflow")
    assert "license: openrail" in card("me/with-base") and "base_model: someone/base" in card("me/with-base")
    assert 'from_pretrained("me/plain", dtype=dtype)' in card("me/plain")
    assert 'from_pretrained("me/code", trust_remote_code=True, dtype=dtype)' in card("me/code")


def test_refusals_of_pushing_are_clear(world):
    pushed = world["push"]
    for key in ("no token", "wrong token"):
        assert pushed[key].startswith("PushError") and "hf auth login" in pushed[key]
    assert pushed["taken"].startswith("PushError") and "exist_ok=True" in pushed["taken"]
    assert pushed["no licence"].startswith("PushError") and "license=" in pushed["no licence"]
    assert "me/unlicensed" not in world["server"].repositories


def test_the_token_is_in_no_log_error_or_file(world):
    assert TOKEN not in world["text"] and TOKEN not in json.dumps([world["push"], world["load"]])
    for path in world["work"].rglob("*"):
        if path.is_file() and path.name != "token" and path.stat().st_size < 1_000_000:
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("weights", ["delta", "lora"])
def test_a_fresh_cache_gives_the_pictures_of_the_local_folder(world, artifact_folder, weights):
    assert world["load"][weights] == ["me/perflow", 4, 1.0]
    assert np.array_equal(world["pictures"][weights], reference(artifact_folder, weights))


@pytest.mark.parametrize("weights", ["delta", "lora"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_both_shapes_through_the_hub(world, accelerators, kind, weights):
    pipe = make_pipe(kind)
    load_perflow(pipe, accelerators[kind].folder, weights)
    assert np.array_equal(world["pictures"][f"{kind} {weights}"], draw_tiny(pipe))


def test_revisions_pull_requests_and_private_repositories(world):
    loaded = world["load"]
    assert loaded["v2"] == loaded["pr"] == "me/perflow" and loaded["private with token"] == "me/secret"
    for key, name in (("private", "me/secret"), ("missing", "me/nothing"), ("no revision", "v9")):
        assert loaded[key].startswith("HubError: The Hub has no") and name in loaded[key]


def test_a_cut_download_resumes_where_it_was_cut(world, artifact_folder):
    assert world["load"]["cut"] == "faulty/cut"
    server = world["server"]
    asked = [
        headers.get("range")
        for (method, path), headers in zip(server.requests, server.headers, strict=True)
        if method == "GET" and "faulty/cut/resolve" in path and path.endswith("perflow.safetensors")
    ]
    assert asked == [None, f"bytes={1_000_000 // 65_536 * 65_536}-"]  # whole chunks are kept
    assert np.array_equal(world["pictures"]["cut"], reference(artifact_folder))


def test_half_a_file_is_an_error_and_is_never_used(world):
    assert world["load"]["short"].startswith("ArtifactError") or world["load"]["short"].startswith("Unreachable")
    assert "short" not in world["pictures"] and world["load"]["short again"] == "faulty/short"


def test_busy_is_tried_again_and_gated_says_what_to_do(world, artifact_folder):
    assert world["load"]["busy"] == "faulty/busy"
    assert np.array_equal(world["pictures"]["busy"], reference(artifact_folder))
    assert "Accept its terms" in world["load"]["gated"]


def test_a_wrong_etag_is_harmless_unless_the_content_is_wrong_too(world, artifact_folder):
    assert world["load"]["etag"] == "faulty/etag"
    assert np.array_equal(world["pictures"]["etag"], reference(artifact_folder))
    assert "is not the file that the repository lists" in world["load"]["garbage"]


def test_hostile_settings_are_refused_before_the_weights_are_downloaded(world):
    assert "was not downloaded" in world["load"]["huge"]
    assert "without a path" in world["load"]["path"]
    for method, path in world["server"].requests:
        assert not (method == "GET" and "hostile/" in path and path.endswith(".safetensors"))
        assert not (method == "GET" and "hostile/huge" in path and path.endswith("perflow.json"))


def test_info_needs_no_weights(world):
    info = world["load"]["info"]
    for part in ("ddim_eps", "4 or 8", "miniature", "apache-2.0", "perflow_kohya.safetensors"):
        assert part in info
    assert "ddim_eps" in world["load"]["info header"] and "apache-2.0" in world["load"]["info header"]
    assert "diff_eps" in world["load"]["info published"] and "v0-1" in world["load"]["info published"]
    ranges = [
        headers.get("range")
        for (method, path), headers in zip(world["server"].requests, world["server"].headers, strict=True)
        if method == "GET" and "bare/header/resolve" in path
    ]
    assert ranges and all(asked and asked.startswith("bytes=0-") for asked in ranges)


def test_pull_copies_the_artifact_and_replaces_nothing(world, artifact_folder):
    assert world["load"]["pull"] == "me/perflow" and "exists" in world["load"]["pull again"]
    pulled = world["work"] / "load" / "pulled"
    names = {str(p.relative_to(pulled)) for p in pulled.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(artifact_folder)) for p in artifact_folder.rglob("*") if p.is_file()}
    assert not any(path.is_symlink() for path in pulled.rglob("*"))
    assert (pulled / "perflow.safetensors").read_bytes() == (artifact_folder / "perflow.safetensors").read_bytes()


def test_published_weights_without_a_header_work_by_their_short_name(world):
    assert "'prediction_type': 'diff_eps'" in world["load"]["published"]
    gets = [path for method, path in world["server"].requests if method == "GET" and "hansyan/" in path]
    assert any(path.endswith("v0-1.safetensors") for path in gets)
    assert not any(path.endswith("v0-0.safetensors") for path in gets)


def test_exported_pipelines_load_from_the_hub_with_diffusers_alone(world, artifact_folder):
    assert world["load"]["plain scheduler"] == "DDIMScheduler"
    for form in ("plain", "code"):
        # Not to the last bit: weights that are read from a file lie at other addresses, which kernels depend on.
        assert np.abs(world["pictures"][form] - reference(artifact_folder)).max() < 1e-5
