"""Everything that the documents name exists: paths, links, commands, presets, node ids, functions of the paper map."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "clearsr_core|nodes|training|tools|bench|tests|workflows|models|docs|web|locales"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "models/*.md", "training/*.md", "tests/**/*.md", "web/docs/**/*.md")
    for path in ROOT.glob(pattern)
    if "node_modules" not in path.parts
)
COMPATIBILITY = ROOT / "docs" / "COMPATIBILITY.md"
PAPER_MAP = ROOT / "docs" / "PAPER_MAP.md"
# A path in running text or code; {a,b}, <name>, * and ... stand for several or for anything.
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*{{}},<>-]*[\w*/}}])")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
MAKE = re.compile(r"(?:^|`|\$ )make ([a-z]+)\b", re.MULTILINE)
MODULE = re.compile(r"python -m ((?:training|tools)(?:\.\w+)+|bench)\b")
PRESET = re.compile(r"--preset[= ]([\w-]+)")
NODE_ID = re.compile(r'node_id\s*=\s*"(\w+)"')
REFERENCE = re.compile(rf"^((?:{FOLDERS})/[\w/.]+\.py)::([\w.]+)$")


def node_ids() -> set[str]:
    """Ids of the nodes, read out of the sources."""
    return {found for path in (ROOT / "nodes").glob("*.py") for found in NODE_ID.findall(path.read_text("utf-8"))}


def class_names() -> set[str]:
    """Every class and type alias that the code defines or imports: ClearSRConfig is no node."""
    names = set()
    for folder in ("clearsr_core", "nodes", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(re.findall(r"\b(ClearSR\w+)", path.read_text("utf-8")))
    return names


def expand(path: str) -> list[str]:
    """Spell out {a,b} in a path."""
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        return [path]
    return [way for part in match.group(1).split(",") for way in expand(path.replace(match.group(0), part, 1))]


def exists(path: str) -> bool:
    """Say whether a path of a document is in the repository; generated folders count as there."""
    if "<" in path or "..." in path or "NNNN" in path or "XXXX" in path:
        return True
    return all(any(ROOT.glob(way.rstrip("/"))) if "*" in way else (ROOT / way).exists() for way in expand(path))


def runnable(path: Path) -> tuple[Path, Path]:
    """Return what `python -m` would run for a module or a package."""
    return path.with_suffix(".py"), path / "__main__.py"


def defined(path: Path) -> set[str]:
    """Names of the functions, classes, methods (Class.method) and constants of a Python file."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def unresolved(reference: str) -> str | None:
    """Say what is wrong with `path.py::name`; None if it is there or not a reference."""
    match = REFERENCE.match(reference)
    if match is None:
        return None
    path, name = ROOT / match.group(1), match.group(2)
    if not path.is_file():
        return f"{reference}: no such file"
    return None if name in defined(path) else f"{reference}: no such name"


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


@each_document
def test_paths_and_links_lead_somewhere(document):
    text = document.read_text("utf-8")
    missing = [path for path in PATH.findall(text) if not exists(path)]
    missing += [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert not missing


@each_document
def test_commands_and_presets_exist(document):
    text = document.read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    presets = {path.stem for path in (ROOT / "training" / "presets").glob("*.toml")}
    modules = {name: ROOT / name.replace(".", "/") for name in MODULE.findall(text)}
    missing = [name for name, path in modules.items() if not any(map(Path.is_file, runnable(path)))]
    in_code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    assert not {target for target in MAKE.findall(in_code) if target not in targets}
    assert not {preset for preset in PRESET.findall(text) if preset not in presets and preset != "NAME"}
    assert not missing


@each_document
def test_node_ids_exist(document):
    known = node_ids() | class_names()
    named = {
        word for code in CODE.findall(document.read_text("utf-8")) for word in re.findall(r"\bClearSR[A-Z]\w+", code)
    }
    assert named <= known


@each_document
def test_references_name_real_functions_and_tests(document):
    """`path.py::name` is how the documents, the paper map above all, point into code and tests."""
    problems = [unresolved(code) for code in CODE.findall(document.read_text("utf-8"))]
    assert not [problem for problem in problems if problem]


def tables(document: Path) -> list[list[dict[str, str]]]:
    """Return the tables of a document as rows of cells by the names of their columns."""
    found, header = [], None
    for line in document.read_text("utf-8").splitlines():
        if not re.match(r"\|.*\|\s*$", line):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = cells
            found.append([])
        elif not re.fullmatch(r"[\s:|-]+", line):
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


def test_the_paper_map_points_from_every_row_to_code_and_to_a_test():
    found = tables(PAPER_MAP)
    assert sum(map(len, found)) > 40
    for row in [row for table in found for row in table]:
        named = {name: [code for code in CODE.findall(cell) if REFERENCE.match(code)] for name, cell in row.items()}
        assert row.keys() & {"Code", "Test"}, row
        if "Code" in row:
            assert any(not code.startswith("tests/") for code in named["Code"]), row
        if "Test" in row:
            assert named["Test"] and all(code.startswith("tests/") for code in named["Test"]), row


def test_every_row_of_the_matrix_is_a_test_and_every_test_a_row():
    rows = [line for line in COMPATIBILITY.read_text("utf-8").splitlines() if re.match(r"\|.*\|\s*$", line)]
    rows = [row for row in rows if not re.match(r"\|[\s:|-]+\|\s*$", row) and not row.endswith("| Test |")]
    named = {row: {code for code in CODE.findall(row) if REFERENCE.match(code)} for row in rows}
    assert len(rows) > 20 and not [row for row, references in named.items() if not references]
    for file in ("test_matrix.py", "test_memory_states.py", "test_large.py"):
        tests = {f"tests/host/{file}::{name}" for name in defined(ROOT / "tests/host" / file) if name[:5] == "test_"}
        assert tests and tests <= set().union(*named.values())


def test_every_node_has_a_help_page_and_english_names_and_none_is_left_over():
    ids = node_ids()
    assert ids, "no node ids found in nodes/"
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    definitions = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    assert pages == ids
    assert set(definitions) == ids


@pytest.mark.parametrize("reference", ["tests/test_docs.py::no_such_name", "tests/no_such_file.py::name"])
def test_a_wrong_reference_is_found(reference):
    assert unresolved(reference)


def test_a_path_with_alternatives_is_spelled_out():
    assert expand("models/{a,b}/{c,d}.md") == ["models/a/c.md", "models/a/d.md", "models/b/c.md", "models/b/d.md"]
    assert not exists("docs/no_such_page.md")
