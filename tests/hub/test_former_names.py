"""Names that files and calls had before: still read, and written by the Hub's and the field's words."""

import json
from dataclasses import replace

import pytest
from hub_pipes import make_pipe

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.hub import PeRFlowArtifact, export_pipeline, load_perflow, push_perflow

OLD = {
    "prediction_type": "ddim_eps",
    "guidance_scale": "7.5",  # of the teacher
    "recommended_guidance_scale": "1.5",
    "licence": "mit",
}


def test_a_header_in_the_former_words_says_the_same():
    artifact = PeRFlowArtifact.from_header(OLD)
    assert (artifact.solve_guidance, artifact.guidance_scale, artifact.license) == (7.5, 1.5, "mit")
    written = artifact.metadata
    assert {key: written[key] for key in ("solve_guidance", "recommended_guidance_scale", "license")} == {
        "solve_guidance": "7.5",
        "recommended_guidance_scale": "1.5",
        "license": "mit",
    }
    assert "guidance_scale" not in written and "licence" not in written
    assert PeRFlowArtifact.from_header(written) == replace(artifact, name="the given header")


def test_a_settings_file_in_the_former_words_says_the_same(accelerators, tmp_path):
    saved = replace(PeRFlowArtifact.from_folder(accelerators["sd"].folder), solve_guidance=3.0, license="mit")
    saved.save(tmp_path / "a")
    path = tmp_path / "a" / "perflow.json"
    content = json.loads(path.read_text())
    content["guidance_scale"], content["licence"] = content.pop("solve_guidance"), content.pop("license")
    path.write_text(json.dumps(content))
    again = PeRFlowArtifact.from_folder(tmp_path / "a")
    assert (again.solve_guidance, again.license, again.licence) == (3.0, "mit", "mit")
    content["licence"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="licence=3"):
        PeRFlowArtifact.from_folder(tmp_path / "a")


def test_the_former_argument_of_calls(accelerators, tmp_path, monkeypatch):
    old = PeRFlowArtifact("ddim_eps", licence="mit")
    assert old == PeRFlowArtifact("ddim_eps", license="mit")
    assert replace(old, license="apache-2.0").license == replace(old, licence="apache-2.0").license == "apache-2.0"
    assert replace(old, license=None).license is None
    planned = []
    monkeypatch.setattr("perflow_diffusers.hub.push.plan_push", lambda *_, license, **more: planned.append(license))
    for word in ("license", "licence"):
        with pytest.raises(AttributeError):  # of the plan that is none
            push_perflow(tmp_path, "me/x", **{word: "mit"})
    assert planned == ["mit", "mit"]


def test_the_former_argument_of_an_exported_card(accelerators, tmp_path):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder)
    for word in ("license", "licence"):
        export_pipeline(pipe, tmp_path / word, **{word: "apache-2.0"})
        assert "\nlicense: apache-2.0\n" in (tmp_path / word / "README.md").read_text()
