"""Where diffusers looks for the classes that a saved pipeline names: this package's are to be found there, too.

Nothing of diffusers is imported for it: that takes seconds, and `perflow --help` needs none of it.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SCHEDULERS = {
    "PeRFlowScheduler": "perflow_diffusers.schedulers.scheduling_perflow",
    "FlowMatchPeRFlowScheduler": "perflow_diffusers.schedulers.scheduling_flow_match_perflow",
}
_WONDER3D = "perflow_diffusers.pipelines.wonder3d"


def make_findable() -> None:
    """Let `DiffusionPipeline.from_pretrained` load this package's classes by id; `import perflow_diffusers` calls it.

    `model_index.json` names the module and the class of a component. From the Hub, diffusers takes only modules of
    its own list of libraries, or attributes of `diffusers.pipelines`; a pipeline's class has to be an attribute of
    `diffusers`. And a scheduler made from the config of another one drops what only the other takes without a word if
    that one's class is such an attribute; otherwise it logs "config attributes ... will be ignored". So these are
    added, no function is changed, and a name that is there already is left alone:

    - `diffusers.pipelines`: this package's scheduler modules and Wonder3D's network, under their full names;
    - `diffusers.Wonder3DPipeline` and the two schedulers.

    Each is imported when it is asked for. Where diffusers is not imported yet, this is done as soon as it is.
    """
    if "diffusers" in sys.modules:
        _add()
    elif not any(isinstance(finder, _AfterDiffusers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterDiffusers())


def _add() -> None:
    diffusers, pipelines = importlib.import_module("diffusers"), importlib.import_module("diffusers.pipelines")
    for module in (*_SCHEDULERS.values(), f"{_WONDER3D}.unet"):
        _offer(pipelines, module, module)
    for name, module in _SCHEDULERS.items():
        _offer(diffusers, name, module, name)
    _offer(diffusers, "Wonder3DPipeline", _WONDER3D, "Wonder3DPipeline")


def _offer(module: ModuleType, name: str, where: str, what: str | None = None) -> None:
    """Give a module an attribute that is imported when it is asked for, unless it has one of that name."""

    def load(_: ModuleType) -> Any:
        found = importlib.import_module(where)
        return found if what is None else getattr(found, what)

    kind = type(module)
    if name not in dir(module) and name not in dir(kind):
        module.__class__ = type(kind.__name__, (kind,), {name: property(load)})


class _AfterDiffusers(MetaPathFinder):
    """Finds diffusers as the other finders do, and adds this package's names when it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Then(spec.loader, spec, self._imported)
                return spec
        return None

    def _imported(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        _add()


class _Then(Loader):
    """Another loader, and something to do after it."""

    def __init__(self, loader: Loader, spec: ModuleSpec, then: Callable[[], None]) -> None:
        self._loader, self._spec, self._then = loader, spec, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = self._loader  # whoever looks at the module sees its own loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
