"""Where diffusers looks for the classes that a saved pipeline names: this package's are to be found there, too."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import diffusers
import diffusers.pipelines

from perflow_diffusers.schedulers import scheduling_perflow

_WONDER3D = "perflow_diffusers.pipelines.wonder3d"


def make_findable() -> None:
    """Let `DiffusionPipeline.from_pretrained` load this package's classes by id; `import perflow_diffusers` calls it.

    `model_index.json` names the module and the class of a component. From the Hub, diffusers takes only modules of
    its own list of libraries, or attributes of `diffusers.pipelines`; a pipeline's class has to be an attribute of
    `diffusers`. And a scheduler made from the config of another one drops what only the other takes without a word if
    that one's class is such an attribute; otherwise it logs "config attributes ... will be ignored". So these are
    added, no function is changed, and a name that is there already is left alone:

    - `diffusers.pipelines`: this package's scheduler module and Wonder3D's network, under their full names;
    - `diffusers.Wonder3DPipeline` and `diffusers.PeRFlowScheduler`.

    Wonder3D is imported when it is asked for.
    """
    pipelines = sys.modules["diffusers.pipelines"]
    _offer(pipelines, scheduling_perflow.__name__, lambda: scheduling_perflow)
    _offer(pipelines, f"{_WONDER3D}.unet", lambda: importlib.import_module(f"{_WONDER3D}.unet"))
    _offer(diffusers, "PeRFlowScheduler", lambda: scheduling_perflow.PeRFlowScheduler)
    _offer(diffusers, "Wonder3DPipeline", lambda: importlib.import_module(_WONDER3D).Wonder3DPipeline)


def _offer(module: ModuleType, name: str, load: Callable[[], Any]) -> None:
    """Give a module an attribute that is made when it is asked for, unless it has one of that name."""
    kind = type(module)
    if name not in dir(module) and name not in dir(kind):
        module.__class__ = type(kind.__name__, (kind,), {name: property(lambda self: load())})
