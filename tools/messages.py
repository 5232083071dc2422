"""Every error that the code can raise, as a page: mkdocs makes docs/messages.md of it (mkdocs.yml, hooks).

python tools/messages.py        prints the page
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {
    "UsageError": "arguments that do not go together",
    "FormatError": "a GGUF that is damaged, hostile or of an unsupported kind",
    "StoreError": "a store that is damaged, incomplete or of another model",
    "BudgetError": "a memory budget that is too small",
    "ReadError": "a read that failed while the model was running",
    "DeviceError": "a GPU or its driver refused a call",
    "ComputeError": "what a model computed is no number",
}
HEAD = """# Every message

Made from the code: each error's text, `…` for what differs, and its `fix:`. What to do about the common ones is said
at more length under [Troubleshooting](troubleshooting.md).
"""


@dataclass(frozen=True, order=True)
class Message:
    """One `raise` of the code, or one that is made to be raised."""

    kind: str
    text: str
    fix: str


def text_of(node: ast.expr | None) -> str:
    """A string of the code, with … for what is filled in."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body) or text_of(node.orelse)
    return "…"


def messages(root: Path = ROOT) -> list[Message]:
    """All of them, each once."""
    found = set()
    for folder in ("fomoe_io", "layout_tool"):
        for path in sorted((root / folder).rglob("*.py")):
            found |= set(_of_module(ast.parse(path.read_text())))
    return sorted(found)


def _of_module(tree: ast.Module) -> Iterator[Message]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in ERRORS:
            continue
        text = " ".join(text_of(node.args[0] if node.args else None).split())
        hints = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
        fix = " ".join(text_of(hints[0] if hints else None).split())
        if text.strip("… "):
            yield Message(node.func.id, text, fix)


def page(root: Path = ROOT) -> str:
    """Markdown: a table of each kind."""
    lines = [HEAD]
    every = messages(root)
    for kind, about in ERRORS.items():
        lines += [f"## {kind}: {about}", "", "| message | fix |", "|---|---|"]
        lines += [f"| `{_cell(m.text)}` | {f'`{_cell(m.fix)}`' if m.fix else ''} |" for m in every if m.kind == kind]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def on_files(files: object, config: object) -> object:
    """mkdocs' hook: one more page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "messages.md", content=page()))  # type: ignore[attr-defined,arg-type]
    return files


if __name__ == "__main__":
    print(page())
