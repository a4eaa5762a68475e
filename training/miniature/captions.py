"""Plain-word captions of the miniature's pictures: attribute words in, one sentence out."""

import random
from collections.abc import Mapping

COLORS = {
    "hair": {
        "cab188": "blond", "603a14": "brown", "28150a": "black", "611c17": "auburn",
        "bd1700": "red", "009bbd": "blue", "91cb15": "green",
    },
    "hat": {
        "2e1e05": "black", "2663a3": "blue", "989789": "gray", "3d8a6b": "green",
        "cc6192": "pink", "614f8a": "purple", "a62116": "red",
    },
    "clothing": {
        "428bca": "blue", "5bc0de": "blue", "03396c": "navy", "44c585": "green", "00b159": "green",
        "ff6f69": "pink", "d11141": "red", "ae0001": "red", "ffeead": "white", "ffc425": "yellow",
    },
    "skin": {"ffdbac": "fair", "f5cfa0": "fair", "cb9e6e": "tan", "b68655": "tan", "8d5524": "dark"},
    "background": {
        "b6e3f4": "blue", "c0aede": "purple", "ffd5dc": "pink", "ffdfbf": "orange",
        "bfe3b4": "green", "d9d9d9": "gray", "2f3e5c": "navy", "4f9d94": "teal",
    },
    "body": {
        "d11141": "red", "428bca": "blue", "00b159": "green", "ffc425": "yellow",
        "614f8a": "purple", "ff6f69": "pink", "03396c": "navy", "ffeead": "white",
    },
}  # fmt: skip

#: attribute -> the words it can take, for pictures of people; "none" is never said
PERSON = {
    "hair_length": ("short", "long"),
    "hair_color": tuple(dict.fromkeys(COLORS["hair"].values())),
    "hat": ("none", *COLORS["hat"].values()),
    "glasses": ("none", "glasses", "sunglasses"),
    "beard": ("none", "beard"),
    "mood": ("happy", "sad"),
    "clothing": tuple(dict.fromkeys(COLORS["clothing"].values())),
    "skin": tuple(dict.fromkeys(COLORS["skin"].values())),
    "background": tuple(COLORS["background"].values()),
}
#: the same for thumbs
THUMB = {
    "body": tuple(COLORS["body"].values()),
    "eyes": ("black", "white"),
    "background": tuple(COLORS["background"].values()),
}


def _color(kind: str, value: str) -> str:
    return COLORS[kind][value.lstrip("#")]


def person_attributes(extra: Mapping[str, str]) -> dict[str, str]:
    """Attribute words of one `pixel-art` avatar from DiceBear's `extra` record."""
    glasses = extra.get("glasses", "none")
    return {
        "hair_length": "long" if extra["hair"].startswith("long") else "short",
        "hair_color": _color("hair", extra["hairColor"]),
        "hat": _color("hat", extra["hatColor"]) if "hat" in extra else "none",
        "glasses": {"l": "glasses", "d": "sunglasses", "n": "none"}[glasses[0]],
        "beard": "beard" if "beard" in extra else "none",
        "mood": "happy" if extra["mouth"].startswith("happy") else "sad",
        "clothing": _color("clothing", extra["clothingColor"]),
        "skin": _color("skin", extra["skinColor"]),
        "background": _color("background", extra["primaryBackgroundColor"]),
    }


def thumb_attributes(extra: Mapping[str, str]) -> dict[str, str]:
    """Attribute words of one `thumbs` avatar from DiceBear's `extra` record."""
    return {
        "body": _color("body", extra["shapeColor"]),
        "eyes": "black" if extra["eyesColor"] == "#000000" else "white",
        "background": _color("background", extra["primaryBackgroundColor"]),
    }


def choose_stated(attributes: Mapping[str, str], rng: random.Random, keep: float = 0.5) -> list[str]:
    """Names of the attributes a caption states: each visible one with probability `keep`."""
    stated = [name for name, word in attributes.items() if word != "none" and rng.random() < keep]
    if attributes.get("hat", "none") != "none" and attributes["hair_length"] == "short":
        stated = [name for name in stated if not name.startswith("hair")]  # a hat hides short hair
    return stated


def caption(attributes: Mapping[str, str], stated: list[str]) -> str:
    """One sentence that states the attributes named in `stated`, and no others."""
    said = {name: attributes[name] for name in stated}
    background = f" on a {said['background']} background" if "background" in said else ""
    if "body" in attributes:
        eyes = f" with {said['eyes']} eyes" if "eyes" in said else ""
        return " ".join(filter(None, ["a", said.get("body"), "thumb"])) + eyes + background
    subject = " ".join(filter(None, ["a", said.get("mood"), "person"]))
    hair = [said[name] for name in ("hair_length", "hair_color") if name in said]
    features = [" ".join([*hair, "hair"])] if hair else []
    features += [f"{said['skin']} skin"] if "skin" in said else []
    features += ["a beard"] if "beard" in said else []
    features += [said["glasses"]] if "glasses" in said else []
    features += [f"a {said['hat']} hat"] if "hat" in said else []
    features += [f"{said['clothing']} clothes"] if "clothing" in said else []
    if features:
        subject += " with " + (" and ".join([", ".join(features[:-1]), features[-1]]) if features[1:] else features[0])
    return subject + background
