"""What a user does with the Hub, in a process of its own: `python loopback_scenario.py push|load FOLDER OUT`.

HF_ENDPOINT and HF_HOME are set by the caller. Results go to OUT as JSON and arrays; nothing is asserted here.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, constants

from perflow_diffusers import load_miniature
from perflow_diffusers.hub import (
    PeRFlowArtifact,
    describe,
    export_pipeline,
    load_perflow,
    pull,
    push_perflow,
    set_scheduler,
    unload_perflow,
)

TOKEN = Path(sys.argv[2], "token").read_text()
FOLDER, OUT = Path(sys.argv[2]), Path(sys.argv[3])


def draw(pipe, artifact):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a happy person with red hair",
        num_inference_steps=artifact.steps,
        guidance_scale=artifact.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def caught(action, *args, **options):
    """The name and text of the error that an action ends in, or what it returned."""
    try:
        return str(action(*args, **options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def push():
    results = {}
    artifact = FOLDER / "artifact"
    results["no token"] = caught(push_perflow, artifact, "me/perflow")
    results["wrong token"] = caught(push_perflow, artifact, "me/perflow", token="hf_wrong")
    results["push"] = push_perflow(artifact, "me/perflow", token=TOKEN, commit_message="First")
    results["again"] = push_perflow(artifact, "me/perflow", token=TOKEN)
    results["taken"] = caught(push_perflow, artifact, "me/perflow", token=TOKEN, exist_ok=False)
    results["private"] = PeRFlowArtifact.from_folder(artifact).push_to_hub("me/secret", token=TOKEN, private=True)
    results["revision"] = push_perflow(artifact, "me/perflow", token=TOKEN, revision="v2", commit_message="On v2")
    results["pr"] = push_perflow(artifact, "me/perflow", token=TOKEN, create_pr=True)
    results["no licence"] = caught(push_perflow, FOLDER / "unlicensed", "me/unlicensed", token=TOKEN)
    results["base licence"] = push_perflow(FOLDER / "with-base", "me/with-base", token=TOKEN)
    for kind in ("sd", "sdxl"):
        push_perflow(FOLDER / kind, f"me/{kind}", token=TOKEN)
    pipe = load_miniature()
    load_perflow(pipe, artifact)
    for form in ("plain", "code"):
        export_pipeline(pipe, OUT / form, form)
        push_perflow(OUT / form, f"me/{form}", token=TOKEN)
    return results


def load():
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # what is kept of a cut download; the client's own is 10 MiB
    results, pictures = {}, {}
    pipe = load_miniature()
    for form in ("delta", "lora"):
        artifact = load_perflow(pipe, "me/perflow", form)
        pictures[form] = draw(pipe, artifact)
        results[form] = [artifact.name, artifact.steps, artifact.guidance_scale]
        unload_perflow(pipe)
    from hub_pipes import draw as draw_tiny
    from hub_pipes import make_pipe

    for kind in ("sd", "sdxl"):
        for form in ("delta", "lora"):
            tiny = make_pipe(kind)
            load_perflow(tiny, f"me/{kind}", form)
            pictures[f"{kind} {form}"] = draw_tiny(tiny)
    results["private"] = caught(load_perflow, pipe, "me/secret")
    results["private with token"] = caught(lambda: load_perflow(pipe, "me/secret", token=TOKEN).name)
    unload_perflow(pipe)
    results["missing"] = caught(load_perflow, pipe, "me/nothing")
    results["no revision"] = caught(load_perflow, pipe, "me/perflow", revision="v9")
    results["v2"] = caught(lambda: load_perflow(pipe, "me/perflow", revision="v2").name)
    unload_perflow(pipe)
    results["pr"] = caught(lambda: load_perflow(pipe, "me/perflow", revision="refs/pr/1").name)
    unload_perflow(pipe)
    for fault in ("cut", "short", "busy", "etag", "garbage", "gated"):
        results[fault] = caught(lambda name: load_perflow(pipe, name).name, f"faulty/{fault}")
        if results[fault] == f"faulty/{fault}":
            pictures[fault] = draw(pipe, PeRFlowArtifact.from_folder(FOLDER / "artifact"))
            unload_perflow(pipe)
    results["short again"] = caught(lambda: load_perflow(pipe, "faulty/short").name)
    unload_perflow(pipe)
    results["huge"] = caught(load_perflow, pipe, "hostile/huge")
    results["path"] = caught(load_perflow, pipe, "hostile/path")
    results["info"] = caught(describe, "me/perflow")
    results["info header"] = caught(describe, "bare/header")
    results["info published"] = caught(describe, "perflow-sd15-delta")
    results["pull"] = caught(lambda: pull("me/perflow", OUT / "pulled").name)
    results["pull again"] = caught(pull, "me/perflow", OUT / "pulled")
    results["published"] = caught(lambda: PeRFlowArtifact.from_pretrained("perflow-sd15-delta").settings)
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained("me/plain")
    results["plain scheduler"] = type(plain.scheduler).__name__
    set_scheduler(plain)
    pictures["plain"] = draw(plain, artifact)
    code = DiffusionPipeline.from_pretrained("me/code", trust_remote_code=True)
    pictures["code"] = draw(code, artifact)
    results["files"] = HfApi().list_repo_files("me/perflow")
    return results, pictures


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.DEBUG)  # so that a token in any log would be seen
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG)
    if sys.argv[1] == "push":
        found = push()
    else:
        found, images = load()
        np.savez(OUT / "pictures.npz", **images)
    (OUT / f"{sys.argv[1]}.json").write_text(json.dumps(found))
