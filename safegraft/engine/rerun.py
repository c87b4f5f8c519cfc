"""Runs the realignment that a report describes again, and says whether the same bytes come out."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.bundle import read_manifest
from safegraft.contracts.report import Report
from safegraft.engine.pipeline import realign, versions
from safegraft.engine.reference import LoadedReference
from safegraft.files import sha256_file
from safegraft.ingest import companions_of


@dataclass
class Rerun:
    """problems: what is not as the report says; differences: of the environment, which may explain them."""

    problems: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def rerun(
    claimed: Report,
    adapter: Path,
    reference: Path,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Rerun:
    """Compares input, reference, measurements and output. Bytes are promised for one device type and torch version."""
    companions_of(adapter)  # before anything of it is hashed: what is no file may have no end
    found = Rerun()
    here = versions()
    for name, version in claimed.environment.versions.items():
        if here.get(name) != version:
            found.differences.append(f"{name} {version} ran then, {here.get(name)} runs now.")
    if claimed.environment.device != device:
        found.differences.append(f"It ran on {claimed.environment.device} then, on {device} now.")
    sent, used = sha256_file(adapter / WEIGHTS), read_manifest(reference)[1]
    if sent != claimed.input.sha256:
        found.problems.append(f"The adapter's SHA-256 is {sent}, the report's input {claimed.input.sha256}.")
    if used != claimed.reference.sha256:
        found.problems.append(f"The reference's SHA-256 is {used}, the report's {claimed.reference.sha256}.")
    config = sha256_file(adapter / CONFIG)
    if claimed.input.config_sha256 not in (None, config):
        found.problems.append(
            f"The configuration's SHA-256 is {config}, the report's input had {claimed.input.config_sha256}."
        )
    if found.problems:
        return found
    with tempfile.TemporaryDirectory(prefix="safegraft-") as work:
        again = realign(
            adapter,
            LoadedReference(reference, device),
            claimed.method.parameters,
            Path(work) / "out" if claimed.mode == "patch" else None,
            strengths=[variant.strength for variant in claimed.variants],
            output_rank=claimed.output_rank,
            progress=progress,
        )
    for part in ("lineage", "summary", "layers", "modules", "output", "variants", "side_cars"):
        if getattr(again, part) != getattr(claimed, part):
            found.problems.append(f"`{part}` is not what the report says.")
    return found
