"""The operator's registry: one folder a bundle, named by the bundle's id. Added and listed without a restart.

On one machine the folders lie in the data folder. Where bytes lie in an object store, bundles do too, and each worker
keeps copies of those that it uses.
"""

import fcntl
import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safegraft.adapter import AdapterDescription
from safegraft.bundle import MANIFEST, RESTORE, parse_manifest, read_manifest, reference_id, verify_bundle
from safegraft.compatibility import check_base
from safegraft.contracts.reference import ReferenceManifest
from safegraft.errors import CorruptReference, Incompatible, InvalidParameter, NotFound, StorageFault, UserError
from safegraft.files import atomic_folder, sync_folder, sync_tree
from safegraft.settings import SharedSettings
from safegraft.stores.objects import Objects, open_objects

log = logging.getLogger("safegraft.references")
ID = re.compile(r"ref_[0-9a-f]{24}")
SHARED = "references"
# So long a list of what lies in the object store is believed. Manifests never change under an id.
LIST_SECONDS = 5.0


@dataclass(frozen=True)
class Installed:
    """`folder` is where the bundle's files lie on this machine, or will lie: see `ReferenceRegistry.folder`."""

    id: str
    sha256: str
    folder: Path
    manifest: ReferenceManifest


class ReferenceRegistry:
    """Bundles in a local folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._left_out: set[str] = set()

    def installed(self) -> list[Installed]:
        """Newest first. A bundle whose manifest cannot be read is left out: it is not installed."""
        found = []
        for name in self._names():
            try:
                found.append(self._installed(name))
                self._left_out.discard(name)
            except NotFound:
                continue  # removed while we look, or still being added
            except CorruptReference as error:
                if name not in self._left_out:  # said once: whoever waits for readiness asks every second
                    log.warning("%s is left out: %s", name, error)
                self._left_out.add(name)
        return sorted(found, key=lambda item: (item.manifest.created_at, item.id), reverse=True)

    def get(self, wanted: str) -> Installed:
        """Raises NotFound (`reference_not_found`), CorruptReference."""
        if not ID.fullmatch(wanted):
            raise _no_reference(wanted)
        return self._installed(wanted)

    def manifest(self, wanted: str) -> bytes:
        """The manifest as it was written: its SHA-256 is the bundle's identity. Raises NotFound."""
        return (self.get(wanted).folder / MANIFEST).read_bytes()

    def folder(self, wanted: str) -> Path:
        """Where its files lie on this machine; they are brought here first where they are elsewhere.

        Raises NotFound, CorruptReference.
        """
        return self.get(wanted).folder

    def discard_copy(self, wanted: str) -> None:
        """To be told that the files in `folder` are broken: where they are a copy, the next use brings a new one."""

    def check(self) -> None:
        """Re-hashes every bundle that lies on this machine; one that is removed meanwhile counts for nothing.

        Raises CorruptReference: the first file that is missing, differs, or belongs to no bundle. What another version
        of safegraft wrote is no fault: it is left out, as by `installed`.
        """
        for folder in sorted(self._root.glob("ref_*")):
            if ID.fullmatch(folder.name) is None:
                continue
            try:
                self._check(folder)
            except (CorruptReference, FileNotFoundError) as error:
                if folder.exists() and getattr(error, "code", "") != "reference_version":
                    raise

    def _check(self, folder: Path) -> None:
        if not (folder / MANIFEST).is_file():
            raise CorruptReference(
                f"{folder / MANIFEST} is missing: a manifest whose SHA-256 begins with {folder.name[4:]} was added.",
                param=str(folder / MANIFEST),
                hint=RESTORE,
            )
        self._read(folder)
        verify_bundle(folder, alone=True)

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

    def _names(self) -> Iterable[str]:
        """The ids of all bundles, readable or not."""
        return [path.parent.name for path in sorted(self._root.glob(f"ref_*/{MANIFEST}"))]

    def _installed(self, name: str) -> Installed:
        """Raises NotFound, CorruptReference."""
        if not (self._root / name / MANIFEST).is_file():
            raise _no_reference(name)
        return self._read(self._root / name)

    def _read(self, folder: Path) -> Installed:
        return _checked(folder, read_manifest(folder), str(folder / MANIFEST))


class SharedReferences(ReferenceRegistry):
    """Bundles in the object store, for several machines; the local folder holds copies of those in use here."""

    def __init__(self, root: Path, objects: Objects, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(root)
        self._objects = objects
        self._clock = clock
        self._listed: tuple[float, frozenset[str]] | None = None
        self._known: dict[str, Installed] = {}

    def add(self, folder: Path) -> Installed:
        """Verifies a bundle, copies it to this machine's folder and uploads it. Adding it again changes nothing."""
        added = super().add(folder)
        place = f"{SHARED}/{added.id}"
        # The manifest last: what has none is not installed, so nobody ever sees half a bundle.
        for name in [*added.manifest.files, MANIFEST]:
            path = added.folder / name
            if not self._holds(place, name, path.stat().st_size):
                with path.open("rb") as source:
                    self._objects.put(place, name, source)
        self._listed = None
        return added

    def remove(self, wanted: str) -> None:
        self.get(wanted)
        self._objects.remove(f"{SHARED}/{wanted}")
        self.discard_copy(wanted)
        self._known.pop(wanted, None)
        self._listed = None

    def manifest(self, wanted: str) -> bytes:
        self.get(wanted)
        return self._raw_manifest(wanted)

    def folder(self, wanted: str) -> Path:
        target = self.get(wanted).folder
        with self._bringing(wanted) as beside:
            if not self._is_copy(target):
                shutil.rmtree(target, ignore_errors=True)
                log.info("%s: downloading", wanted)
                self._objects.fetch(f"{SHARED}/{wanted}", beside)
                verify_bundle(beside)
                sync_tree(beside)
                beside.rename(target)
                sync_folder(self._root)
        return target

    def check(self) -> None:
        """Copies that broke are thrown away: the next use brings new ones, and verifies them."""
        for folder in sorted(self._root.glob("ref_*")):
            try:
                self._check(folder)
            except CorruptReference as error:
                log.warning("%s: this machine's copy is thrown away: %s", folder.name, error)
                self.discard_copy(folder.name)

    def discard_copy(self, wanted: str) -> None:
        if ID.fullmatch(wanted):
            with self._bringing(wanted):
                shutil.rmtree(self._root / wanted, ignore_errors=True)

    def _names(self) -> Iterable[str]:
        now = self._clock()
        if self._listed is None or now - self._listed[0] > LIST_SECONDS:
            try:
                places = [place for place, _ in self._objects.prefixes(SHARED)]
            except StorageFault as error:
                if self._listed is None:
                    raise
                log.warning("references could not be listed; the list from before stays (%s)", error)
                self._listed = (now, self._listed[1])
            else:
                names = (place.rpartition("/")[2] for place in places)
                self._listed = (now, frozenset(name for name in names if ID.fullmatch(name)))
        return sorted(self._listed[1])

    def _installed(self, name: str) -> Installed:
        # What is not listed was removed, or is newer than the list.
        known = self._known.get(name) if name in self._names() else None
        if known is None:
            where = f"{SHARED}/{name}/{MANIFEST}"
            known = _checked(self._root / name, parse_manifest(self._raw_manifest(name), where), where)
            self._known[name] = known
        return known

    def _raw_manifest(self, name: str) -> bytes:
        try:
            with self._objects.open(f"{SHARED}/{name}", MANIFEST) as file:
                return file.read()
        except NotFound as error:
            raise _no_reference(name) from error

    def _holds(self, place: str, name: str, size: int) -> bool:
        try:
            return self._objects.size(place, name) == size
        except NotFound:
            return False

    def _is_copy(self, target: Path) -> bool:
        """Whether a bundle of that id lies there. That its files are whole is checked where they are loaded."""
        try:
            self._read(target)
            return True
        except CorruptReference:
            return False

    @contextmanager
    def _bringing(self, name: str) -> Iterator[Path]:
        """One process of this machine at a time; yields a folder that is not there yet and is gone afterwards."""
        self._root.mkdir(parents=True, exist_ok=True)
        beside = self._root / f".{name}"
        with (self._root / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(beside, ignore_errors=True)  # a killed process left it
            try:
                yield beside
            finally:
                shutil.rmtree(beside, ignore_errors=True)


def open_references(settings: SharedSettings, objects: Objects | None = None) -> ReferenceRegistry:
    """The registry that the settings name: shared where bytes lie in an object store. `objects`: opened already."""
    if not settings.storage_url:
        return ReferenceRegistry(settings.references)
    return SharedReferences(settings.references, objects or open_objects(settings))


def _checked(folder: Path, found: tuple[ReferenceManifest, str], where: str) -> Installed:
    manifest, sha256 = found
    if folder.name != reference_id(sha256):
        raise CorruptReference(
            f"{where} is not the manifest that was added: its SHA-256 is {sha256}, and should begin with "
            f"{folder.name[4:]}.",
            param=where,
            hint=RESTORE,
        )
    return Installed(folder.name, sha256, folder, manifest)


def _no_reference(wanted: str) -> NotFound:
    return NotFound(
        f"There is no reference {wanted[:80]!r}.",
        code="reference_not_found",
        param="reference_id",
        hint="GET /v1/references and `safegraft reference list` tell which are installed.",
    )
