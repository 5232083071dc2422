"""The tree itself: lines that fit, small modules, nothing dead, nothing of one machine, all of it documented."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = (".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".h", ".hip")
COLUMNS, LINES, LONGEST = 120, 500, 1000

LONG_FILES = {
    "fomoe_io/_hip.pyx": "every object of the driver once",
    "tests/cli/test_layout_hostile.py": "a list of attacks on stores",
    "tests/fake_hip/fake_hip.c": "a driver's whole face",
}
"""Longer than LINES, and why; at most LONGEST."""

HAND_LAID_COLUMNS = 145
"""Of C that clang-format leaves alone (.clang-format-ignore)."""


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


TRACKED = _tracked() if (ROOT / ".git").exists() else []


def _files(*suffixes: str) -> Iterator[tuple[str, list[str]]]:
    if not TRACKED:
        pytest.skip("not a git checkout")
    for name in TRACKED:
        if name.endswith(suffixes):
            yield name, (ROOT / name).read_text().splitlines()


def test_lines_fit() -> None:
    """Of documents, tables and what a reader's editor wraps are not measured."""
    hand_laid = [line for line in (ROOT / ".clang-format-ignore").read_text().splitlines() if line[:1] not in ("", "#")]
    wide = []
    for name, lines in _files(*CODE, "Makefile", ".yaml"):
        most = HAND_LAID_COLUMNS if any(fnmatch(name, pattern) for pattern in hand_laid) else COLUMNS
        # as ruff: a comment to a tool does not count
        lines = [re.sub(r"  # (type: ignore|noqa|fmt: skip).*", "", line) for line in lines]
        wide += [f"{name}:{i}: {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > most]
    assert not wide, "\n".join(wide)


def test_modules_are_small() -> None:
    lengths = {name: len(lines) for name, lines in _files(*CODE)}
    long = {name: count for name, count in lengths.items() if count > LINES}
    too_long = [f"{name}: {count} lines" for name, count in long.items() if name not in LONG_FILES or count > LONGEST]
    assert not too_long, "\n".join(too_long)
    assert set(LONG_FILES) <= set(long), f"no longer long: {set(LONG_FILES) - set(long)}"


def test_nothing_is_dead() -> None:
    """Each file is named by another: imported, included, linked, run or told of."""
    texts = {name: "\n".join(lines) for name, lines in _files(*CODE, ".md", ".toml", ".yaml", "Makefile", "run")}
    words = {name: set(re.findall(r"\w+", text)) for name, text in texts.items()}
    patterns = [Path(p).parent.as_posix() for p in re.findall(r'"([a-z]+/\*\.c)"', texts["setup.py"])]
    dead = []
    for name in texts:
        path = Path(name)
        if path.suffix not in CODE or path.stem in ("__init__", "conftest", "setup") or path.stem.startswith("test_"):
            continue
        if path.suffix in (".pyi", ".pxd") and (ROOT / path.with_suffix(".pyx")).exists():
            continue  # the face of an extension
        if path.suffix == ".c" and any(name.startswith(f"fomoe_io/csrc/{folder}/") for folder in patterns):
            continue
        if not any(path.stem in found for other, found in words.items() if other != name):
            dead.append(name)
    assert not dead, "nobody names " + ", ".join(dead)


def test_nothing_is_of_one_machine() -> None:
    """Paths of a home directory or a workplace; examples in documents are /nvme0, /mnt and the like."""
    found = []
    for name, lines in _files(
        *CODE, ".md", ".toml", ".yaml", ".sh", "Makefile", "run", "system-packages", "test-build"
    ):
        for i, line in enumerate(lines, 1):
            if re.search(r"(?<![\w.])/(home|root|Users|work)/\w", line) and name != "tests/test_tidy.py":
                found.append(f"{name}:{i}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def _public(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{node.name}.")


def test_what_is_public_is_documented() -> None:
    """Modules, classes and functions of the package and the tools; a protocol's methods need none."""
    bare = []
    for name, lines in _files(".py"):
        if not name.startswith(("fomoe_io/", "layout_tool/", "tools/", "bench/", "setup.py")) or not lines:
            continue
        tree = ast.parse("\n".join(lines))
        if ast.get_docstring(tree) is None:
            bare.append(name)
        for what, node in _public(tree):
            assert isinstance(node, ast.FunctionDef | ast.ClassDef)
            is_declared_only = all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in node.body)
            if ast.get_docstring(node) is None and not is_declared_only:
                bare.append(f"{name}:{node.lineno}: {what}")
    assert not bare, "\n".join(bare)


def test_headers_say_what_they_promise() -> None:
    """A header begins with a comment."""
    bare = [n for n, lines in _files(".h") if n.startswith("fomoe_io/") and not lines[0].startswith(("/*", "//"))]
    assert not bare, ", ".join(bare)
