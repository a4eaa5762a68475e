"""`perflow info`, `push` and `pull` as a user runs them, on files here and on a Hub on loopback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from perflow_diffusers import load_miniature
from perflow_diffusers.hub import PeRFlowArtifact, export_pipeline, load_perflow
from perflow_diffusers.miniature import miniature_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
from loopback import TOKEN, LoopbackHub

DELTA = miniature_folder() / "delta" / "perflow.safetensors"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The miniature's delta as an artefact with a base and a licence."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("cli") / "my-perflow"
    whole = replace(PeRFlowArtifact.from_header(DELTA), base_model="someone/base", licence="apache-2.0")
    whole.save(folder, base=load_miniature())
    return folder


def in_words(text):
    return " ".join(text.split())


def test_info_of_an_artefact_says_how_to_use_it_and_what_is_in_its_files(artifact, perflow):
    result = perflow("info", artifact)
    assert result.exit_code == 0, result.output
    for part in ("ddim_eps", "steps 4 or 8", "guidance 1.0", "base someone/base", "licence apache-2.0", "delta-1 for"):
        assert part in in_words(result.output)
    said = json.loads(perflow("info", artifact, "--json").output)
    assert said["settings"]["recommended_steps"] == [4, 8] and said["settings"]["base_model"] == "someone/base"
    assert said["licence"] == "apache-2.0" and "base_sample" not in said["settings"]
    assert said["sizes"] == {"perflow.safetensors": (artifact / "perflow.safetensors").stat().st_size}
    assert said["weights"]["perflow.safetensors"]["kind"] == said["kind"] == "delta"


def test_info_of_a_bare_file_of_an_artefact_says_the_same(artifact, perflow):
    whole = json.loads(perflow("info", artifact, "--json").output)
    bare = json.loads(perflow("info", artifact / "perflow.safetensors", "--json").output)
    assert {key: bare[key] for key in ("settings", "licence", "sizes")} == {
        key: whole[key] for key in ("settings", "licence", "sizes")
    }


def test_info_is_aligned_within_a_terminal(artifact, perflow):
    for source in (artifact, artifact / "perflow.safetensors", miniature_folder() / "avatars", "miniature-lora"):
        lines = perflow("info", source).output.splitlines()[1:]
        assert all(len(line) <= 80 or "sha256:" in line for line in lines)
        facts = [
            line for line in lines if line.startswith("  ") and "bytes" not in line and not line.startswith("    ")
        ]
        starts = {re.search(r"\S  +(?=\S)", line).end() for line in facts if re.search(r"\S  +\S", line)}
        assert len(starts) == 1
        sizes = [line for line in lines if line.endswith(" bytes")]
        assert sizes and len({len(line) for line in sizes}) == 1


def test_info_of_weights_and_pipelines(perflow, tmp_path):
    base = perflow("info", miniature_folder() / "avatars")
    assert base.exit_code == 0 and "a whole pipeline" in base.output and "1.94 M numbers" in base.output
    weights = json.loads(perflow("info", miniature_folder() / "avatars" / "unet", "--json").output)
    assert weights["kind"] == "weights" and weights["settings"] == {} and weights["licence"] is None
    pipe = load_miniature()
    load_perflow(pipe, DELTA)
    for form in ("plain", "code"):
        export_pipeline(pipe, tmp_path / form, form, licence="mit")
        told = in_words(perflow("info", tmp_path / form).output)
        assert "then `set_scheduler(pipe)`" in told and "prediction type ddim_eps" in told and "licence mit" in told


# The command, several times in one process: [[endpoint, token, words], ...] -> [[exit code, output], ...].
MANY = """
import json, os, sys
import huggingface_hub.constants
from typer.testing import CliRunner
from perflow_diffusers.cli import app
told = []
for endpoint, token, words in json.loads(sys.argv[1]):
    huggingface_hub.constants.ENDPOINT = endpoint or os.environ["HF_ENDPOINT"]
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    result = CliRunner().invoke(app, words)
    told.append([result.exit_code, result.output])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def through_the_hub(artifact, tmp_path_factory):
    """What the command says with a Hub on loopback, and at last without one; the server, and all that was printed."""
    place = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as server, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        nowhere = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        options = ["--private", "--commit-message", "From the command", "--revision", "v2"]
        steps = {
            "refused": [None, None, ["push", str(artifact), "me/cli"]],
            "push": [None, TOKEN, ["push", str(artifact), "me/cli", *options]],
            "info": [None, TOKEN, ["info", "me/cli", "--revision", "v2", "--json"]],
            "pull": [None, TOKEN, ["pull", "me/cli", str(place / "copy"), "--revision", "v2"]],
            "published": [nowhere, None, ["info", "perflow-sd15-delta"]],
            "cached": [nowhere, None, ["info", "me/cli", "--revision", "v2"]],
            "unknown": [nowhere, None, ["info", "someone/else"]],
        }
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(place), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", MANY, json.dumps(list(steps.values()))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        told = dict(zip(steps, json.loads(done.stdout.splitlines()[-1]), strict=True))
        yield told, server, done.stdout + done.stderr, place / "copy"


def test_push_goes_where_and_how_it_is_told(through_the_hub):
    told, server, printed, _ = through_the_hub
    code, text = told["refused"]
    assert code == 2 and "hf auth login" in text and "Traceback" not in text
    code, text = told["push"]
    repository = server.repositories["me/cli"]
    assert code == 0 and f"{server.url}/me/cli/commit/" in text
    assert repository.private and repository.messages[-1] == "From the command" and "v2" in repository.branches
    assert TOKEN not in printed


def test_info_downloads_no_weights_and_pull_copies_them(through_the_hub, artifact):
    told, server, _, copy = through_the_hub
    said = json.loads(told["info"][1])
    weights = "perflow.safetensors"
    assert said["settings"]["prediction_type"] == "ddim_eps" and said["licence"] == "apache-2.0"
    assert said["sizes"] == {weights: (artifact / weights).stat().st_size}
    gets = [path for method, path in server.requests if method == "GET" and path.endswith(weights)]
    assert len(gets) == 1  # by `pull`
    assert told["pull"][0] == 0 and "me/cli: ddim_eps, 4 windows" in told["pull"][1]
    assert (copy / weights).read_bytes() == (artifact / weights).read_bytes()
    assert PeRFlowArtifact.from_folder(copy).settings == PeRFlowArtifact.from_folder(artifact).settings


def test_without_a_network_info_tells_what_is_known_and_does_not_wait(through_the_hub):
    told, _, printed, _ = through_the_hub
    code, text = told["published"]
    assert code == 0 and "diff_eps" in text and "cc-by-nc-4.0" in text
    code, text = told["cached"]
    assert code == 0 and text.startswith("me/cli\n") and "apache-2.0" in text
    code, text = told["unknown"]
    assert code == 2 and "not in the cache" in text
    assert "Retrying" not in printed and "Traceback" not in printed


@pytest.fixture
def nobody_logged_in(monkeypatch, tmp_path):
    """No token, and a Hub that nobody can reach."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_a_dry_run_lists_what_would_be_pushed(artifact, perflow, nobody_logged_in):
    result = perflow("push", artifact, "me/cli", "--dry-run")
    assert result.exit_code == 0, result.output
    first, *listed = result.output.split("Dry run")[0].split("perflow push: note")[0].splitlines()
    assert first == f"{artifact} as me/cli, licence apache-2.0:"
    sizes = {name: int(size.replace(",", "")) for name, size, _ in map(str.split, listed)}
    assert set(sizes) == {"README.md", "perflow.json", "perflow.safetensors", "scheduler/scheduler_config.json"}
    assert all(size == (artifact / name).stat().st_size for name, size in sizes.items() if name != "README.md")
    assert "nobody is logged in" in result.output
    assert "licence mit:" in perflow("push", artifact, "me/cli", "--dry-run", "--license", "mit").output


@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_a_dry_run_checks_what_the_push_checks(artifact, perflow, tmp_path, nobody_logged_in, more):
    from dataclasses import replace

    unlicensed, damaged = tmp_path / "unlicensed", tmp_path / "damaged"
    whole = replace(PeRFlowArtifact.from_header(DELTA), base_model="someone/base", license=None)
    whole.save(unlicensed, base=load_miniature())
    shutil.copytree(artifact, damaged)
    (damaged / "README.md").unlink()
    for folder, repo_id, said in (
        (unlicensed, "me/cli", "names no licence"),
        (artifact, "me/cli/more", "is no name of a repository"),
        (artifact, "me/bad name", "is no name of a repository"),
        (damaged, "me/cli", "lacks README.md"),
        (tmp_path / "nothing", "me/cli", "There is no folder"),
    ):
        result = perflow("push", folder, repo_id, *more)
        assert result.exit_code == 2 and said in " ".join(result.output.split()), result.output
    result = perflow("push", artifact, "me/cli")
    assert result.exit_code == 2 and "nobody is logged in" in result.output


def test_what_training_wrote_is_found_by_its_folder(artifact, perflow, tmp_path):
    product = tmp_path / "product"
    shutil.copytree(artifact, product / "artifact")
    shutil.copy(DELTA, product / "perflow.safetensors")
    result = perflow("push", product, "me/cli", "--dry-run")
    assert result.exit_code == 0 and f"{product / 'artifact'} as me/cli" in result.output
    inner, outer = (json.loads(perflow("info", place, "--json").output) for place in (artifact, product))
    assert outer["settings"] == inner["settings"] and outer["sizes"] == inner["sizes"]
    assert PeRFlowArtifact.from_folder(product).folder == product / "artifact"


def test_a_push_goes_to_the_repository_of_an_address(artifact, perflow, nobody_logged_in):
    for address in ("https://huggingface.co/me/cli", "hf.co/me/cli/tree/main"):
        result = perflow("push", artifact, address, "--dry-run")
        assert result.exit_code == 0 and f"{artifact} as me/cli, licence" in result.output
        assert "nothing was pushed to me/cli." in result.output
    for address, said in (
        ("https://huggingface.co/me/cli/tree/main/unet", "Pass the repository itself, 'me/cli'"),
        ("https://huggingface.co/datasets/me/cli", "is not the address of a model"),
    ):
        result = perflow("push", artifact, address, "--dry-run")
        assert result.exit_code == 2 and said in " ".join(result.output.split())
    result = perflow("push", artifact, "https://huggingface.co/me/cli/tree/v1", "--revision", "v2", "--dry-run")
    assert result.exit_code == 2 and "Say it once" in result.output
