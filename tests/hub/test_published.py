"""The table of published weights says what is known of them, and pipelines are recognised by it."""

from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from hub_pipes import make_pipe

from perflow_diffusers import PeRFlowScheduler
from perflow_diffusers.errors import Unreachable
from perflow_diffusers.families.published import PUBLISHED, published
from perflow_diffusers.hub import ArtifactError, describe, load_perflow, set_scheduler, unload_perflow
from perflow_diffusers.hub import info as information
from perflow_diffusers.weights.read.locate import SHORT_NAMES

#: repository, form, type, variant, guidance: the facts, as their authors publish them; 4 windows all.
FACTS = [
    ("hansyan/perflow-sd15-delta-weights", "delta", "diff_eps", "v0-1", (4.5, 7.5)),
    ("hansyan/perflow-sd15-dreamshaper", "pipeline", "diff_eps", None, (4.5, 7.5)),
    ("hansyan/perflow-sd15-realisticVisionV51", "pipeline", "diff_eps", None, (4.5, 7.5)),
    ("hansyan/perflow-sd15-disney", "pipeline", "diff_eps", None, (4.5, 7.5)),
    ("hansyan/perflow-sd15-architectureexterior", "pipeline", "diff_eps", None, (4.5, 7.5)),
    ("hansyan/perflow-sd21-artius", "pipeline", "velocity", None, None),
    ("hansyan/perflow-sdxl-dreamshaper", "pipeline", "ddim_eps", "v0-fix", (1.5, 2.5)),
    ("hansyan/perflow-sdxl-base", "pipeline", "ddim_eps", None, (1.5, 2.0)),
]


def test_the_table_says_what_is_known():
    table = [(p.repo_id, p.form, p.prediction_type, p.variant, p.guidance) for p in PUBLISHED]
    assert table == FACTS
    assert {p.num_time_windows for p in PUBLISHED} == {4} and {p.license for p in PUBLISHED} == {"cc-by-nc-4.0"}
    assert published("perflow-sd15-delta").repo_id == "hansyan/perflow-sd15-delta-weights"
    assert SHORT_NAMES["perflow-sd15-delta"].variant == "v0-1"
    assert SHORT_NAMES["perflow-sd15-delta"].metadata == {"prediction_type": "diff_eps", "num_time_windows": "4"}


@pytest.mark.parametrize("fact", [fact for fact in FACTS if fact[1] == "pipeline"], ids=lambda fact: fact[0])
def test_published_pipelines_get_their_scheduler_by_name(fact, tmp_path):
    repo_id, _, kind, _, _ = fact
    cache = f"{tmp_path}/models--{repo_id.replace('/', '--')}/snapshots/abc"
    for name in (repo_id, str(tmp_path / repo_id.split("/")[1]), cache):
        pipe = make_pipe("sd")
        former = pipe.scheduler
        pipe.register_to_config(_name_or_path=name)
        scheduler = set_scheduler(pipe)
        assert pipe.scheduler is scheduler and scheduler.config.perflow_type == kind
        assert scheduler.windows.boundaries == (1000, 750, 500, 250, 0)
        unload_perflow(pipe)
        assert pipe.scheduler is former
    load_perflow(pipe, repo_id)
    assert pipe.scheduler.config.perflow_type == kind
    unload_perflow(pipe)


def test_old_configurations_are_recognised_by_their_type():
    pipe = make_pipe("sd")
    pipe.scheduler.register_to_config(prediction_type="diff_eps")
    assert set_scheduler(pipe).config.perflow_type == "diff_eps"
    pipe = make_pipe("sd")
    pipe.scheduler = PeRFlowScheduler.from_config(
        pipe.scheduler.config, prediction_type="velocity", num_time_windows=2
    )
    assert set_scheduler(pipe).windows.boundaries == (1000, 500, 0)
    assert set_scheduler(pipe) is pipe.scheduler  # twice is harmless


def test_other_pipelines_are_not_guessed():
    pipe = make_pipe("sd")
    former = pipe.scheduler
    with pytest.raises(ArtifactError, match=r"no pipeline that is known.*load_perflow"):
        set_scheduler(pipe)
    pipe.register_to_config(_name_or_path="/home/me/perflow-sd15-delta-weights")
    with pytest.raises(ArtifactError, match="no pipeline that is known"):
        set_scheduler(pipe)
    assert pipe.scheduler is former and isinstance(former, DDIMScheduler)


def test_a_whole_published_pipeline_is_no_accelerator_for_another_one():
    with pytest.raises(ArtifactError, match=r"v0-fix.*set_scheduler"):
        load_perflow(make_pipe("sd"), "perflow-sdxl-dreamshaper")


def test_a_pipeline_with_perflow_in_its_weights_takes_no_second_one(accelerators):
    pipe = make_pipe("sd")
    pipe.register_to_config(_name_or_path="hansyan/perflow-sd15-disney")
    with pytest.raises(ArtifactError, match="in this pipeline's weights already"):
        load_perflow(pipe, accelerators["sd"].folder)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact[0])
def test_describing_published_weights_needs_no_network(fact, monkeypatch, tmp_path):
    def offline(*args):
        raise Unreachable("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(information, "list_repository", offline)
    text = str(describe(fact[0]))
    assert fact[2] in text and "cc-by-nc-4.0" in text and (fact[3] is None or f"variant {fact[3]}" in text)
    assert f"recommended guidance  {fact[4][0]}" in text if fact[4] else "recommended guidance" not in text


def test_local_folders_of_published_deltas_are_known_by_their_name(accelerators, tmp_path):
    from safetensors.torch import save_file

    from perflow_diffusers.weights import open_weights

    folder = Path(tmp_path, "perflow-sd15-delta-weights")
    folder.mkdir()
    save_file(dict(open_weights(accelerators["sd"].delta)), folder / "diffusion_pytorch_model.v0-1.safetensors")
    artifact = load_perflow(make_pipe("sd"), folder)
    assert artifact.prediction_type == "diff_eps" and artifact.licence == "cc-by-nc-4.0"
