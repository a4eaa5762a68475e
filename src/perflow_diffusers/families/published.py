"""The published PeRFlow weights and how each was trained: data only, the one place that knows it."""

import json
from dataclasses import dataclass
from functools import partial

from perflow_diffusers.families.family import Family
from perflow_diffusers.families.stable_diffusion import SD1, SD2, SDXL
from perflow_diffusers.words.shown import shown

_OWNER = "hansyan"


@shown
@dataclass(frozen=True)
class Published:
    """One published set of weights.

    `name` is its repository under `owner`; `form` is "delta" (the difference of a UNet) or "pipeline" (a whole
    pipeline whose UNet has the difference in it); `variant` the one to take of several; `guidance` the range that its
    authors recommend, for few steps first; `short_name` what users may type; `base_prediction_type` what the base of
    this family predicts.
    """

    name: str
    form: str
    prediction_type: str
    family: Family
    variant: str | None = None
    guidance: tuple[float, float] | None = None
    num_time_windows: int = 4
    recommended_steps: tuple[int, ...] = (4, 8)
    license: str = "cc-by-nc-4.0"
    short_name: str = ""
    owner: str = _OWNER
    base_prediction_type: str = "epsilon"

    @property
    def repo_id(self) -> str:
        """`owner/name` on the Hub."""
        return f"{self.owner}/{self.name}"

    @property
    def training(self) -> dict[str, str]:
        """How they were trained, as a delta's header says it (str -> str)."""
        return {"prediction_type": self.prediction_type, "num_time_windows": str(self.num_time_windows)}

    @property
    def metadata(self) -> dict[str, str]:
        """All that the header of these weights would say, had they one (str -> str)."""
        header = {**self.training, "recommended_steps": str(list(self.recommended_steps)), "license": self.license}
        header.update(base_prediction_type=self.base_prediction_type, noise=json.dumps(dict(self.family.noise)))
        if self.guidance is not None:
            header["recommended_guidance_scale"] = str(self.guidance[0])
        return header


_SD15 = partial(Published, prediction_type="diff_eps", family=SD1, guidance=(4.5, 7.5))
# PeRFlow's velocity, which is not what its base predicts.
_SD21 = partial(Published, prediction_type="velocity", family=SD2, base_prediction_type="v_prediction")
_SDXL = partial(Published, prediction_type="ddim_eps", family=SDXL)

#: All of them; no LoRA and no SDXL delta is among them.
PUBLISHED: tuple[Published, ...] = (
    _SD15("perflow-sd15-delta-weights", "delta", variant="v0-1", short_name="perflow-sd15-delta"),
    _SD15("perflow-sd15-dreamshaper", "pipeline"),
    _SD15("perflow-sd15-realisticVisionV51", "pipeline"),
    _SD15("perflow-sd15-disney", "pipeline"),
    _SD15("perflow-sd15-architectureexterior", "pipeline"),
    _SD21("perflow-sd21-artius", "pipeline"),
    _SDXL("perflow-sdxl-dreamshaper", "pipeline", variant="v0-fix", guidance=(1.5, 2.5)),
    _SDXL("perflow-sdxl-base", "pipeline", guidance=(1.5, 2.0)),
)


def published(name: str) -> Published | None:
    """The entry that a short name, a repository's name or a Hub id means, or None."""
    names = [(entry, (entry.name, entry.repo_id, entry.short_name or entry.name)) for entry in PUBLISHED]
    return next((entry for entry, known in names if name in known), None)
