"""What keeps the house readable: short files, no circles, public names whose docstrings say all that they take."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import grimp
import pytest

import perflow_diffusers as pf
from perflow_diffusers import weights

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 350  # lines of a file that is still read whole
#: Imports of this project within a function: the command line starts at once, the page says what is missing.
DEFERRED = ("src/perflow_diffusers/cli/", "src/perflow_diffusers/__init__.py", "src/perflow_diffusers/__main__.py",
            "src/perflow_diffusers/app/server.py")  # fmt: skip


def sources(*folders):
    """The Python files of the repository, as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.splitlines() if name.endswith(".py") and (ROOT / name).is_file()]


#: Parameters that mean the same everywhere, and say so: may files be replaced, what is it done to?
PLAIN = {"self", "cls", "overwrite", "pipe", "pipe_or_unet"}
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")


@needs_git
def test_every_file_can_be_read_whole():
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources("src", "training", "tests")
    }
    assert len(lengths) > 300
    assert not {path: length for path, length in lengths.items() if length > LONGEST}


def circles(graph):
    """Modules that import each other, however far around (Tarjan's strongly connected components)."""
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph.find_modules_directly_imported_by(module):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            place = stack.index(module)
            if len(stack) - place > 1:
                found.append(stack[place:])
            del stack[place:]

    for module in sorted(graph.modules):
        if module not in index:
            visit(module)
    return found


def test_no_module_imports_itself_by_way_of_others():
    """Counted with imports within functions and under TYPE_CHECKING, which hide circles rather than mend them."""
    graph = grimp.build_graph(
        "perflow_diffusers", "perflow_training", cache_dir=None, exclude_type_checking_imports=False
    )
    assert len(graph.modules) > 150
    assert circles(graph) == []


def hidden_imports(path):
    """Lines at which a file imports this project within a function or for types alone."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in top
    ]
    names = [(node.lineno, ast.unparse(node)) for node in imports]
    return [line for line, text in names if re.search(r"\bperflow_|from \.", text)]


@needs_git
def test_imports_stand_at_the_top():
    paths = [path for path in sources("src", "training") if path.parent.name != "miniature"]
    found = {str(path.relative_to(ROOT)): hidden_imports(path) for path in paths}
    assert not {name: lines for name, lines in found.items() if lines and not name.startswith(DEFERRED)}


def takers():
    """(name, function) of everything public that is called, classes by their constructors and methods."""
    for module in (pf, weights):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            if inspect.isclass(value) and value.__module__.startswith("perflow"):
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                        yield f"{module.__name__}.{name}.{method}", function


@pytest.mark.parametrize(("name", "function"), [pytest.param(*one, id=one[0]) for one in takers()])
def test_docstrings_name_what_is_taken(name, function):
    """Each parameter is named in the docstring, and what an `Args:` section lists is a parameter."""
    given = list(inspect.signature(function).parameters)
    text = inspect.getdoc(function) or ""
    section = re.search(r"Args:\n((?:    .*\n|\n)+)", text)
    if section:
        listed = re.findall(r"^    ([\w, *]+):", section[1], re.M)
        named = {one.strip(" *") for names in listed for one in names.split(",")}
        assert named <= set(given), f"{name} has no {named - set(given)}"
    missing = [one for one in given if one not in PLAIN and not re.search(rf"\b{one}\b", text)]
    assert not missing, f"the docstring of {name} says nothing of {missing}"
