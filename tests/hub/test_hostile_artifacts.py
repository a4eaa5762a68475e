"""Nothing from a repository is run, parsed without limits, or written outside the folder that was asked for."""

import json
import os
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from hub_pipes import make_pipe
from safetensors.torch import save_file

from perflow_diffusers.hub import (
    ArtifactError,
    PeRFlowArtifact,
    PushError,
    describe,
    load_perflow,
    pull,
    push_perflow,
    set_scheduler,
)
from perflow_diffusers.io.documents import copy_file, read_json, write_text


@pytest.fixture
def artifact(accelerators, tmp_path):
    """A folder to damage, and a function that damages one of its JSON files."""
    folder = tmp_path / "artifact"
    PeRFlowArtifact.from_folder(accelerators["sd"].folder).save(folder)

    def damage(file="perflow.json", text=None, **changes):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}) if text is None else text)
        return folder

    return damage


HOSTILE = [
    {"num_time_windows": 10**9},
    {"num_time_windows": -1},
    {"num_time_windows": True},
    {"num_time_windows": "4"},
    {"window_boundaries": list(range(10**4, -1, -1))},
    {"window_boundaries": [1000, 500, 500, 0]},
    {"window_boundaries": [10**12, 0]},
    {"prediction_type": "epsilon"},
    {"prediction_type": ["ddim_eps"]},
    {"recommended_steps": [10**9]},
    {"recommended_steps": [4] * 1000},
    {"recommended_guidance_scale": 1e308},
    {"base_hash": "sha256:../../etc/passwd"},
    {"base_model": "x" * 10**4},
    {"base_model": "a\nb"},
    {"licence": {"$ref": "file:///etc/passwd"}},
    {"noise": {"num_train_timesteps": 10**9}},
    {"noise": {"beta_start": -1}},
    {"noise": {"beta_schedule": "__import__('os')"}},
    {"base_sample": {"conv_in.weight": ["x"]}},
    {"base_sample": {"conv_in.weight": [0.0] * 10**4}},
    {"format_version": None, "version": 0},
    {"format_version": "1"},
    {"weights": {"delta": "/etc/passwd"}},
    {"weights": {"delta": "../secret.safetensors"}},
    {"weights": {"delta": "sub/delta.safetensors"}},
    {"weights": {"delta": "..\\delta.safetensors"}},
    {"weights": {"delta": "delta.bin"}},
    {"weights": {"code": "x.safetensors"}},
    {"weights": "perflow.safetensors"},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda c: f"{next(iter(c))}={next(iter(c.values()))!s:.20}")
def test_hostile_settings_are_clear_errors_and_touch_nothing(artifact, changes, bits):
    folder = artifact(**changes)
    pipe = make_pipe("sd")
    before, former = bits.copy(pipe.unet), pipe.scheduler
    with pytest.raises(ArtifactError, match=r"perflow\.json") as caught:
        load_perflow(pipe, folder)
    assert len(str(caught.value)) < 700
    assert bits.same(bits.copy(pipe.unet), before) and pipe.scheduler is former


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 1, "x": NaN}', "NaN"),
        ('{"format_version": 1, "x": 1e999}', "infinite"),
        ('{"format_version": 1, "x": ' + "[" * 5000 + "]" * 5000 + "}", "not usable JSON|nested deeper"),
        ('{"format_version": 1, "x": ' + "[" * 17 + "]" * 17 + "}", "nested deeper than 16"),
        ('{"format_version": 1, "x": ' + "9" * 5000 + "}", "not usable JSON"),
        ('{"format_version": 1, "a": 1, "a": 2}', "a key stands twice"),
        ('{"format_version": 1, "recipe": {"b": 1, "b": 1}}', "a key stands twice"),
        ("[1]", "a list, not an object"),
        ("{", "not usable JSON"),
        ("{}", "lacks format_version"),
        ("\0\1\2", "not usable JSON"),
    ],
    ids=range(11),
)
def test_hostile_json_is_a_clear_error(artifact, text, message):
    with pytest.raises(ArtifactError, match=message):
        PeRFlowArtifact.from_folder(artifact(text=text))


def test_a_gigabyte_of_json_is_not_read(artifact):
    folder = artifact()
    with (folder / "perflow.json").open("r+b") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(ArtifactError, match="1,073,741,824 bytes"):
        PeRFlowArtifact.from_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_time_windows": 10**9},
        {"beta_start": "NaN"},
        {"num_train_timesteps": 10**9},
        {"beta_schedule": "/etc/passwd"},
        {"perflow_type": "rm -rf"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_hostile_scheduler_configurations_are_refused_before_a_scheduler_is_made(artifact, changes):
    with pytest.raises(ArtifactError, match=r"scheduler_config\.json"):
        load_perflow(make_pipe("sd"), artifact("scheduler/scheduler_config.json", **changes))


def test_nan_betas_and_unknown_keys(artifact):
    folder = artifact("scheduler/scheduler_config.json", _name_or_path="/etc/passwd", trained_betas="/etc/passwd")
    pipe = make_pipe("sd")
    load_perflow(pipe, folder)  # keys that nobody asked for reach nobody
    assert "/etc/passwd" not in pipe.scheduler.to_json_string()
    text = (folder / "scheduler" / "scheduler_config.json").read_text().replace("0.00085", "NaN")
    with pytest.raises(ArtifactError, match="NaN"):
        PeRFlowArtifact.from_folder(artifact("scheduler/scheduler_config.json", text=text))


def test_hostile_headers_are_clear_errors(accelerators, tmp_path):
    tensors = {"conv_in.weight": torch.zeros(8, 4, 3, 3)}
    base = {"format": "pt", "perflow_format": "delta-1", "prediction_type": "ddim_eps"}
    for number, extra in enumerate(
        [
            {"num_time_windows": "1000000000"},
            {"num_time_windows": "NaN"},
            {"window_boundaries": "[" * 3000},
            {"recipe": "[" * 3000 + "]" * 3000},
            {"perflow_format": "delta-99999999999"},
            {"perflow_residual": "../../x.safetensors"},
            {"base_sample": '{"a": [1e999]}'},
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, {**base, **extra})
        with pytest.raises(ArtifactError):
            PeRFlowArtifact.from_header(path)


@pytest.mark.parametrize("token", ["hf_secretsecret\n", " hf_secretsecret", "hf_secretsecretä", ""])
def test_a_token_that_cannot_be_one_is_never_quoted(artifact, token, tmp_path):
    """The client quotes the header that it cannot send, and with it the token."""
    for action in (
        lambda: push_perflow(artifact(), "me/x", token=token),
        lambda: PeRFlowArtifact.from_pretrained("me/x", token=token),
        lambda: PeRFlowArtifact.from_pretrained("perflow-sd15-delta", token=token),
        lambda: describe("me/x", token=token),
        lambda: pull("me/x", tmp_path / "x", token=token),
    ):
        with pytest.raises(ArtifactError, match="`token` has blanks") as caught:
            action()
        assert "secret" not in "".join(traceback.format_exception(caught.value))


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_and_code_in_a_repository_are_never_run(artifact, tmp_path):
    folder, trace = artifact(), tmp_path / "trace"
    for name in ("perflow.safetensors", "pytorch_lora_weights.safetensors", "perflow.bin"):
        (folder / name).write_bytes(pickle.dumps(Exploit(trace)))
    for name in ("scheduler/perflow_scheduler.py", "__init__.py", "perflow.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w')")
    pipe = make_pipe("sd")
    for weights in ("delta", "lora"):
        with pytest.raises(ValueError, match="pickle"):
            load_perflow(pipe, folder, weights)
    set_scheduler(pipe, folder)  # reads JSON alone
    assert not trace.exists()


def test_nothing_is_written_outside_the_folder(accelerators, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (folder / "scheduler").symlink_to(outside)
    with pytest.raises(ArtifactError, match="lies outside"):
        PeRFlowArtifact.from_folder(accelerators["sd"].folder).save(folder, overwrite=True)
    for name in ("../x", "/tmp/x", "scheduler/x", "a/../../x"):
        with pytest.raises(ArtifactError, match="lies outside"):
            write_text(folder, name, "x", overwrite=True)
    assert not any(outside.iterdir())
    precious = outside / "precious.txt"
    precious.write_text("kept")
    (folder / "README.md").symlink_to(precious)
    with pytest.raises(ArtifactError, match="exists"):
        write_text(folder, "README.md", "new", overwrite=False)
    write_text(folder, "README.md", "new", overwrite=True)
    assert precious.read_text() == "kept" and (folder / "README.md").read_text() == "new"
    copy_file(precious, folder, "copied", overwrite=False)
    assert not (folder / "copied").is_symlink()
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == []


def test_links_to_elsewhere_are_not_published(artifact, tmp_path):
    folder = artifact()
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (folder / "images").mkdir()
    (folder / "images" / "sample.png").symlink_to(secret)
    with pytest.raises(PushError, match="links to somewhere else"):
        push_perflow(folder, "me/x", token="hf_none")
    with pytest.raises(PushError, match="is no artefact"):
        push_perflow(tmp_path / "artifact" / "scheduler", "me/x")
    with pytest.raises(PushError, match="There is no folder"):
        push_perflow(tmp_path / "nothing", "me/x")


def test_the_limits_are_where_they_are_said_to_be(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": "' + "x" * ((1 << 20) - 9) + '"}')
    assert path.stat().st_size == 1 << 20 and len(read_json(path)["a"]) == (1 << 20) - 9
    path.write_text('{"a": "' + "x" * ((1 << 20) - 8) + '"}')
    with pytest.raises(ArtifactError, match="1,048,577 bytes"):
        read_json(path)
