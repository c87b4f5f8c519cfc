"""References in the object store: added on one machine, found and used on others without a restart."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from safegraft.bundle import MANIFEST
from safegraft.engine.reference import LoadedReference
from safegraft.errors import CorruptReference, NotFound, StorageFault
from safegraft.settings import SharedSettings
from safegraft.stores.objects import Objects, open_objects
from safegraft.stores.references import LIST_SECONDS, ReferenceRegistry, SharedReferences, open_references
from tests.stores.test_references import make, tree

NAME = "nlsr.safetensors"


class Machines:
    """Several machines with one bucket, and a clock for all of them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.now = 0.0

    def objects(self, name: str) -> Objects:
        return open_objects(SharedSettings(data=self.folder / name, storage_url=self.url))

    def registry(self, name: str) -> SharedReferences:
        return SharedReferences(self.folder / name / "references", self.objects(name), clock=lambda: self.now)

    def wait(self) -> None:
        self.now += LIST_SECONDS + 1


@pytest.fixture
def machines(tmp_path: Path, storage_url: Callable[[], str]) -> Machines:
    return Machines(tmp_path / "machines", storage_url())


def test_the_settings_decide(tmp_path: Path, storage_url: Callable[[], str]) -> None:
    assert type(open_references(SharedSettings(data=tmp_path, storage_url=""))) is ReferenceRegistry
    shared = open_references(SharedSettings(data=tmp_path, storage_url=storage_url()))
    assert isinstance(shared, SharedReferences)
    assert shared.installed() == []


def test_what_one_machine_adds_the_others_find(machines: Machines, tmp_path: Path) -> None:
    operator, gateway, worker = (machines.registry(name) for name in ("operator", "gateway", "worker"))
    assert gateway.installed() == worker.installed() == []
    added = operator.add(make(tmp_path / "a"))
    # Asked for by its id it is there at once; the list is a few seconds old at most.
    assert gateway.get(added.id).manifest == added.manifest
    assert operator.installed() == [added]
    assert gateway.installed() == []
    machines.wait()
    assert [item.id for item in gateway.installed()] == [added.id]
    assert gateway.get(added.id).sha256 == added.sha256
    assert gateway.manifest(added.id) == (tmp_path / "a" / MANIFEST).read_bytes()
    # A gateway needs no more than the manifest; a worker takes the files.
    assert not gateway.get(added.id).folder.exists()
    assert tree(worker.folder(added.id)) == tree(tmp_path / "a")
    assert [path.name for path in worker.folder(added.id).parent.iterdir() if path.is_dir()] == [added.id]


def test_a_real_bundle_is_loaded_where_it_was_not_built(machines: Machines, bundle: Path) -> None:
    added = machines.registry("operator").add(bundle)
    assert LoadedReference(machines.registry("worker").folder(added.id)).id == added.id


def test_an_unknown_reference_is_not_found(machines: Machines, tmp_path: Path) -> None:
    registry = machines.registry("gateway")
    for wanted in ("ref_" + "0" * 24, "ref_", "..", "", "ref_*", "ref_\0"):
        for ask in (registry.get, registry.folder, registry.manifest):
            with pytest.raises(NotFound) as caught:
                ask(wanted)
            assert caught.value.code == "reference_not_found"
        registry.discard_copy(wanted)


def test_what_is_removed_from_the_bucket_is_gone_everywhere(machines: Machines, tmp_path: Path) -> None:
    added = machines.registry("operator").add(make(tmp_path / "a"))
    gateway, worker = machines.registry("gateway"), machines.registry("worker")
    assert [item.id for item in gateway.installed()] == [added.id]
    worker.folder(added.id)
    machines.objects("operator").remove(f"references/{added.id}")
    machines.wait()
    assert gateway.installed() == []
    for registry in (gateway, worker):
        with pytest.raises(NotFound):
            registry.folder(added.id)


def test_half_an_upload_is_not_installed_and_adding_again_completes_it(machines: Machines, tmp_path: Path) -> None:
    source = make(tmp_path / "a")
    added = machines.registry("operator").add(source)
    objects = machines.objects("operator")
    objects.remove(f"references/{added.id}")
    with (source / NAME).open("rb") as file:
        objects.put(f"references/{added.id}", NAME, file)
    machines.wait()
    gateway = machines.registry("gateway")
    assert gateway.installed() == []
    machines.registry("operator").add(source)
    assert gateway.get(added.id).id == added.id
    assert machines.registry("worker").folder(added.id).is_dir()


def test_adding_again_sends_nothing(machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = machines.registry("operator")
    first = registry.add(make(tmp_path / "a"))

    def put(*_: object) -> None:
        raise AssertionError("sent again")

    monkeypatch.setattr(registry._objects, "put", put)
    assert registry.add(make(tmp_path / "b")) == first


def test_a_corrupt_bundle_in_the_bucket_never_becomes_a_copy(machines: Machines, tmp_path: Path) -> None:
    added = machines.registry("operator").add(make(tmp_path / "a"))
    (tmp_path / "bad").write_bytes(b"weightz")
    with (tmp_path / "bad").open("rb") as file:
        machines.objects("operator").put(f"references/{added.id}", NAME, file)
    worker = machines.registry("worker")
    with pytest.raises(CorruptReference):
        worker.folder(added.id)
    assert [path for path in (machines.folder / "worker" / "references").iterdir() if path.is_dir()] == []


def test_a_broken_copy_is_replaced(machines: Machines, tmp_path: Path) -> None:
    added = machines.registry("operator").add(make(tmp_path / "a"))
    worker = machines.registry("worker")
    (worker.folder(added.id) / NAME).write_bytes(b"weightz")
    worker.discard_copy(added.id)
    assert tree(worker.folder(added.id)) == tree(tmp_path / "a")
    # A manifest tells by itself that it is not the right one.
    (worker.folder(added.id) / MANIFEST).write_bytes(b"{}")
    assert tree(worker.folder(added.id)) == tree(tmp_path / "a")


def test_the_originals_of_one_machine_are_never_discarded(tmp_path: Path) -> None:
    registry = ReferenceRegistry(tmp_path / "references")
    added = registry.add(make(tmp_path / "a"))
    registry.discard_copy(added.id)
    assert registry.folder(added.id) == added.folder
    assert tree(added.folder) == tree(tmp_path / "a")


def test_what_a_killed_download_left_is_cleared(machines: Machines, tmp_path: Path) -> None:
    added = machines.registry("operator").add(make(tmp_path / "a"))
    worker = machines.registry("worker")
    left = machines.folder / "worker" / "references" / f".{added.id}"
    left.mkdir(parents=True)
    (left / NAME).write_bytes(b"half")
    assert tree(worker.folder(added.id)) == tree(tmp_path / "a")
    assert not left.exists()


def test_processes_of_one_machine_download_once(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = machines.registry("operator").add(make(tmp_path / "a"))
    fetched: list[str] = []
    together = threading.Barrier(4)

    def use() -> None:
        registry = machines.registry("worker")
        fetch = registry._objects.fetch

        def counted(prefix: str, folder: Path) -> None:
            fetched.append(prefix)
            fetch(prefix, folder)

        registry._objects.fetch = counted  # type: ignore[method-assign]
        together.wait()
        assert registry.folder(added.id).is_dir()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [f"references/{added.id}"]


def test_a_store_that_is_silent_leaves_the_list_from_before(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = machines.registry("operator").add(make(tmp_path / "a"))
    gateway, new = machines.registry("gateway"), machines.registry("new")
    assert [item.id for item in gateway.installed()] == [added.id]

    def silent(*_: object) -> None:
        raise StorageFault("silent", code="storage_unavailable")

    for registry in (gateway, new):
        monkeypatch.setattr(registry._objects, "prefixes", silent)
    machines.wait()
    assert [item.id for item in gateway.installed()] == [added.id]
    assert gateway.get(added.id).id == added.id
    with pytest.raises(StorageFault):
        new.installed()


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_left_out_is_told_once(
    machines: Machines, tmp_path: Path, caplog: pytest.LogCaptureFixture, shared: bool
) -> None:
    if shared:
        added = machines.registry("operator").add(make(tmp_path / "a"))
        shutil.copyfile(tmp_path / "a" / MANIFEST, tmp_path / "old")
        (tmp_path / "old").write_bytes((tmp_path / "old").read_bytes() + b" ")
        with (tmp_path / "old").open("rb") as file:
            machines.objects("operator").put(f"references/{added.id}", MANIFEST, file)
        registry: ReferenceRegistry = machines.registry("gateway")
    else:
        registry = ReferenceRegistry(tmp_path / "references")
        added = registry.add(make(tmp_path / "a"))
        (added.folder / MANIFEST).write_bytes(b"{}")
    with caplog.at_level(logging.WARNING, "safegraft.references"):
        for _ in range(3):
            assert registry.installed() == []
            machines.wait()
    told = [record.getMessage() for record in caplog.records if record.name == "safegraft.references"]
    assert len(told) == 1
    assert told[0].startswith(f"{added.id} is left out: ")
