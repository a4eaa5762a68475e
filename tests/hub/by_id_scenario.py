"""Saved pipelines and the Hub, each step in a process of its own: `python by_id_scenario.py STEP FOLDER`.

`make` pushes in every way that diffusers and this package have; the other steps load by id. Steps whose name ends in
`alone` run where this package cannot be imported. HF_ENDPOINT and HF_HOME are set by the caller, the token is in
FOLDER. Pictures go to FOLDER/STEP.npz, texts to FOLDER/STEP.json; nothing is asserted here but that.
"""

import json
import pickle
import sys
from pathlib import Path

STEP, FOLDER = sys.argv[1], Path(sys.argv[2])
TOKEN = (FOLDER / "token").read_text()


class Refuse:
    """Makes this package unimportable."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perflow_diffusers":
            raise ModuleNotFoundError(name)


if STEP.endswith("alone"):
    sys.meta_path.insert(0, Refuse())
elif STEP == "views":
    from diffusers import StableDiffusionPipeline  # noqa: F401 - its modules come first, this package after them

    import perflow_diffusers as pf
else:
    import perflow_diffusers as pf

EARLY = [name for name in sys.modules if name.startswith(("diffusers.pipelines.", "perflow_diffusers.pipelines"))]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoPipelineForText2Image, DiffusionPipeline  # noqa: E402


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a happy person with red hair",
        num_inference_steps=5,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def draw_views(pipe):
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return pipe(picture, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def caught(action, *args, **options):
    try:
        return str(action(*args, **options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def make():
    from perflow_diffusers.pipelines.wonder3d import tiny_wonder3d

    pipe = pf.load_miniature()
    pf.load_perflow(pipe, "miniature")
    pipe.push_to_hub("me/pushed", token=TOKEN)
    pipe.save_pretrained(str(FOLDER / "saved"), push_to_hub=True, repo_id="me/saved", token=TOKEN)
    pf.push_perflow(FOLDER / "saved", "me/perflow-push", token=TOKEN, licence="apache-2.0")
    pipe.save_pretrained(FOLDER / "bare")
    pf.push_perflow(FOLDER / "bare", "me/without-card", token=TOKEN, licence="apache-2.0")
    pf.export_pipeline(pipe, FOLDER / "code", "code")
    pf.push_perflow(FOLDER / "code", "me/code", token=TOKEN, licence="apache-2.0")
    views = tiny_wonder3d()
    views.scheduler = pf.PeRFlowScheduler.from_config(views.scheduler.config, prediction_type="diff_eps")
    views.push_to_hub("me/views", token=TOKEN)
    views.save_pretrained(FOLDER / "views")
    return {"one": draw(pipe), "views": draw_views(views)}, {}


def load():
    pictures, texts = {}, {"early": " ".join(EARLY)}
    for name in ("pushed", "saved", "perflow-push", "without-card"):
        pipe = DiffusionPipeline.from_pretrained(f"me/{name}")
        pictures[name], texts[name] = draw(pipe), str(type(pipe.scheduler))
    auto = AutoPipelineForText2Image.from_pretrained("me/pushed")
    texts["auto"] = str(type(auto.scheduler))
    return pictures, texts


def views():
    pipe = DiffusionPipeline.from_pretrained("me/views")
    local = DiffusionPipeline.from_pretrained(FOLDER / "views")
    texts = {key: str(type(part)) for key, part in {**pipe.components, "pipe": pipe}.items()}
    return {"hub": draw_views(pipe), "local": draw_views(local)}, texts


def code_alone():
    """Load the form with code by id, and save it again in both ways."""
    pipe = DiffusionPipeline.from_pretrained("me/code", trust_remote_code=True)
    pipe.save_pretrained(FOLDER / "again")
    pipe.push_to_hub("me/code-again", token=TOKEN)
    copied = pickle.loads(pickle.dumps(pipe.scheduler))
    texts = {"copied": str(type(copied) is type(pipe.scheduler))}
    texts["untrusted"] = caught(DiffusionPipeline.from_pretrained, "me/code")
    texts["hub"] = caught(DiffusionPipeline.from_pretrained, "me/pushed")
    texts["trusted"] = caught(DiffusionPipeline.from_pretrained, "me/pushed", trust_remote_code=True)
    texts["local"] = caught(DiffusionPipeline.from_pretrained, FOLDER / "saved")
    return {"one": draw(pipe)}, texts


def again_alone():
    """What was saved again loads, untrusted code aside, and is saved a third time."""
    pipe = DiffusionPipeline.from_pretrained(FOLDER / "again", trust_remote_code=True)
    pipe.save_pretrained(FOLDER / "third")
    by_id = DiffusionPipeline.from_pretrained("me/code-again", trust_remote_code=True)
    texts = {"untrusted": caught(DiffusionPipeline.from_pretrained, FOLDER / "again")}
    return {"local": draw(pipe), "hub": draw(by_id)}, texts


if __name__ == "__main__":
    images, found = globals()[STEP]()
    np.savez(FOLDER / f"{STEP}.npz", **images)
    (FOLDER / f"{STEP}.json").write_text(json.dumps(found))
