"""Folders on a disk that a stranger made: what of them may be read, where links may lead, and how large it may be."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.errors import InvalidAdapter, TooLarge
from safegraft.ingest import MAX_COMPANION_BYTES, companions_of

TOKENIZER = "tokenizer.json"


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    folder = tmp_path / "sent"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS, "README.md", "training_args.bin"):
        (folder / name).write_text("{}")
    (tmp_path / "secret").write_text("a file of whoever runs this")
    return folder


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def test_companions_are_named_in_order(sent: Path) -> None:
    (sent / TOKENIZER).write_text("{}")
    assert companions_of(sent) == ["README.md", TOKENIZER]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.symlink_to("../secret"), "link_leaves_folder"),
        (lambda path: path.symlink_to("/etc/passwd"), "link_leaves_folder"),
        (lambda path: path.symlink_to("/dev/zero"), "link_leaves_folder"),
        (lambda path: path.symlink_to("../nowhere"), "link_leaves_folder"),
        (lambda path: path.symlink_to("/proc/self/environ"), "link_leaves_folder"),
        (lambda path: path.symlink_to("nowhere"), "not_a_file"),
        (lambda path: path.symlink_to(TOKENIZER), "not_a_file"),
        (lambda path: path.symlink_to("."), "not_a_file"),
        (lambda path: path.mkdir(), "not_a_file"),
        (os.mkfifo, "not_a_file"),
        (lambda path: sparse(path, MAX_COMPANION_BYTES + 1), "companion_too_large"),
    ],
    ids=["neighbour", "system", "device", "outside", "proc", "nowhere", "loop", "here", "folder", "pipe", "large"],
)  # fmt: skip
def test_a_companion_that_is_no_small_file_of_the_folder_is_refused_by_name(
    sent: Path, make: Callable[[Path], None], code: str
) -> None:
    make(sent / TOKENIZER)
    with pytest.raises((InvalidAdapter, TooLarge)) as caught:
        companions_of(sent)
    assert (caught.value.code, caught.value.param) == (code, TOKENIZER)
    assert TOKENIZER in caught.value.message
    assert caught.value.hint


def test_as_much_as_an_upload_may_bring_is_taken(sent: Path) -> None:
    sparse(sent / TOKENIZER, MAX_COMPANION_BYTES)
    assert companions_of(sent) == ["README.md", TOKENIZER]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_weights_and_configuration_may_not_lie_elsewhere_either(sent: Path, name: str) -> None:
    (sent / name).rename(sent.parent / name)
    (sent / name).symlink_to(sent.parent / name)
    with pytest.raises(InvalidAdapter) as caught:
        companions_of(sent)
    assert (caught.value.code, caught.value.param) == ("link_leaves_folder", name)


@pytest.mark.parametrize(("name", "code"), [(CONFIG, "missing_config"), (WEIGHTS, "missing_weights")])
def test_weights_and_configuration_that_are_pipes_are_missing(sent: Path, name: str, code: str) -> None:
    (sent / name).unlink()
    os.mkfifo(sent / name)
    with pytest.raises(InvalidAdapter) as caught:
        companions_of(sent)
    assert caught.value.code == code


def test_links_within_the_folder_and_to_the_folder_are_followed(sent: Path) -> None:
    (sent / "files").mkdir()
    (sent / WEIGHTS).rename(sent / "files" / "w")
    (sent / WEIGHTS).symlink_to("files/w")
    (sent / TOKENIZER).symlink_to("README.md")
    (sent.parent / "link").symlink_to(sent)
    assert companions_of(sent.parent / "link") == ["README.md", TOKENIZER]


def test_what_does_not_travel_may_be_anything(sent: Path) -> None:
    (sent / "training_args.bin").unlink()
    (sent / "training_args.bin").symlink_to("/dev/zero")
    os.mkfifo(sent / "optimizer.pt")
    assert companions_of(sent) == ["README.md"]


# --- snapshots in a Hugging Face cache ---


@pytest.fixture
def snapshot(sent: Path, tmp_path: Path) -> Path:
    """As huggingface_hub lays a repository out: every file of a revision is a link to one that is named by its hash."""
    repository = tmp_path / "hub" / "models--somebody--adapter"
    revision = repository / "snapshots" / "0123abcd"
    revision.mkdir(parents=True)
    shutil.move(sent, repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (revision / path.name).symlink_to(Path("../../blobs") / path.name)
    return revision


def test_a_snapshot_of_a_cache_is_read_through_its_links(snapshot: Path) -> None:
    assert companions_of(snapshot) == ["README.md"]
    inner = snapshot / "checkpoint-10"
    inner.mkdir()
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        (inner / name).symlink_to(Path("../../../blobs") / WEIGHTS)
    assert companions_of(inner) == [TOKENIZER]


@pytest.mark.parametrize(
    "target",
    ["../../../models--else--own/blobs/x", "../../refs/main", "../../../../secret", "../../blobs/out", "/etc/passwd"],
)  # fmt: skip
def test_a_snapshot_leads_to_no_other_place(snapshot: Path, target: str) -> None:
    hub = snapshot.parents[2]
    for path in (hub / "models--else--own" / "blobs" / "x", snapshot.parents[1] / "refs" / "main"):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    (snapshot.parents[1] / "blobs" / "out").symlink_to(hub.parent / "secret")
    (snapshot / TOKENIZER).symlink_to(target)
    with pytest.raises(InvalidAdapter) as caught:
        companions_of(snapshot)
    assert (caught.value.code, caught.value.param) == ("link_leaves_folder", TOKENIZER)


def test_a_folder_that_only_looks_like_a_cache_gets_no_further(sent: Path, tmp_path: Path) -> None:
    """A stranger may send folders of any name: what `blobs` links to is none of it."""
    revision = tmp_path / "models--x" / "snapshots" / "r"
    revision.parent.mkdir(parents=True)
    sent.rename(revision)
    (tmp_path / "models--x" / "blobs").symlink_to(tmp_path)
    (revision / TOKENIZER).symlink_to("../../blobs/secret")
    with pytest.raises(InvalidAdapter) as caught:
        companions_of(revision)
    assert caught.value.code == "link_leaves_folder"
