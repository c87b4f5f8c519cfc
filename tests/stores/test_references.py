"""The registry of references: what is added stays and is found; what is broken is not installed."""

import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from safegraft.bundle import MANIFEST
from safegraft.contracts.reference import BaseModule, BundleFile
from safegraft.errors import CorruptReference, Incompatible, InvalidParameter, NotFound
from safegraft.stores.references import Installed, ReferenceRegistry
from tests.test_compatibility import K, Q, adapter, manifest


@pytest.fixture
def registry(tmp_path: Path) -> ReferenceRegistry:
    return ReferenceRegistry(tmp_path / "references")


def make(folder: Path, **changes: Any) -> Path:
    """A bundle of one small file."""
    folder.mkdir(parents=True)
    (folder / "nlsr.safetensors").write_bytes(b"weights")
    file = BundleFile(sha256=hashlib.sha256(b"weights").hexdigest(), bytes=7)
    whole = manifest(files={"nlsr.safetensors": file}, **changes)
    (folder / MANIFEST).write_text(whole.model_dump_json())
    return folder


def for_modules(*names: str, labels: list[str] | None = None) -> Any:
    modules = {name: BaseModule(outputs=6, inputs=8, site=name) for name in names}
    return manifest().base_model.model_copy(update={"modules": modules, "labels": labels or []})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- adding ---


def test_an_added_reference_is_found_by_its_id(registry: ReferenceRegistry, tmp_path: Path) -> None:
    added = registry.add(make(tmp_path / "a"))
    assert registry.get(added.id) == added
    assert registry.installed() == [added]
    assert tree(added.folder) == tree(tmp_path / "a")


def test_a_real_bundle_can_be_added(registry: ReferenceRegistry, bundle: Path) -> None:
    added = registry.add(bundle)
    assert tree(added.folder) == tree(bundle)


def test_an_added_reference_outlives_its_source(registry: ReferenceRegistry, tmp_path: Path) -> None:
    added = registry.add(make(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    assert tree(added.folder)["nlsr.safetensors"] == b"weights"


def test_adding_twice_changes_nothing(registry: ReferenceRegistry, tmp_path: Path) -> None:
    first = registry.add(make(tmp_path / "a"))
    before = {path: path.stat() for path in [first.folder, *first.folder.iterdir()]}
    assert registry.add(make(tmp_path / "b")) == first
    assert {path: path.stat().st_mtime_ns for path in before} == {p: s.st_mtime_ns for p, s in before.items()}
    assert registry.installed() == [first]


def test_adding_at_the_same_time_gives_one(
    registry: ReferenceRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, together, link = make(tmp_path / "a"), threading.Barrier(2, timeout=20), os.link

    def link_together(*names: Any) -> None:
        together.wait()
        link(*names)

    monkeypatch.setattr(os, "link", link_together)
    results: list[Installed] = []
    threads = [threading.Thread(target=lambda: results.append(registry.add(source))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert registry.installed() == results[:1] == results[1:]
    assert [path.name for path in (tmp_path / "references").iterdir()] == [results[0].id]


def test_a_bundle_of_links_into_a_cache_is_added_by_its_bytes(registry: ReferenceRegistry, tmp_path: Path) -> None:
    source = make(tmp_path / "cache" / "blobs")
    (tmp_path / "cache" / "snapshot").mkdir()
    for path in source.iterdir():
        (tmp_path / "cache" / "snapshot" / path.name).symlink_to(Path("../blobs") / path.name)
    added = registry.add(tmp_path / "cache" / "snapshot")
    assert tree(added.folder) == tree(source)
    assert not any(path.is_symlink() for path in added.folder.iterdir())


def test_where_links_are_impossible_the_bytes_are_copied(
    registry: ReferenceRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impossible(*names: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", impossible)
    assert tree(registry.add(make(tmp_path / "a")).folder) == tree(tmp_path / "a")


def test_a_corrupt_bundle_is_not_added(registry: ReferenceRegistry, tmp_path: Path) -> None:
    source = make(tmp_path / "a")
    (source / "nlsr.safetensors").write_bytes(b"weightz")
    with pytest.raises(CorruptReference):
        registry.add(source)
    assert registry.installed() == []


def test_a_folder_without_a_manifest_is_no_reference(registry: ReferenceRegistry, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter) as caught:
        registry.add(tmp_path)
    assert caught.value.code == "not_a_reference"


# --- finding ---


def test_an_empty_registry_lists_nothing(registry: ReferenceRegistry) -> None:
    assert registry.installed() == []


def test_the_newest_comes_first(registry: ReferenceRegistry, tmp_path: Path) -> None:
    for time in (2, 3, 1):
        registry.add(make(tmp_path / str(time), created_at=time))
    assert [item.manifest.created_at for item in registry.installed()] == [3, 2, 1]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"name": "tiny"}'])
def test_a_corrupted_manifest_is_skipped(registry: ReferenceRegistry, tmp_path: Path, content: bytes) -> None:
    good = registry.add(make(tmp_path / "a"))
    bad = registry.add(make(tmp_path / "b", created_at=5))
    (bad.folder / MANIFEST).unlink()
    (bad.folder / MANIFEST).write_bytes(content)
    assert registry.installed() == [good]
    with pytest.raises(CorruptReference):
        registry.get(bad.id)


def test_a_manifest_that_was_changed_into_another_sound_one_is_skipped(
    registry: ReferenceRegistry, tmp_path: Path
) -> None:
    added = registry.add(make(tmp_path / "a"))
    (added.folder / MANIFEST).unlink()
    (added.folder / MANIFEST).write_text(manifest(name="forged").model_dump_json())
    assert registry.installed() == []
    with pytest.raises(CorruptReference):
        registry.get(added.id)


@pytest.mark.parametrize(
    "wanted",
    ["", ".", "..", "ref_", "ref_" + "0" * 24, "ref_*", "ref_" + "0" * 300, "ref_\0", "ref_\ud800", "/etc",
     "../a", "ref_0/../../a", "ref_" + "0" * 24 + "\n"],
    ids=ascii,
)  # fmt: skip
def test_another_id_is_not_found(registry: ReferenceRegistry, tmp_path: Path, wanted: str) -> None:
    registry.add(make(tmp_path / "a"))
    with pytest.raises(NotFound) as caught:
        registry.get(wanted)
    assert (caught.value.code, caught.value.param) == ("reference_not_found", "reference_id")


# --- choosing ---


def test_the_only_one_that_fits_is_chosen(registry: ReferenceRegistry, tmp_path: Path) -> None:
    fitting = registry.add(make(tmp_path / "a", base_model=for_modules(Q)))
    registry.add(make(tmp_path / "b", base_model=for_modules(K)))
    assert registry.choose(adapter(Q)) == fitting


def test_a_reference_fits_whatever_the_adapter_calls_its_base(registry: ReferenceRegistry, tmp_path: Path) -> None:
    only = registry.add(make(tmp_path / "a"))
    assert registry.choose(adapter(Q, label="/home/me/model")) == only


def test_where_the_only_one_does_not_fit_the_reason_is_given(registry: ReferenceRegistry, tmp_path: Path) -> None:
    registry.add(make(tmp_path / "a", base_model=for_modules(Q)))
    with pytest.raises(Incompatible) as caught:
        registry.choose(adapter(K))
    assert (caught.value.code, caught.value.param) == ("module_not_in_base", K)


@pytest.mark.parametrize("count", [0, 2])
def test_where_none_of_several_fits_their_number_is_given(
    registry: ReferenceRegistry, tmp_path: Path, count: int
) -> None:
    for number in range(count):
        registry.add(make(tmp_path / str(number), created_at=number))
    with pytest.raises(Incompatible, match=f"None of the {count}") as caught:
        registry.choose(adapter("other"))
    assert caught.value.code == "no_matching_reference"


def test_among_several_that_fit_the_label_decides(registry: ReferenceRegistry, tmp_path: Path) -> None:
    registry.add(make(tmp_path / "a", base_model=for_modules(Q, labels=["one"])))
    two = registry.add(make(tmp_path / "b", base_model=for_modules(Q, labels=["two", "unsloth/two-bnb-4bit"])))
    assert registry.choose(adapter(Q, label="unsloth/two-bnb-4bit")) == two


def test_the_label_of_one_that_does_not_fit_counts_for_nothing(registry: ReferenceRegistry, tmp_path: Path) -> None:
    registry.add(make(tmp_path / "a", base_model=for_modules(K, labels=["one"])))
    fitting = registry.add(make(tmp_path / "b", base_model=for_modules(Q, labels=["two"])))
    assert registry.choose(adapter(Q, label="one")) == fitting


@pytest.mark.parametrize("label", [None, "neither", "both"])
def test_several_that_fit_equally_are_ambiguous_and_named(
    registry: ReferenceRegistry, tmp_path: Path, label: str | None
) -> None:
    both = [registry.add(make(tmp_path / n, base_model=for_modules(Q, labels=[n, "both"]))) for n in ("a", "b")]
    with pytest.raises(Incompatible) as caught:
        registry.choose(adapter(Q, label=label))
    assert caught.value.code == "reference_ambiguous"
    assert all(item.id in caught.value.message for item in both)


def test_the_preferred_one_is_taken_where_several_fit_and_only_there(
    registry: ReferenceRegistry, tmp_path: Path
) -> None:
    one, two = [registry.add(make(tmp_path / n, base_model=for_modules(Q, labels=[n]))) for n in ("a", "b")]
    other = registry.add(make(tmp_path / "c", base_model=for_modules(K, labels=["c"])))
    assert registry.choose(adapter(Q), one.id) == one
    assert registry.choose(adapter(Q), two.id) == two
    # The label counts more, and what does not fit is never taken.
    assert registry.choose(adapter(Q, label="a"), two.id) == one
    with pytest.raises(Incompatible):
        registry.choose(adapter(Q), other.id)


def test_a_removed_one_is_gone(registry: ReferenceRegistry, tmp_path: Path) -> None:
    one = registry.add(make(tmp_path / "a"))
    registry.remove(one.id)
    assert registry.installed() == []
    assert not one.folder.exists()
    with pytest.raises(NotFound):
        registry.remove(one.id)
    assert registry.add(make(tmp_path / "b")).id == one.id
