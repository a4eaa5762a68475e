"""An artefact's folder holds everything, says it twice without contradiction, and refuses what it does not know."""

import json
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from perflow_diffusers import PeRFlowScheduler, load_miniature
from perflow_diffusers.hub import ArtifactError, PeRFlowArtifact, describe, perflow_scheduler
from perflow_diffusers.hub.network import sample_base, signature
from perflow_diffusers.miniature import miniature_folder
from perflow_diffusers.weights import content_hash, open_weights


def test_the_miniatures_artifact_is_complete(artifact_folder):
    names = {str(path.relative_to(artifact_folder)) for path in artifact_folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "images/sample-0.png",
        "perflow.json",
        "perflow.safetensors",
        "perflow_kohya.safetensors",
        "pytorch_lora_weights.residual.safetensors",
        "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json",
    }
    artifact = PeRFlowArtifact.from_folder(artifact_folder)
    base = load_miniature()
    assert (artifact.version, artifact.steps, artifact.recommended_steps) == (1, 4, (4, 8))
    assert (artifact.guidance_scale, artifact.solve_guidance) == (1.0, 7.5)
    assert (artifact.prediction_type, artifact.base_prediction_type) == ("ddim_eps", "epsilon")
    assert artifact.base_hash == content_hash(base) and artifact.network == signature(base.unet)
    assert artifact.recipe["max_train_steps"] == 6000 and artifact.licence == "apache-2.0"
    with Image.open(artifact_folder / "images" / "sample-0.png") as picture:
        assert picture.size == (256, 256)


def test_the_weights_are_the_embedded_ones_with_a_fuller_header(artifact_folder):
    ours, theirs = open_weights(artifact_folder / "perflow.safetensors"), open_weights("miniature")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert theirs.metadata.items() <= {**ours.metadata, "recipe": theirs.metadata["recipe"]}.items()
    assert json.loads(ours.metadata["recipe"]) == json.loads(theirs.metadata["recipe"])


@pytest.mark.parametrize("name", ["perflow", "pytorch_lora_weights", "perflow_kohya"])
def test_a_bare_file_says_what_the_folder_says(artifact_folder, name):
    whole = PeRFlowArtifact.from_folder(artifact_folder)
    assert PeRFlowArtifact.from_header(artifact_folder / f"{name}.safetensors").settings == whole.settings


def test_saving_again_changes_no_byte_of_the_weights_and_replaces_nothing_unasked(artifact_folder, tmp_path):
    artifact = PeRFlowArtifact.from_folder(artifact_folder)
    artifact.save(tmp_path / "copy")
    for name in ("perflow", "pytorch_lora_weights", "perflow_kohya", "pytorch_lora_weights.residual"):
        file = f"{name}.safetensors"
        assert (tmp_path / "copy" / file).read_bytes() == (artifact_folder / file).read_bytes()
    before = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError, match="exists"):
        replace(artifact, licence="mit").save(tmp_path / "copy")
    assert before == {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    again = replace(artifact, licence="mit").save(tmp_path / "copy", overwrite=True)
    assert again.licence == "mit" and open_weights(again.files["delta"]).metadata["license"] == "mit"


def test_saved_settings_are_all_read_back(accelerators, tmp_path):
    artifact = replace(
        PeRFlowArtifact.from_header(accelerators["sd"].delta),
        prediction_type="velocity",
        num_time_windows=3,
        window_boundaries=(900, 700, 300, 100),
        t_noise=0.9,
        t_clean=0.1,
        recommended_steps=(3, 6),
        guidance_scale=3.5,
        base_prediction_type="v_prediction",
        noise={"beta_schedule": "linear", "beta_start": 0.001, "num_train_timesteps": 1000},
        recipe={"steps": 7},
    )
    back = artifact.save(tmp_path / "artifact")
    places = {"files", "folder", "name"}
    for field in fields(PeRFlowArtifact):
        if field.name not in places:
            assert getattr(back, field.name) == getattr(artifact, field.name), field.name
    config = json.loads((tmp_path / "artifact" / "scheduler" / "scheduler_config.json").read_text())
    scheduler = PeRFlowScheduler.from_config(config)
    assert scheduler.windows.boundaries == (900, 700, 300, 100) and scheduler.config.beta_schedule == "linear"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("perflow.json", "prediction_type", "diff_eps"),
        ("perflow.json", "num_time_windows", 5),
        ("scheduler/scheduler_config.json", "perflow_type", "diff_eps"),
        ("scheduler/scheduler_config.json", "num_time_windows", 8),
    ],
)
def test_files_that_contradict_each_other_are_refused(accelerators, tmp_path, file, key, value):
    PeRFlowArtifact.from_header(accelerators["sd"].delta).save(tmp_path / "a")
    path = tmp_path / "a" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ArtifactError, match="One of them is wrong"):
        PeRFlowArtifact.from_folder(tmp_path / "a")


def test_newer_formats_are_refused_with_the_way_out(accelerators, tmp_path):
    PeRFlowArtifact.from_header(accelerators["sd"].delta).save(tmp_path / "a")
    path = tmp_path / "a" / "perflow.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(ArtifactError, match=r"format version 2.*reads up to 1.*(Upgrade|Install a newer)"):
        PeRFlowArtifact.from_folder(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"'delta-2'; this version knows delta-1.*(Upgrade|Install a newer)"):
        PeRFlowArtifact.from_header({"perflow_format": "delta-2", "prediction_type": "ddim_eps"})
    known = PeRFlowArtifact.from_header({"perflow_format": "delta-int8-1", "prediction_type": "ddim_eps"})
    assert known.prediction_type == "ddim_eps" and known.steps == 4


def test_old_scheduler_configurations_mean_what_they_meant(accelerators, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "old"
    (folder / "scheduler").mkdir(parents=True)
    save_file(dict(open_weights(accelerators["sd"].delta)), folder / "perflow.safetensors")
    config = {"_class_name": "PeRFlowScheduler", "prediction_type": "epsilon", "num_time_windows": 4}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert PeRFlowArtifact.from_folder(folder).prediction_type == "diff_eps"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "_class_name": "DDIMScheduler"}))
    with pytest.raises(ArtifactError, match="says nothing about how PeRFlow weights were trained"):
        PeRFlowArtifact.from_folder(folder)


def test_the_scheduler_of_a_header():
    config = load_miniature().scheduler.config
    header = {"prediction_type": "diff_eps", "num_time_windows": "2", "window_boundaries": "[1000, 300, 0]"}
    scheduler = perflow_scheduler(config, header)
    assert scheduler.windows.boundaries == (1000, 300, 0) and scheduler.config.perflow_type == "diff_eps"
    assert perflow_scheduler(config, {"prediction_type": "ddim_eps"}).windows.num_windows == 4


def test_the_sample_of_a_base_is_read_from_a_folder_as_from_a_pipeline():
    of_folder = sample_base(miniature_folder() / "avatars")
    of_pipe = sample_base(load_miniature())
    assert of_folder == of_pipe and len(of_pipe) == 12
    name, numbers = next(iter(of_pipe.items()))
    weight = load_miniature().unet.get_parameter(name).flatten()
    assert numbers[0] == float(f"{weight[0].item():.6g}") and numbers[-1] == float(f"{weight[-1].item():.6g}")


def test_a_whole_pipeline_and_an_empty_folder_are_no_artifacts(tmp_path):
    with pytest.raises(ArtifactError, match=r"is a whole pipeline.*set_scheduler"):
        PeRFlowArtifact.from_folder(miniature_folder() / "avatars")
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        PeRFlowArtifact.from_folder(tmp_path)
    with pytest.raises(ArtifactError, match="no weights to save"):
        PeRFlowArtifact("ddim_eps").save(tmp_path / "x")
    with pytest.raises(ArtifactError, match="not in a folder yet"):
        PeRFlowArtifact("ddim_eps").push_to_hub("me/x")


def test_describe_says_settings_sizes_base_and_licence(artifact_folder):
    text = str(describe(artifact_folder))
    for part in ("ddim_eps", "4 or 8", "1.0", "7.5", "miniature", "apache-2.0", "cross_attention_dim 96"):
        assert part in text
    size = (artifact_folder / "perflow.safetensors").stat().st_size
    assert f"{size:,} bytes" in text
    content = json.loads(json.dumps(describe(artifact_folder).to_dict()))
    assert content["settings"]["recommended_steps"] == [4, 8] and content["sizes"]["perflow.safetensors"] == size
    assert describe("miniature").artifact.prediction_type == "ddim_eps"


def test_every_header_has_the_key_that_diffusers_and_others_look_for(artifact_folder):
    with safe_open(artifact_folder / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt" and "unet.r" in json.loads(header["lora_adapter_metadata"])
    assert header["perflow_residual"] == "pytorch_lora_weights.residual.safetensors"
    pipe = load_miniature()
    pipe.load_lora_weights(artifact_folder / "pytorch_lora_weights.safetensors")  # without this package
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}


def test_it_shows_itself_in_a_sentence(accelerators):
    for given in (accelerators["sd"].folder, accelerators["sd"].delta):
        text = " ".join(repr(PeRFlowArtifact.from_pretrained(given)).split())
        assert "ddim_eps, 4 windows, steps 4, guidance 2; base someone/sd; delta>" in text
        assert len(text) < 300
