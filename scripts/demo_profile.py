"""Measure the demo model anew: examples/demo-profile.json and the README's chart, docs/tune.png.

Run it on a machine that does nothing else: both show what `echelon tune demo` says of that machine.
The chart is cut out of the report by the system's Chromium; nothing is downloaded but the model.

    python scripts/demo_profile.py                    measure, then draw
    python scripts/demo_profile.py --time-limit 20    a shorter measurement, to try it out
    python scripts/demo_profile.py --draw             draw the profile that is there

Afterwards docs/DEPLOY.md and docs/DEPLOY.zh.md quote an older plan: run the commands there again.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "examples/demo-profile.json"
PICTURE = ROOT / "docs/tune.png"

CHARTS = ("throughput-batch_size", "latency-batch_size")
"""The report's charts that stand beside each other in the picture."""

WIDTH = 1240
"""Width of the page in pixels: two charts beside each other."""

COLOURS = 64
"""Colours of the picture: lines and letters need no more, and the file is a third as large."""


def main() -> None:
    """Measure, unless a profile is to be drawn, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--time-limit", type=float, help="seconds of the measurements")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="the profile")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the chart, PNG")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.html")
        if asked.draw:
            echelon("report", "show", asked.profile, "--output", report, "--quiet")
        else:
            limit = [] if asked.time_limit is None else ["--time-limit", asked.time_limit]
            echelon("tune", "demo", "--profile", asked.profile, "--report", report, *limit)
        asked.picture.write_bytes(smaller(cut_out(report)))
    print(f"Written: {asked.picture}" + ("" if asked.draw else f", {asked.profile}"))


def echelon(*arguments: object) -> None:
    """Run the command line of this checkout."""
    command = [sys.executable, "-m", "echelon", *map(str, arguments)]
    subprocess.run(command, check=True)  # noqa: S603 - our own command


def cut_out(report: Path) -> bytes:
    """The charts of a report, as PNG."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        sys.exit("There is no chromium (on Debian: apt install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, color_scheme="light")
        page.goto(report.as_uri())
        parts = [page.locator(f"figure:has(#{name}) h3, #{name}") for name in CHARTS]
        if not all(page.locator(f"#{name}").count() for name in CHARTS):
            sys.exit("The profile has no measured batch sizes to draw: raise --time-limit.")
        for name in CHARTS:
            page.wait_for_selector(f"#{name} .xtick >> nth=0")
        boxes = [part.bounding_box() for found in parts for part in found.all()]
        return page.screenshot(clip=around([box for box in boxes if box]), full_page=True)


def around(boxes: list[Any]) -> Any:
    """The smallest area that holds all boxes, each with ``x``, ``y``, ``width`` and ``height``."""
    left, top = (min(box[side] for box in boxes) for side in ("x", "y"))
    right = max(box["x"] + box["width"] for box in boxes)
    bottom = max(box["y"] + box["height"] for box in boxes)
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def smaller(picture: bytes) -> bytes:
    """The picture in few colours."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    main()
