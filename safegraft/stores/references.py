"""The operator's registry: one folder a bundle, named by the bundle's id. Added and listed without a restart."""

import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safegraft.adapter import AdapterDescription
from safegraft.bundle import MANIFEST, read_manifest, reference_id, verify_bundle
from safegraft.compatibility import check_base
from safegraft.contracts.reference import ReferenceManifest
from safegraft.errors import CorruptReference, Incompatible, InvalidParameter, NotFound, UserError
from safegraft.files import atomic_folder

ID = re.compile(r"ref_[0-9a-f]{24}")


@dataclass(frozen=True)
class Installed:
    id: str
    sha256: str
    folder: Path
    manifest: ReferenceManifest


class ReferenceRegistry:
    def __init__(self, root: Path) -> None:
        self._root = root

    def installed(self) -> list[Installed]:
        """Newest first. A folder whose manifest cannot be read is left out: it is not installed."""
        found = []
        for manifest in sorted(self._root.glob(f"ref_*/{MANIFEST}")):
            try:
                found.append(self._read(manifest.parent))
            except CorruptReference:
                continue
        return sorted(found, key=lambda item: (item.manifest.created_at, item.id), reverse=True)

    def get(self, wanted: str) -> Installed:
        """Raises NotFound (`reference_not_found`)."""
        folder = self._root / wanted
        if not ID.fullmatch(wanted) or not (folder / MANIFEST).is_file():
            raise NotFound(
                f"There is no reference {wanted[:80]!r}.",
                code="reference_not_found",
                param="reference_id",
                hint="GET /v1/references lists those that are installed.",
            )
        return self._read(folder)

    def add(self, folder: Path) -> Installed:
        """Verifies a bundle and copies it in. Adding it again changes nothing."""
        if not (folder / MANIFEST).is_file():
            raise InvalidParameter(f"{folder} holds no {MANIFEST}; it is no reference.", code="not_a_reference")
        manifest = verify_bundle(folder)
        _, sha256 = read_manifest(folder)
        target = self._root / reference_id(sha256)
        if not target.exists():
            # Another process may add the same bundle at the same time: the same bytes, so either will do.
            with suppress(FileExistsError), atomic_folder(target) as beside:
                for name in [MANIFEST, *manifest.files]:
                    # Not linked: whoever edits the bundle that was built must not change the one in use.
                    shutil.copyfile(folder / name, beside / name)
        return self._read(target)

    def remove(self, wanted: str) -> None:
        """Uninstalls a reference. Raises NotFound."""
        folder = self.get(wanted).folder
        # Renamed first: nobody finds half of one.
        gone = folder.with_name(f".removed-{folder.name}-{secrets.token_hex(4)}")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def choose(self, adapter: AdapterDescription, default: str | None = None) -> Installed:
        """The installed reference whose base model has every module of the adapter.

        Of several, those that know the adapter's base label count before the others, and of these the one whose id is
        `default`. Raises Incompatible where none fits (with the reason of the only one there is), or where more than
        one fits equally.
        """
        installed = self.installed()
        fitting, reasons = [], []
        for item in installed:
            try:
                check_base(adapter, item.manifest)
                fitting.append(item)
            except UserError as error:
                reasons.append(error)
        if not fitting:
            if len(installed) == 1:
                raise reasons[0]
            raise Incompatible(
                f"None of the {len(installed)} installed references fits this adapter.",
                code="no_matching_reference",
                param="reference_id",
                hint="GET /v1/references lists them." if installed else "The operator has installed none yet.",
            )
        labelled = [i for i in fitting if adapter.config.base_model_name_or_path in i.manifest.base_model.labels]
        best = labelled or fitting
        best = [item for item in best if item.id == default] or best
        if len(best) > 1:
            raise Incompatible(
                f"{len(best)} installed references fit this adapter: {', '.join(item.id for item in best)}.",
                code="reference_ambiguous",
                param="reference_id",
                hint="Name one as reference_id.",
            )
        return best[0]

    def _read(self, folder: Path) -> Installed:
        manifest, sha256 = read_manifest(folder)
        if folder.name != reference_id(sha256):
            raise CorruptReference(f"{folder / MANIFEST} is not the manifest that was added.", param=folder.name)
        return Installed(folder.name, sha256, folder, manifest)
