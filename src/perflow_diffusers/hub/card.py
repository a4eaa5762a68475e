"""The card of an artefact or of an exported pipeline: metadata that the Hub filters by, and a snippet that runs."""

import json
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.hub.settings import Settings

PAPER = "https://arxiv.org/abs/2405.07510"
# How people get this package, in the README and in every card: there is no release in an index of packages yet.
INSTALL = "pip install ."
INSTALL_NOTE = f"Install perflow-diffusers with `{INSTALL}` in a clone of its repository (Python 3.11 or newer)."
_PROMPT = "a photo of a cat in the snow"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def artifact_card(
    said: Settings, source: str, forms: Sequence[str], samples: Sequence[tuple[str, str]] = ()
) -> ModelCard:
    """The card of an accelerator.

    `source`: what the snippet loads (a Hub id or folder); `forms`: which weights there are ("delta", "lora",
    "kohya"); `samples`: (prompt, path of its picture in the repository).
    """
    prompt = samples[0][0] if samples else _PROMPT
    guidance = _guidance(said)
    call = f"num_inference_steps={said.steps}, guidance_scale={guidance}"
    lines = [
        f"# {_title(source)}",
        "",
        f"An accelerator for {_base(said)}: pictures in {said.steps_in_words} steps, trained as piecewise "
        f"rectified flow ([PeRFlow]({PAPER})).",
        "",
        *_pictures(samples),
        "## Use",
        "",
        INSTALL_NOTE,
        "",
        "```python",
        *_pipeline(said),
        f"pf.load_perflow(pipe, {_literal(source)})  # the weights, and the scheduler they need",
        f"image = pipe({_literal(prompt)}, {call}).images[0]",
        'image.save("few-steps.png")',
        "```",
        "",
        "`pf.unload_perflow(pipe)` restores the weights bit for bit, and the former scheduler. Fine-tunes of the same "
        "base take it, too. With another scheduler than the one that is loaded here, pictures are wrong.",
        "",
        *_forms(forms),
        *_settings_table(said, guidance),
    ]
    return ModelCard(f"---\n{_data(said, forms, samples).to_yaml()}\n---\n\n" + "\n".join(lines))


def read_card(text: str, where: str) -> ModelCard:
    """The card in a text of others; `ArtifactError` if its metadata cannot be read. `where` names it."""
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"The metadata of {where} (between the lines ---) cannot be read ({type(error).__name__}: "
            f"{str(error)[:100]}). Mend or delete it."
        ) from None


def saved_card(source: str) -> ModelCard:
    """The card of a pipeline that `save_pretrained` wrote, which needs this package for its scheduler."""
    data = ModelCardData(library_name="diffusers", tags=["diffusers", "perflow", "few-step"])
    lines = [
        f"# {_title(source)}",
        "",
        f"A diffusers pipeline for few steps: a piecewise rectified flow ([PeRFlow]({PAPER})) is in its weights. Its "
        "scheduler comes with perflow-diffusers.",
        "",
        "## Use",
        "",
        INSTALL_NOTE,
        "",
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "import perflow_diffusers  # brings the classes that the pipeline names",
        "",
        *loading(_literal(source)),
        "```",
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _data(said: Settings, forms: Sequence[str], samples: Sequence[tuple[str, str]]) -> ModelCardData:
    tags = ["diffusers", "text-to-image", "perflow", "few-step"] + (["lora"] if "lora" in forms else [])
    extra: dict[str, Any] = {}
    if said.base_model and _HUB_ID.fullmatch(said.base_model):
        extra.update(base_model=said.base_model, base_model_relation="adapter")
    if samples:
        extra["widget"] = [{"text": prompt, "output": {"url": path}} for prompt, path in samples]
    return ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", tags=tags, license=said.license, **extra
    )


def _title(source: str) -> str:
    return _inline(source.rstrip("/").rsplit("/", 1)[-1])


def _inline(text: str) -> str:
    """Text of others inside a line of Markdown."""
    return re.sub(r"[\[\]<>`|\\]", " ", " ".join(text.split()))


def _literal(text: str) -> str:
    """Text of others as a Python string in a block of code, which no backquote in it can end."""
    return json.dumps(text).replace("`", "\\x60")


def _base(said: Settings) -> str:
    base = said.base_model
    if base and _HUB_ID.fullmatch(base):
        return f"[{base}](https://huggingface.co/{base})"
    return f"`{_inline(base)}`" if base else "checkpoints of the family below"


def _pipeline(said: Settings) -> list[str]:
    """The lines of the snippet that make the pipeline."""
    ours = "import perflow_diffusers as pf"
    base = said.base_model
    if base == "miniature":
        return [ours, "", f"pipe = pf.load_miniature({_literal('flow') if said.is_flow else ''})"]
    made = loading(_literal(base or "a checkpoint of this family"))
    return ["import torch", "from diffusers import DiffusionPipeline", ours, "", *made]


def loading(arguments: str) -> list[str]:
    """Lines that load a pipeline where it runs best; one dtype for all parts, whatever theirs was when saved."""
    return [
        'device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)',
        f"pipe = DiffusionPipeline.from_pretrained({arguments}, dtype=dtype).to(device)",
    ]


def _guidance(said: Settings) -> float:
    """What is recommended; else 1 for windows solved with guidance, and 4.5 for those solved without."""
    if said.guidance_scale is not None:
        return said.guidance_scale
    return 1.0 if (said.solve_guidance or 0) > 1 else 4.5


def _pictures(samples: Sequence[tuple[str, str]]) -> list[str]:
    return [line for prompt, path in samples for line in (f"![{_inline(prompt)}]({path})", "")]


def _forms(forms: Sequence[str]) -> list[str]:
    said = {
        "delta": "`perflow.safetensors`: the difference of all weights of the network; `load_perflow` merges it.",
        "lora": "`pytorch_lora_weights.safetensors`: the same as a LoRA in diffusers' layout: "
        '`load_perflow(pipe, ..., weights="lora")` attaches it beside other LoRAs.',
        "kohya": "`perflow_kohya.safetensors`: the LoRA in the layout of kohya, webui and ComfyUI. These need "
        "a PeRFlow sampler of their own.",
    }
    return ["## Files", "", *(f"- {said[form]}" for form in forms if form in said), ""]


def _settings_table(said: Settings, guidance: float) -> list[str]:
    rows = {
        "prediction type": said.prediction_type,
        "process": "flow matching" if said.is_flow else "None",
        "time windows": said.windows_in_words,
        "steps": said.steps_in_words,
        "guidance scale at sampling": str(guidance),
        "guidance of the teacher in training": str(said.solve_guidance),
        "base": str(said.base_model),
        "base's content hash": str(said.base_hash),
        "licence": str(said.license),
    }
    table = [f"| {key} | {_inline(value)} |" for key, value in rows.items() if value != "None"]
    recipe = ["", "## Training", "", "```json", json.dumps(dict(said.recipe), indent=1), "```"]
    return ["## Settings", "", "| | |", "|---|---|", *table, *(recipe if said.recipe else []), ""]
