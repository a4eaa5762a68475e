"""A whole pipeline with the accelerator in its weights, for people without this package: `export_pipeline`."""

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import ModelCard, ModelCardData

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.flow import PREDICTION_TYPES, SigmaWindows
from perflow_diffusers.flow.sigma_windows import unshifted
from perflow_diffusers.hub.adapters import attach, detach, drop_empty_wrappers, other_adapters
from perflow_diffusers.hub.bundle import MODULE, scheduler_source
from perflow_diffusers.hub.card import INSTALL_NOTE, PAPER, loading
from perflow_diffusers.hub.family import check_pipeline
from perflow_diffusers.hub.find import CARD
from perflow_diffusers.hub.network import live_shapes
from perflow_diffusers.hub.recognise import PIPELINE_SETTINGS
from perflow_diffusers.hub.state import companion, faulty, loaded
from perflow_diffusers.io.atomic import whole
from perflow_diffusers.io.documents import read_json, write_json
from perflow_diffusers.schedulers import FlowMatchPeRFlowScheduler, PeRFlowScheduler
from perflow_diffusers.weights import merge_delta, open_weights
from perflow_diffusers.weights.merge.undo import rescale_merge
from perflow_diffusers.weights.read.live import find_network
from perflow_diffusers.weights.read.lora import as_delta
from perflow_diffusers.words.arguments import path_of

Form = Literal["plain", "code"]

_PACKAGE = "perflow_diffusers."
# Keys of our scheduler's configuration that no stock one knows.
_OURS_FLOW = ("num_time_windows", "window_boundaries", "window_shift", "reshift")
_OURS = ("perflow_type", "num_time_windows", "window_boundaries", "t_noise", "t_clean")


def export_pipeline(
    pipe: Any,
    folder: str | os.PathLike,
    form: Form = "plain",
    *,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    licence: str | None = None,
) -> Path:
    """Save a pipeline with PeRFlow in its weights so that it loads without this package; returns the folder.

    `pipe`: after `load_perflow`, or `merge_delta` with a `PeRFlowScheduler`; it stays as it is. `form` "plain": a
    stock scheduler in `model_index.json`, and our scheduler's configuration beside it, which `set_scheduler(pipe)`
    reads. The stock one is DDIM, which is near but not the same (the card says how); for a flow-matching base Euler,
    which is the same where the pipeline takes `sigmas`, which the card's call passes. "code": our scheduler, with its
    code in one file of the repository; loading it asks for `trust_remote_code=True`. `base_model`, `license`
    (formerly `licence`): for the card.

    The folder appears when it is complete. Raises `ArtifactError` if it holds anything (`overwrite=True` replaces an
    earlier export, nothing else), if the pipeline has no `PeRFlowScheduler`, other LoRAs that are not fused, or parts
    that diffusers does not know (Wonder3D).
    """
    check_pipeline(pipe)
    target = path_of(folder, "folder", 'export_pipeline(pipe, "folder")', ArtifactError)
    if form not in get_args(Form):
        raise ArtifactError(f"form={form!r} is unknown. Pass 'plain' or 'code'.")
    flow = isinstance(pipe.scheduler, FlowMatchPeRFlowScheduler)
    if flow and form == "code":
        raise ArtifactError(
            "form='code' is for Stable Diffusion's schedulers. Pass form='plain': for a flow-matching base a stock "
            "scheduler is as good, as the card says."
        )
    if not flow and not isinstance(pipe.scheduler, PeRFlowScheduler):
        raise ArtifactError(
            f"The pipeline's scheduler is {type(pipe.scheduler).__name__}. Load an accelerator with `load_perflow`, "
            "or call `set_scheduler(pipe)`, before exporting."
        )
    if other_adapters(pipe):
        raise ArtifactError(
            f"The LoRAs {', '.join(other_adapters(pipe))} are attached, and a saved pipeline cannot carry them. Fuse "
            "them (`pipe.fuse_lora(adapter_names=[...])`, `pipe.delete_adapters(...)`) or delete them first."
        )
    if (mine := companion(pipe)) is not None and mine.weights and (fault := faulty(find_network(pipe))) is not None:
        raise ArtifactError(f"{mine.artifact.name} is not whole in this pipeline: {fault}")
    _check_known_to_diffusers(pipe)
    _check_target(target, overwrite)
    with whole(target) as temporary:
        with _merged(pipe):
            drop_empty_wrappers(pipe)
            pipe.save_pretrained(temporary)
        _finish(pipe, temporary, form, target.name, base_model, license or licence)
    return target


def _check_known_to_diffusers(pipe: Any) -> None:
    """Raises `ArtifactError` for classes that a place without this package has not."""
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    own = [type(part).__name__ for part in (pipe, *parts.values()) if type(part).__module__.startswith(_PACKAGE)]
    if own:
        raise ArtifactError(
            f"{', '.join(dict.fromkeys(own))} would not load where this package is not. Save it with "
            "`pipe.save_pretrained(folder)` and load it with its own class."
        )


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise ArtifactError(f"There is no folder {target.parent} to write {target.name} to. Create it first.")
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return
    if target.is_symlink() or not target.is_dir() or not overwrite or not (target / PIPELINE_SETTINGS).is_file():
        raise ArtifactError(
            f"{target} exists. Choose another folder, or pass overwrite=True, which replaces an earlier export (a "
            f"folder with {PIPELINE_SETTINGS}) and nothing else."
        )


@contextmanager
def _merged(pipe: Any) -> Iterator[None]:
    """The UNet with an attached PeRFlow LoRA merged into its weights, and attached again afterwards."""
    state = loaded(pipe)
    if state is None or not state.attached:
        yield
        return
    lora, unet, name = open_weights(state.artifact.lora_file), find_network(pipe), state.artifact.name
    for number in reversed(state.merges):
        rescale_merge(unet, number, name, 0)  # the whole LoRA, residual included, is merged below
    detach(pipe)
    try:
        with merge_delta(pipe, as_delta(lora, live_shapes(unet)), state.strength.given):
            yield
    finally:
        attach(pipe, lora, state.strength)
        for number in state.merges:
            rescale_merge(unet, number, name, state.strength.given)


def _finish(pipe: Any, folder: Path, form: str, name: str, base_model: str | None, license: str | None) -> None:
    """What the scheduler's folder and `model_index.json` say in this form, and the card."""
    ours = folder / "scheduler"
    config = read_json(ours / "scheduler_config.json")
    write_json(folder, PIPELINE_SETTINGS, config, overwrite=True)
    index = read_json(folder / "model_index.json")
    if form == "code":
        (ours / f"{MODULE}.py").write_text(scheduler_source(), encoding="utf-8")
        index["scheduler"] = [MODULE, "PeRFlowScheduler"]
    else:
        stock = _stock(pipe.scheduler)
        stock.save_pretrained(ours)
        index["scheduler"] = ["diffusers", type(stock).__name__]
    index.pop("_name_or_path", None)
    write_json(folder, "model_index.json", index, overwrite=True)
    for path in folder.glob("*/config.json"):
        _forget_origin(path)
    state = loaded(pipe) or companion(pipe)
    artifact = state.artifact if state is not None else None
    card = _card(pipe, form, name, base_model or (artifact and artifact.base_model), artifact, license)
    (folder / CARD).write_text(str(card), encoding="utf-8")


def _is_even(windows: SigmaWindows) -> bool:
    """Whether windows are equally long in their own time, so that a stock scheduler's static shift gives them."""
    return windows == SigmaWindows.uniform(windows.num_windows, windows.shift)


def _sigmas(scheduler: FlowMatchPeRFlowScheduler, steps: int) -> list[float]:
    """What a stock Euler scheduler of `_stock` is passed to take our `steps`."""
    windows, shift = scheduler.windows, scheduler.windows.shift if _is_even(scheduler.windows) else 1.0
    return [round(unshifted(level, shift), 9) for level in windows.grid(steps)[:-1]]


def _stock(scheduler: Any) -> Any:
    """The stock scheduler that comes nearest: DDIM from pure noise, with equal steps to the end; Euler for a flow."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchPeRFlowScheduler):
        windows = scheduler.windows
        return FlowMatchEulerDiscreteScheduler.from_config(
            {key: value for key, value in scheduler.config.items() if key not in _OURS_FLOW},
            shift=windows.shift if _is_even(windows) else 1.0,
            use_dynamic_shifting=False,
            shift_terminal=None,
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
        )

    config = {key: value for key, value in scheduler.config.items() if key not in _OURS}
    return DDIMScheduler.from_config(
        config,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=scheduler.config["set_alpha_to_one"],
        prediction_type=scheduler.config["prediction_type"] or "epsilon",
    )


def _forget_origin(path: Path) -> None:
    """Take the folder on this machine that a component was loaded from out of its configuration."""
    content = read_json(path)
    origin = content.get("_name_or_path")
    if isinstance(origin, str) and (origin.count("/") != 1 or Path(origin).exists()):
        del content["_name_or_path"]
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_PLAIN_NOTE = """Loaded like this, the pipeline samples with a stock DDIM scheduler, not with the one that its weights
were trained for. {difference} With perflow-diffusers the right one is set in one line. {install}

```python
import perflow_diffusers as pf

pf.set_scheduler(pipe)
```
"""


_FLOW_NOTE = """The scheduler is diffusers' own. {said} With perflow-diffusers every number of steps is right without
`sigmas`. {install}

```python
import perflow_diffusers as pf

pf.set_scheduler(pipe)
```
"""


def _takes_sigmas(pipe: Any) -> bool:
    return "sigmas" in inspect.signature(pipe.__call__).parameters


def _flow_note(pipe: Any) -> str:
    """What a stock Euler scheduler does with these weights."""
    if not _takes_sigmas(pipe):
        said = (
            "It is Euler's, whose steps are the right ones, but this pipeline's call takes no `sigmas`, so that they "
            "lie on other noise levels than the weights were trained for, and pictures are worse."
        )
    else:
        said = "The `sigmas` above put its steps on the noise levels that the weights were trained for, exactly."
    return _FLOW_NOTE.format(said=said, install=INSTALL_NOTE)


def _under_ddim(scheduler: PeRFlowScheduler) -> str:
    """What a stock DDIM scheduler does with these weights, in a sentence."""
    kind = PREDICTION_TYPES[scheduler.config["perflow_type"]]
    if kind.base_prediction is None:
        return "The network predicts something else than DDIM expects: without the line below there is no picture."
    if not kind.is_ddim:
        return "The rule differs at every number of steps: pictures are worse."
    return (
        f"At {scheduler.windows.num_windows} steps the rule is the same, but the network is told timesteps that are "
        "one lower; at other numbers of steps the rule differs, too, and pictures get worse."
    )


_GIVEN = ("image", "mask_image", "control_image", "video")


def _inputs(pipe: Any) -> list[str]:
    """What the pipeline must be given beside a prompt: a ControlNet's picture, a mask."""
    known = inspect.signature(pipe.__call__).parameters
    return [name for name in _GIVEN if name in known]


def _is_film(pipe: Any) -> bool:
    """Whether it draws films that diffusers writes by `export_to_video`: a flow-matching pipeline asked for frames."""
    flow = isinstance(pipe.scheduler, FlowMatchPeRFlowScheduler)
    return flow and "num_frames" in inspect.signature(pipe.__call__).parameters


def _task(pipe: Any) -> str:
    """The Hub's name of what the pipeline does."""
    if type(pipe).__name__.startswith("AnimateDiff") or _is_film(pipe):
        return "text-to-video"
    return "image-to-image" if _inputs(pipe) else "text-to-image"


def _call(pipe: Any, steps: int, guidance: float) -> str:
    """The lines of the snippet that draw, with a picture of the user's for each one that the pipeline asks for."""
    needs = _inputs(pipe)
    load = "load_video" if "video" in needs else "load_image"
    ending = "mp4" if "video" in needs else "png"
    given = "".join(f'{name}={load}("your-{name}.{ending}"), ' for name in needs)
    start = f"from diffusers.utils import {load}\n\n" if needs else ""
    if isinstance(pipe.scheduler, FlowMatchPeRFlowScheduler) and _takes_sigmas(pipe):
        given += f"sigmas={_sigmas(pipe.scheduler, steps)}, "
    call = f'pipe("a photo of a cat in the snow", {given}num_inference_steps={steps}, guidance_scale={guidance})'
    if _is_film(pipe):
        start = f"from diffusers.utils import export_to_video{f', {load}' if needs else ''}\n\n"
        return f'{start}frames = {call}.frames[0]\nexport_to_video(frames, "few-steps.mp4")'
    if _task(pipe) == "text-to-video":
        save = 'frames[0].save("few-steps.gif", save_all=True, append_images=frames[1:])'
        return f"{start}frames = {call}.frames[0]\n{save}"
    return f'{start}image = {call}.images[0]\nimage.save("few-steps.png")'


def _card(pipe: Any, form: str, name: str, base: Any, artifact: Any, license: str | None) -> ModelCard:
    steps = artifact.steps if artifact is not None else pipe.scheduler.windows.num_windows
    guidance = artifact.guidance_scale if artifact is not None and artifact.guidance_scale is not None else 1.0
    extra = {"base_model": base, "base_model_relation": "finetune"} if base and base.count("/") == 1 else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_task(pipe),
        tags=["diffusers", _task(pipe), "perflow", "few-step"],
        license=license or (artifact.license if artifact is not None else None),
        **extra,
    )
    lines = "\n".join(loading(json.dumps(name) + (", trust_remote_code=True" if form == "code" else "")))
    if form == "code":
        note = (
            f"The scheduler's code is in this repository (`scheduler/{MODULE}.py`); `trust_remote_code=True` allows "
            "diffusers to run it. Read it first: it needs nothing but torch, numpy and diffusers.\n\n"
            f"To make such a pipeline: {INSTALL_NOTE[0].lower()}{INSTALL_NOTE[1:]}\n"
        )
    else:
        flow = isinstance(pipe.scheduler, FlowMatchPeRFlowScheduler)
        note = (
            _flow_note(pipe)
            if flow
            else _PLAIN_NOTE.format(difference=_under_ddim(pipe.scheduler), install=INSTALL_NOTE)
        )
    text = f"""# {name}

A pipeline for pictures in {steps} steps: a piecewise rectified flow ([PeRFlow]({PAPER})) is in its weights.

## Use

```python
import torch
from diffusers import DiffusionPipeline

{lines}
{_call(pipe, steps, guidance)}
```

{note}"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
