"""Write the tree of the package into docs/ARCHITECTURE.md: each file with what it says it holds.

A Python file's line is the first of its docstring, a C++ file's its first sentence. A folder's
line is that of its ``__init__.py``.

    python scripts/tree.py            write the tree
    python scripts/tree.py --check    exit with 1 if the page holds another tree
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/echelon"
PAGE = ROOT / "docs/ARCHITECTURE.md"
BEGIN = "<!-- tree: written by scripts/tree.py (make docs) -->"
END = "<!-- end of tree -->"
SUFFIXES = (".py", ".cpp", ".h")
SUMMARY_COLUMN = 30


def summary(file: Path) -> str:
    """The first line of a file's docstring, or the first sentence of its opening comment."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        comment = text[: text.index("\n//\n")].removeprefix("// ").replace("\n// ", " ")
        return comment.partition(". ")[0]
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def sources(folder: Path) -> list[Path]:
    """Files and folders of a folder that hold code: files first, each kind by name."""
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]
    found = [path for path in found if path.name != "__init__.py"]
    folders = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
    return sorted(found) + sorted(folders)


def lines(folder: Path, depth: int = 0) -> list[str]:
    """Lines of a folder and of all below it."""
    name = "src/echelon" if folder == PACKAGE else folder.name
    found = [line(f"{name}/", summary(folder / "__init__.py"), depth)]
    for path in sources(folder):
        if path.is_dir():
            found += lines(path, depth + 1)
        else:
            found.append(line(path.name, summary(path), depth + 1))
    return found


def line(name: str, text: str, depth: int) -> str:
    """One entry; the summaries of all entries begin in the same column."""
    return f"{'  ' * depth + name:<{SUMMARY_COLUMN}} {text}".rstrip()


def page_with_tree(page: str) -> str:
    """The page with the tree of the package as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tree = "\n".join(lines(PACKAGE))
    return f"{before}{BEGIN}\n\n```\n{tree}\n```\n\n{END}{after}"


def main() -> int:
    """Write the tree, or compare it with ``--check``."""
    page = PAGE.read_text(encoding="utf-8")
    fresh = page_with_tree(page)
    if "--check" in sys.argv[1:]:
        if fresh != page:
            print(f"{PAGE.relative_to(ROOT)} holds another tree. Run: make docs", file=sys.stderr)
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
