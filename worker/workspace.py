"""A scratch folder for one attempt: the customer's files in, results out, always removed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safegraft.stores.jobs import Claim
from safegraft.stores.objects import Objects


@dataclass(frozen=True)
class Workspace:
    adapter: Path
    result: Path
    report: Path


@contextmanager
def workspace(objects: Objects, claim: Claim, adapter_prefix: str) -> Iterator[Workspace]:
    """On the object store's own disk, so that publishing is a rename."""
    objects.scratch.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(dir=objects.scratch, prefix=f"{claim.id}-{claim.attempt}-"))
    try:
        objects.fetch(adapter_prefix, root / "adapter")
        (root / "report").mkdir()
        yield Workspace(root / "adapter", root / "result", root / "report")
    finally:
        shutil.rmtree(root, ignore_errors=True)
