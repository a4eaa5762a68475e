"""What one picture is drawn with: checked, and to and from plain JSON values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from perflow_diffusers.schedulers.stock import STOCK

#: solver of a comparison that differs by the accelerator's weights alone
SAME = "PeRFlow"
SOLVERS = (*STOCK, SAME)
MAX_STEPS = 16  # of the accelerated picture
MAX_STOCK_STEPS = 100
MAX_SCALE = 1.5
MAX_SEED = 2**32 - 1
MAX_PROMPT = 2000  # characters


class SettingsError(ValueError):
    """A setting that no picture can be drawn with."""


@dataclass(frozen=True)
class Settings:
    """Prompt, noise and cost of an accelerated picture, and of the unaccelerated one beside it.

    `accelerator_scale`: strength of the accelerator, 0 to 1.5. `stock`: a solver of `SOLVERS`,
    "PeRFlow" for the accelerated picture's own. `strength`: of image to
    image, above 0 and up to 1; None for text to image. `width`, `height`: pixels, multiples of 8; None for the
    pipeline's own. Raises SettingsError (a ValueError) for a value of a wrong type or out of its range.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 4
    guidance_scale: float = 1.0
    accelerator_scale: float = 1.0
    stock: str = "DPM-Solver++"
    stock_steps: int = 4
    stock_guidance_scale: float = 7.5
    strength: float | None = None
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > MAX_PROMPT:
                raise SettingsError(f"`{name}` must be text of at most {MAX_PROMPT} characters.")
        self._whole("seed", 0, MAX_SEED)
        self._whole("steps", 1, MAX_STEPS)
        self._whole("stock_steps", 1, MAX_STOCK_STEPS)
        self._real("guidance_scale", 0, 30)
        self._real("stock_guidance_scale", 0, 30)
        self._real("accelerator_scale", 0, MAX_SCALE)
        if self.stock not in SOLVERS:
            raise SettingsError(f"`stock={self.stock!r}` is unknown. Choose one of {', '.join(SOLVERS)}.")
        if self.strength is not None:
            self._real("strength", 0, 1)
            if int(self.steps * self.strength) < 1 or int(self.stock_steps * self.strength) < 1:
                raise SettingsError(
                    f"A strength of {self.strength:g} leaves none of {min(self.steps, self.stock_steps)} steps: the "
                    "first are skipped. Raise the strength or the number of steps."
                )
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                self._whole(name, 8, 4096)
                if getattr(self, name) % 8:
                    raise SettingsError(f"`{name}={getattr(self, name)}` is no multiple of 8.")

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, float) and value.is_integer():
            object.__setattr__(self, name, value := int(value))
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise SettingsError(f"`{name}={value!r}` must be a whole number from {low} to {high}.")

    def _real(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise SettingsError(f"`{name}={value!r}` must be a number from {low:g} to {high:g}.")
        object.__setattr__(self, name, float(value))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that `to_dict` gave. Fields that are missing take their defaults; unknown ones are refused."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SettingsError(f"The settings have fields unknown to this version: {', '.join(unknown)[:200]}.")
        if "prompt" not in values:
            raise SettingsError("The settings have no prompt.")
        return cls(**values)
