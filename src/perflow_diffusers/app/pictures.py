"""Pictures that come in, checked; pictures that go out, with their settings inside."""

import contextlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin

from perflow_diffusers._version import __version__
from perflow_diffusers.app.settings import MAX_SEED, MAX_STEPS, Settings, SettingsError

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000
MAX_TEXT = 100_000  # characters of settings in a PNG
#: our own text chunk, JSON; beside it stands the field's "parameters"
CHUNK = "perflow"
FORMATS = ("PNG", "JPEG", "WEBP")


class PictureError(ValueError):
    """A file that is no picture, too large, or has no settings in it."""


def check_upload(data: bytes) -> Image.Image:
    """The picture (RGB, upright) of a PNG, JPEG or WebP file's bytes, decoded to its last pixel.

    Raises PictureError for more than 20 MB or 40 million pixels, and for anything that is no whole picture.
    """
    picture = _opened(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # Pillow raises SyntaxError, struct.error, zlib.error and more for damaged files
        raise PictureError(f"The picture is damaged ({type(error).__name__}). Save it anew and try again.") from None


def _opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Any:
    if len(data) > MAX_BYTES:
        raise PictureError(f"The file has {len(data) / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = Image.open(io.BytesIO(data), formats=formats)
            width, height = picture.size
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
    except Image.DecompressionBombWarning:
        width = height = MAX_PIXELS
    except Exception:
        raise PictureError(f"This file is no picture that can be read. Take a {', '.join(formats)} file.") from None
    if width * height > MAX_PIXELS:
        raise PictureError(f"The picture has more than {MAX_PIXELS // 10**6} million pixels. Take a smaller one.")
    return picture


def enlarge(picture: Image.Image, at_least: int = 256) -> Image.Image:
    """A small picture enlarged by a whole factor without blur, so that its shorter side has `at_least` pixels."""
    factor = -(-at_least // min(picture.size))
    return picture if factor <= 1 else picture.resize((picture.width * factor, picture.height * factor), 0)


def to_png(picture: Image.Image, settings: Settings, about: Mapping[str, str]) -> bytes:
    """PNG bytes that carry their settings: `about` (model, accelerator), and the settings as two text chunks.

    "perflow" is JSON and says all; "parameters" is the form that other tools read (Stable Diffusion web UI).
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", parameters_text(settings, about, picture.size))
    said = {"version": __version__, **about, "settings": settings.to_dict()}
    info.add_itxt(CHUNK, json.dumps(said, ensure_ascii=False))
    out = io.BytesIO()
    picture.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def parameters_text(settings: Settings, about: Mapping[str, str], size: tuple[int, int]) -> str:
    """The settings as Stable Diffusion web UI writes them: prompt, negative prompt, then one line of pairs."""
    pairs = {
        "Steps": settings.steps,
        "Sampler": "PeRFlow",
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": about.get("model", ""),
        "PeRFlow accelerator": about.get("accelerator", ""),
        "PeRFlow strength": f"{settings.accelerator_scale:g}",
    }
    if settings.strength is not None:
        pairs["Denoising strength"] = f"{settings.strength:g}"
    lines = [settings.prompt.replace("\n", " ")]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}".replace("\n", " "))
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value != ""))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def from_png(data: bytes) -> Settings:
    """The settings that a PNG carries: ours, or the common ones of another tool's "parameters".

    Raises PictureError for what is no PNG or carries none, SettingsError for settings that cannot be drawn with.
    """
    picture = _opened(data, ("PNG",))
    try:
        picture.load()  # text may stand behind the pixels
    except Exception as error:
        raise PictureError(f"The picture is damaged ({type(error).__name__}). Save it anew and try again.") from None
    texts = {name: text for name, text in picture.info.items() if isinstance(text, str) and len(text) <= MAX_TEXT}
    if CHUNK in texts:
        try:
            return Settings.from_dict(json.loads(texts[CHUNK])["settings"])
        except SettingsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise PictureError("The settings in this PNG are damaged.") from None
    if "parameters" in texts:
        return _from_parameters(texts["parameters"])
    raise PictureError("This PNG carries no settings. Take one that was downloaded from this page.")


def _from_parameters(text: str) -> Settings:
    """Prompt, negative prompt, seed and steps of another tool's picture; its sampler's cost is not ours."""
    *lines, last = text.strip().split("\n")
    pairs = {name.strip(): value.strip() for name, value in re.findall(r"([\w +]+): (\"[^\"]*\"|[^,]*)", last)}
    if "Steps" not in pairs:
        lines, pairs = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    values: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    if pairs.get("Seed", "").isdigit():
        values["seed"] = min(int(pairs["Seed"][:20]), MAX_SEED)
    if pairs.get("Sampler") == "PeRFlow" and pairs.get("Steps", "").isdigit():
        values["steps"] = min(max(int(pairs["Steps"][:6]), 1), MAX_STEPS)
        with contextlib.suppress(ValueError):
            values["guidance_scale"] = float(pairs.get("CFG scale", "1"))
    return Settings.from_dict(values)
