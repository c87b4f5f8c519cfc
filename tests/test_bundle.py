"""A bundle is what was built, to the byte, or it is corrupt and the file is named."""

import json
import shutil
from pathlib import Path

import pytest

from safegraft.bundle import GRAM, MANIFEST, NLSR, SAFETYLOCK, read_manifest, reference_id, verify_bundle
from safegraft.errors import CorruptReference
from safegraft.files import sha256_file


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_bundle_as_it_was_built_is_sound(copy: Path) -> None:
    assert set(verify_bundle(copy).files) == {NLSR, GRAM, SAFETYLOCK}
    assert {path.name for path in copy.iterdir()} == {MANIFEST, NLSR, GRAM, SAFETYLOCK}


@pytest.mark.parametrize("at", [0, 100, -1])
@pytest.mark.parametrize("name", [NLSR, GRAM, SAFETYLOCK])
def test_a_flipped_byte_is_found_and_its_file_named(copy: Path, name: str, at: int) -> None:
    flip(copy / name, at)
    with pytest.raises(CorruptReference) as caught:
        verify_bundle(copy)
    assert caught.value.param == str(copy / name)


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.9])
def test_a_flipped_byte_of_the_manifest_is_found_or_changes_the_identity(copy: Path, share: float) -> None:
    _, before = read_manifest(copy)
    flip(copy / MANIFEST, int(share * (copy / MANIFEST).stat().st_size))
    try:
        _, after = read_manifest(copy)
    except CorruptReference as error:
        assert error.param == str(copy / MANIFEST)  # noqa: PT017
    else:
        assert reference_id(after) != reference_id(before)


@pytest.mark.parametrize("name", [NLSR, GRAM, SAFETYLOCK])
@pytest.mark.parametrize("how", ["missing", "longer", "empty", "a folder"])
def test_a_file_that_is_not_the_recorded_one_is_named(copy: Path, name: str, how: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).unlink()
    if how == "a folder":
        (copy / name).mkdir()
    elif how != "missing":
        (copy / name).write_bytes({"longer": data + b"\0", "empty": b""}[how])
    with pytest.raises(CorruptReference) as caught:
        verify_bundle(copy)
    assert caught.value.param == str(copy / name)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"2", b"{" * 100_000, b"\xff", b'{"schema_version": 2}'])
def test_an_unreadable_manifest_is_corrupt(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CorruptReference) as caught:
        verify_bundle(tmp_path)
    assert caught.value.param == str(tmp_path / MANIFEST)


@pytest.mark.parametrize("version", [1, 3, "2", 2.5, None, True, [2]])
def test_a_manifest_of_another_form_is_told_from_a_broken_one(copy: Path, version: object) -> None:
    manifest = json.loads((copy / MANIFEST).read_bytes())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"schema_version": version}))
    with pytest.raises(CorruptReference) as caught:
        verify_bundle(copy)
    assert (caught.value.code, caught.value.param) == ("reference_version", str(copy / MANIFEST))
    (copy / MANIFEST).write_text(json.dumps(manifest | {"name": 3}))
    with pytest.raises(CorruptReference) as caught:
        verify_bundle(copy)
    assert (caught.value.code, caught.value.param) == ("corrupt_reference", str(copy / MANIFEST))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", ""])
def test_a_manifest_that_names_a_file_outside_is_corrupt(copy: Path, name: str) -> None:
    (copy.parent / "outside").write_bytes(b"x")
    manifest = json.loads((copy / MANIFEST).read_bytes())
    manifest["files"] = {name: {"sha256": sha256_file(copy.parent / "outside"), "bytes": 1}}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorruptReference) as caught:
        verify_bundle(copy)
    assert "outside the bundle" in caught.value.message


def test_the_same_bytes_have_the_same_identity_everywhere(bundle: Path, copy: Path) -> None:
    assert read_manifest(copy) == read_manifest(bundle)
    identity = reference_id(read_manifest(copy)[1])
    assert identity.startswith("ref_")
    assert len(identity) == 28
