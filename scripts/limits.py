"""Write the table of the server's limits into docs/SERVING.md, from what the code says of them.

python scripts/limits.py            write the table
python scripts/limits.py --check    exit with 1 if the page holds another table
"""

from __future__ import annotations

import sys
from pathlib import Path

from echelon.server.limits import described, flag_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/SERVING.md"
BEGIN = "<!-- limits: written by scripts/limits.py (make docs) -->"
END = "<!-- end of limits -->"


def table() -> str:
    """The limits, each with its flag, default, what it bounds, and why its default is that."""
    rows = [
        f"| `{flag_of(name)}` | {default:,.10g} | {bounds.removesuffix('.')} | {reason} |"
        for name, default, bounds, reason in described()
    ]
    return "\n".join(["| flag | default | bounds | reason |", "|---|---|---|---|", *rows])


def main() -> int:
    """Write the table, or compare it with ``--check``."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    fresh = f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"
    if "--check" in sys.argv[1:]:
        if fresh != page:
            print(f"{PAGE.relative_to(ROOT)} holds another table. Run: make docs", file=sys.stderr)
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
