"""The package as it was at a commit, under another name, so that both can take turns in one process."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from pathlib import Path

__all__ = ["EARLIER", "put_earlier"]

EARLIER = "earlier_distplb"
ROOT = Path(__file__).parents[2]
PACKAGE = "distplb"


def put_earlier(commit: str, folder: Path, root: Path = ROOT) -> None:
    """Write the package of a commit into a folder, as the package `EARLIER`.

    Args:
        commit: what git knows it by.
        folder: where it goes; put it on `sys.path` to import it.
        root: of the checkout.

    Raises:
        SystemExit: if git knows no such commit, or it has no package.
    """
    done = subprocess.run(["git", "archive", commit, PACKAGE], cwd=root, capture_output=True)
    if done.returncode:
        raise SystemExit(f"--against {commit}: {done.stderr.decode().strip()}; pass a commit of this checkout")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is None or not member.name.endswith(".py"):
                continue
            path = folder / EARLIER / Path(member.name).relative_to(PACKAGE)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(re.sub(rf"\b{PACKAGE}\b", EARLIER, file.read().decode()))
