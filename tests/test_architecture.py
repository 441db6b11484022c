"""The shape of the code: public names, verbs, the direction of imports, and what the house style forbids."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tersely
from tersely.cli import _parser
from tersely.families import families

SOURCE = Path(tersely.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
LAYERS = (
    ("errors", "registration"),
    ("checkpoint", "families", "hadamard", "results"),
    ("graph", "writer", "calibrate", "codecs"),
    ("measure", "bases", "stored"),
    ("rebase",),
    ("methods", "runtime"),
    ("plan",),
    ("report", "rewriting"),
    ("rotation",),
    ("stream", "export", "encoding"),
    ("fisher", "shape", "vocabulary"),
    ("job",),
    ("allocation", "calibrated", "manifest", "tuning"),
    ("units",),
    ("ahead",),
    ("compression", "evaluation", "verify"),
    ("demo",),
    ("cli",),
)
"""From low to high: a module imports only from lower lines, and from its own package."""
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
ENTRIES = {"__init__", "__main__"}
PUBLIC = [
    "Blame",
    "Checkpoint",
    "Evaluation",
    "Graph",
    "Recipe",
    "Report",
    "Speed",
    "Store",
    "blame",
    "compress",
    "evaluate",
    "open",
    "speed",
]
VERBS = [
    "inspect",
    "compress",
    "evaluate",
    "blame",
    "speed",
    "report",
    "runs",
    "tasks",
    "generate",
    "verify",
    "export",
    "vocab",
    "families",
    "methods",
    "recipes",
    "demo",
]


def part(path: Path) -> str:
    """The module or package right under tersely/."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> Iterator[str]:
    """What a module imports from tersely, wherever in it: the first name below tersely."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            if node.module == "tersely":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            elif node.module and node.module.startswith("tersely."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tersely."))


def test_the_public_names_are_frozen() -> None:
    assert tersely.__all__ == PUBLIC
    assert sorted(dir(tersely)) == sorted(tersely.__all__)
    for name in PUBLIC:
        assert getattr(tersely, name).__doc__
    with pytest.raises(AttributeError, match="'squeeze'"):
        tersely.squeeze  # noqa: B018


def test_the_verbs_are_frozen() -> None:
    (verbs,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert list(verbs.choices) == VERBS


def test_every_module_has_a_place_in_the_order() -> None:
    assert {part(path) for path in MODULES} - ENTRIES == HEIGHT.keys()


@pytest.mark.parametrize("path", [p for p in MODULES if part(p) not in ENTRIES], ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    own = part(path)
    for other in imports(path):
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", [p for p in MODULES if part(p) != "families"], ids=name_of)
def test_no_model_type_is_named_outside_the_tables(path: Path) -> None:
    texts = {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)}
    assert not texts & families().keys()


def test_the_tables_themselves_name_every_model_type() -> None:
    tables = "\n".join(p.read_text("utf-8") for p in (SOURCE / "families").glob("*.toml"))
    assert all(f'"{name}"' in tables for name in families())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_names_are_nouns_of_the_field(path: Path) -> None:
    forbidden = {"utils", "util", "helpers", "helper", "misc", "common", "base", "manager", "core", "tools"}
    assert not forbidden & {piece.removesuffix(".py") for piece in path.relative_to(SOURCE).parts}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_library_prints_nothing_reads_no_environment_and_patches_nothing(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or part(path) == "cli", f"line {node.lineno} prints"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"line {node.lineno} reads the environment"
        if isinstance(node, ast.Global):
            raise AssertionError(f"line {node.lineno} has global state")


@pytest.mark.parametrize("module", ["tersely", "tersely.cli", "tersely.errors"])
def test_importing_the_package_does_not_wait_for_pytorch(module: str) -> None:
    slow = ("torch", "transformers", "numpy", "rich", "safetensors")
    code = f"import sys, {module}; print([m for m in {slow} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_data_free_job_needs_no_transformers() -> None:
    """Its import takes longer than many such jobs."""
    code = "import sys, tersely.compression; print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
