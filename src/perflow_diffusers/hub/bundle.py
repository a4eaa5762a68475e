"""The scheduler and the mathematics below it as one Python file that needs nothing of this package."""

import ast
from pathlib import Path

from perflow_diffusers._version import __version__
from perflow_diffusers.flow import base, chord, path, windows
from perflow_diffusers.schedulers import arguments, base_config, combine, run, scheduling_perflow, stepping

#: In the order in which they build on each other.
MODULES = (path, windows, chord, base, base_config, combine, arguments, run, stepping, scheduling_perflow)

#: The file's name in a repository, without its ending.
MODULE = "perflow_scheduler"

_HEADER = '"""PeRFlowScheduler in one file, made from perflow-diffusers {version} (Apache-2.0)."""\n'

# diffusers saves neither a component's code nor the name under which it looks for that code, but asks the instance
# for its `__module__`; the class keeps its own, by which it is pickled.
_CARRY = """

# A pipeline that was loaded with this file carries it along when it is saved.
_MODULE, _CODE = "{module}", Path(__file__).read_text(encoding="utf-8")
_save_config = PeRFlowScheduler.save_config


def _save_with_code(self, save_directory, *args, **kwargs):
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{{_MODULE}}.py").write_text(_CODE, encoding="utf-8")
    return _save_config(self, save_directory, *args, **kwargs)


def _named_after_the_file(cls, *args, **kwargs):
    scheduler = object.__new__(cls)
    scheduler.__module__ = _MODULE
    return scheduler


PeRFlowScheduler.save_config = _save_with_code
PeRFlowScheduler.__new__ = staticmethod(_named_after_the_file)
"""


def scheduler_source() -> str:
    """Python source that defines `PeRFlowScheduler` with torch, numpy, diffusers and the standard library alone.

    What is saved from it holds the source again, as `MODULE`.py.
    """
    imports: dict[str, None] = {"from pathlib import Path": None}
    bodies = []
    for module in MODULES:
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = text.splitlines()
        drop: set[int] = set()
        for number, node in enumerate(tree.body):
            docstring = number == 0 and isinstance(node, ast.Expr)
            if docstring or isinstance(node, ast.Import | ast.ImportFrom):
                drop.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and _foreign(node)):
                imports.setdefault(ast.unparse(node))
        kept = [line for number, line in enumerate(lines, start=1) if number not in drop]
        bodies.append("\n".join(kept).strip("\n"))
    future = [line for line in imports if "__future__" in line]
    others = sorted(line for line in imports if "__future__" not in line)
    head = "\n".join([_HEADER.format(version=__version__), *future, "", *others, "\n"])
    return head + "\n\n\n".join(bodies) + "\n" + _CARRY.format(module=MODULE)


def _foreign(node: ast.ImportFrom) -> bool:
    """Whether an import is of something that is not in this package."""
    return node.level == 0 and not str(node.module).startswith("perflow_diffusers")
