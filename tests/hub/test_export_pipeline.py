"""Exported pipelines load where this package is not, with the same weights and, as code, the same pictures."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from hub_pipes import make_pipe
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from perflow_diffusers import PeRFlowScheduler, load_miniature, merge_delta
from perflow_diffusers.hub import ArtifactError, export_pipeline, load_perflow, set_scheduler
from perflow_diffusers.hub.bundle import MODULES, scheduler_source

# A process in which this package cannot be imported, whatever is installed.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perflow_diffusers":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np, torch
from diffusers import DiffusionPipeline
try:
    import perflow_diffusers
    sys.exit("importable")
except ModuleNotFoundError:
    pass
try:
    DiffusionPipeline.from_pretrained(sys.argv[1] + "/code")
    sys.exit("ran code without being asked")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
found = {}
for name, trust in (("plain", False), ("lora", False), ("code", True)):
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + "/" + name, trust_remote_code=trust)
    pipe.set_progress_bar_config(disable=True)
    for steps in (4, 5):
        found[f"{name} {steps}"] = pipe(
            ["a happy person with red hair"] * 2, num_inference_steps=steps, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).images
    found[f"{name} scheduler"] = type(pipe.scheduler).__name__
assert not any(name.startswith("perflow_diffusers") for name in sys.modules)
np.savez(sys.argv[1] + "/pictures.npz", **found)
"""


def draw(pipe, steps):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        ["a happy person with red hair"] * 2,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


@pytest.fixture(scope="module")
def exported(artifact_folder, tmp_path_factory):
    """Folders `plain`, `code` and `lora` (from an attached LoRA), and what a process without this package drew."""
    work = tmp_path_factory.mktemp("exported")
    pipe = load_miniature()
    load_perflow(pipe, artifact_folder)
    export_pipeline(pipe, work / "plain")
    export_pipeline(pipe, work / "code", "code")
    attached = load_miniature()
    load_perflow(attached, artifact_folder, "lora")
    before = draw(attached, 4)
    export_pipeline(attached, work / "lora")
    assert np.array_equal(draw(attached, 4), before)  # the pipeline stays as it is
    environment = {**os.environ, "HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return work, dict(np.load(work / "pictures.npz")), pipe, attached


def test_the_weights_are_the_merged_ones(exported):
    work, _, pipe, _ = exported
    saved = load_file(work / "plain" / "unet" / "diffusion_pytorch_model.safetensors")
    merged = pipe.unet.state_dict()
    assert saved.keys() == merged.keys() and all(torch.equal(saved[name], merged[name]) for name in saved)


def test_the_form_with_code_draws_the_same_pictures_without_this_package(exported):
    _, pictures, pipe, _ = exported
    assert str(pictures["code scheduler"]) == "PeRFlowScheduler"
    for steps in (4, 5):
        assert np.abs(pictures[f"code {steps}"] - draw(pipe, steps)).max() < 1e-5


def test_the_plain_form_samples_with_stock_ddim_and_gets_its_scheduler_back_with_this_package(exported):
    from diffusers import DDIMScheduler, DiffusionPipeline

    work, pictures, pipe, attached = exported
    for name, source in (("plain", pipe), ("lora", attached)):
        assert str(pictures[f"{name} scheduler"]) == "DDIMScheduler"
        loaded = DiffusionPipeline.from_pretrained(work / name)
        assert isinstance(loaded.scheduler, DDIMScheduler) and loaded.scheduler.config.prediction_type == "epsilon"
        assert loaded.scheduler.config.timestep_spacing == "trailing"
        set_scheduler(loaded)
        tolerance = 1e-5 if name == "plain" else 1e-3  # attached, a LoRA is applied to activations
        assert np.abs(draw(loaded, 4) - draw(source, 4)).max() < tolerance
    # With as many steps as windows, ddim_eps is DDIM, but for timesteps that are told one lower.
    assert np.square(pictures["plain 4"] - draw(pipe, 4)).mean() < 0.005
    assert (
        np.square(pictures["plain 5"] - draw(pipe, 5)).mean() > np.square(pictures["plain 4"] - draw(pipe, 4)).mean()
    )


def test_no_path_of_this_machine_is_in_an_export(exported):
    work = exported[0]
    for form in ("plain", "code", "lora"):
        for path in (work / form).rglob("*.json"):
            assert "/miniature/assets" not in path.read_text(), path
        index = json.loads((work / form / "model_index.json").read_text())
        assert "_name_or_path" not in index
    assert json.loads((work / "code" / "model_index.json").read_text())["scheduler"] == [
        "perflow_scheduler",
        "PeRFlowScheduler",
    ]


def test_the_file_with_the_code_needs_nothing_of_this_package_and_no_name_twice():
    source = scheduler_source()
    tree = ast.parse(source)
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert None not in modules and not any(name.startswith(("perflow", ".")) for name in modules)
    assert {name.split(".")[0] for name in modules} <= {"torch", "numpy", "diffusers", *sys.stdlib_module_names}
    names = [
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not _overload(node)
    ]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert len(names) == len(set(names)) and len(names) > 20
    for module in MODULES:
        assert {name for name in names if name in vars(module)}


def _overload(node):
    return any(isinstance(item, ast.Name) and item.id == "overload" for item in node.decorator_list)


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(accelerators, tmp_path):
    pipe = make_pipe("sd")
    with pytest.raises(ArtifactError, match="scheduler is DDIMScheduler"):
        export_pipeline(pipe, tmp_path / "x")
    load_perflow(pipe, accelerators["sd"].folder)
    with pytest.raises(ArtifactError, match="form='both'"):
        export_pipeline(pipe, tmp_path / "x", "both")
    with pytest.raises(ArtifactError, match="There is no folder"):
        export_pipeline(pipe, tmp_path / "x" / "y")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="exists"):
            export_pipeline(pipe, tmp_path / "mine", overwrite=overwrite)
    from test_load_perflow import add_style

    add_style(pipe, "style", 1)
    with pytest.raises(ArtifactError, match=r"style are attached.*Fuse"):
        export_pipeline(pipe, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_what_only_this_package_knows_is_not_exported_for_others(tmp_path):
    from perflow_diffusers.pipelines.wonder3d import tiny_wonder3d

    pipe = tiny_wonder3d()
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")
    with pytest.raises(ArtifactError, match=r"Wonder3DPipeline, UNetMV2DConditionModel would not load.*`pipe\.save"):
        export_pipeline(pipe, tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_hand_made_merge_exports_too_and_replaces_its_own_export(accelerators, tmp_path):
    pipe = make_pipe("sd")
    merge_delta(pipe, accelerators["sd"].delta)
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")
    export_pipeline(pipe, tmp_path / "out", licence="mit", base_model="someone/base")
    with pytest.raises(ArtifactError, match="exists"):
        export_pipeline(pipe, tmp_path / "out")
    export_pipeline(pipe, tmp_path / "out", "code", overwrite=True, licence="mit", base_model="someone/base")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "base_model: someone/base" in card and "trust_remote_code=True" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_calls_the_pipeline_with_what_it_needs(tmp_path):
    pipe = load_miniature()
    load_perflow(pipe, "miniature")
    controlnet = ControlNetModel.from_unet(pipe.unet)
    pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet, requires_safety_checker=False)
    export_pipeline(pipe, tmp_path / "net", licence="apache-2.0")
    card = ModelCard.load(tmp_path / "net" / "README.md")
    assert card.data.pipeline_tag == "image-to-image"
    snippet = re.search(r"```python\n(.*?)```", card.text, re.S).group(1)
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    given = next({k.arg for k in call.keywords} for call in calls if getattr(call.func, "id", "") == "pipe")
    required = {"image", "num_inference_steps", "guidance_scale"}
    assert required <= given <= set(inspect.signature(pipe.__call__).parameters)


def test_adapters_that_were_deleted_leave_nothing_behind(tmp_path):
    """diffusers' `delete_adapters` keeps PEFT's wrappers, and saves names that its own loader does not know."""
    peft = pytest.importorskip("peft")
    pipe = load_miniature()
    load_perflow(pipe, "miniature")
    wanted = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "style")
    pipe.unet.delete_adapters("style")
    export_pipeline(pipe, tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_loras_of_text_encoders_are_refused_like_those_of_the_unet(tmp_path):
    """transformers would save the adapter in place of the encoder."""
    peft = pytest.importorskip("peft")
    pipe = load_miniature()
    load_perflow(pipe, "miniature")
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "words")
    with pytest.raises(ArtifactError, match="The LoRAs words are attached"):
        export_pipeline(pipe, tmp_path / "exported")
    assert not list(tmp_path.iterdir())
