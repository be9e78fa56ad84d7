"""Write what the pages of docs/ take from the code: the tree of files, and the server's limits.

In the tree a Python file's line is the first of its docstring, a C++ file's its first sentence, and
a folder's that of its ``__init__.py``.

    python scripts/doc_parts.py            write both
    python scripts/doc_parts.py --check    exit with 1 if a page holds something else
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from echelon.server.limits import described, flag_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/echelon"
SUFFIXES = (".py", ".cpp", ".h")
SUMMARY_COLUMN = 30


def tree() -> str:
    """The files of the package, each with what it says it holds."""
    return "```\n" + "\n".join(lines(PACKAGE)) + "\n```"


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


def sources(folder: Path) -> list[Path]:
    """Files and folders of a folder that hold code: files first, each kind by name."""
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]
    found = [path for path in found if path.name != "__init__.py"]
    folders = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
    return sorted(found) + sorted(folders)


def summary(file: Path) -> str:
    """The first line of a file's docstring, or the first sentence of its opening comment."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        comment = text[: text.index("\n//\n")].removeprefix("// ").replace("\n// ", " ")
        return comment.partition(". ")[0]
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def line(name: str, text: str, depth: int) -> str:
    """One entry; the summaries of all entries begin in the same column."""
    return f"{'  ' * depth + name:<{SUMMARY_COLUMN}} {text}".rstrip()


def limits() -> str:
    """The server's limits: flag, default, what it bounds, and the reason for the default."""
    rows = [
        f"| `{flag_of(name)}` | {default:,.10g} | {bounds.removesuffix('.')} | {reason} |"
        for name, default, bounds, reason in described()
    ]
    return "\n".join(["| flag | default | bounds | reason |", "|---|---|---|---|", *rows])


PARTS = {"docs/ARCHITECTURE.md": tree, "docs/SERVING.md": limits}
"""Each page, and its part, which stands between two comments."""


def main() -> int:
    """Write the parts, or compare them with ``--check``."""
    wrong = 0
    for name, part in PARTS.items():
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        begin = f"<!-- {part.__name__}: written by scripts/doc_parts.py (make docs) -->"
        end = f"<!-- end of {part.__name__} -->"
        before, _, rest = page.partition(begin)
        fresh = f"{before}{begin}\n\n{part()}\n\n{end}{rest.partition(end)[2]}"
        if "--check" not in sys.argv[1:]:
            path.write_text(fresh, encoding="utf-8")
        elif fresh != page:
            wrong = 1
            print(f"{name} differs from what the code says. Run: make docs", file=sys.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
