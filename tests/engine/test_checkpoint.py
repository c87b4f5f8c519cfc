"""A build that is stopped goes on where it was, and ends in the bytes of one that was not."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safegraft.bundle import MANIFEST
from safegraft.contracts.reference import ReferenceManifest
from safegraft.engine import bundle, checkpoint
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference, placeholder
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.checkpoint import Checkpoint
from safegraft.engine.conversations import Conversation
from safegraft.engine.statistics import Statistics
from tests import tiny
from tests.engine.watch import Watch, watched

SAFETY, GENERAL = tiny.HARMFUL[:5], tiny.GENERAL[:5]
UNSAFE = [Conversation(item.prompt, placeholder(item.prompt)) for item in SAFETY]
SETTINGS = BuildSettings(sparsity=0.5, batch_size=2, answer_tokens=3, snip=True, preference_snip=True)
# Two sets that the model answers itself, and answers of its own beside given ones.
PROMPTS = BuildPrompts(
    safety=[replace(item, response=None) if at < 2 else item for at, item in enumerate(SAFETY)],
    general=[replace(item, response=None) for item in GENERAL],
)
SITES = 4 * tiny.LAYERS


class Stopped(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is kept, not those of a minute together."""
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)


@dataclass
class Work(Watch):
    """What a model was asked, and how many decompositions were made."""

    decompositions: int = 0


def build(
    out: Path,
    sources: BuildSources,
    prompts: BuildPrompts = PROMPTS,
    settings: BuildSettings = SETTINGS,
    stop: Callable[[str, int], bool] = lambda stage, done: False,
) -> tuple[ReferenceManifest | None, Work]:
    """A build until `stop`, and what it did; no manifest where it was stopped."""
    work = Work()
    decompose = bundle.generalized_eigenpairs

    def counted(*arguments: Any) -> Any:
        work.decompositions += 1
        return decompose(*arguments)

    def progress(stage: str, done: int, total: int) -> None:
        if stop(stage, done):
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, watched() as watch:
        patch.setattr(bundle, "generalized_eigenpairs", counted)
        try:
            manifest = build_reference(out, sources=sources, prompts=prompts, settings=settings, progress=progress)
        except Stopped:
            manifest = None
    work.read, work.answered = watch.read, watch.answered
    return manifest, work


def partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def undated(manifest: ReferenceManifest | None) -> ReferenceManifest:
    assert manifest is not None
    return manifest.model_copy(update={"created_at": 0})


@pytest.fixture(scope="module")
def sources(base: Path, aligned: Path) -> BuildSources:
    return BuildSources(aligned=aligned, base=base)


class Whole:
    """A build that nothing stopped."""

    def __init__(self, out: Path, sources: BuildSources) -> None:
        self.folder = out
        self.manifest, self.work = build(out, sources)


@pytest.fixture(scope="module")
def whole(sources: BuildSources, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole") / "ref", sources)


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ("safety answers", 2),
        ("safety statistics", 3),
        ("general statistics", 2),
        ("unsafe statistics", 4),
        ("preference gradients", 3),
        ("eigenpairs", 3),
        ("eigenpairs", SITES),
    ],
)
def test_a_stopped_build_goes_on_and_ends_in_the_same_bytes(
    sources: BuildSources, whole: Whole, tmp_path: Path, stage: str, at: int
) -> None:
    out = tmp_path / "ref"
    manifest, first = build(out, sources, stop=lambda name, done: (name, done) == (stage, at))
    assert manifest is None
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")] == []
    manifest, second = build(out, sources)
    assert files(out) == files(whole.folder)
    assert undated(manifest) == undated(whole.manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["ref"]
    # Nothing was done twice, but for answers that were on their way when it was stopped.
    assert first.read + second.read == whole.work.read
    assert first.decompositions + second.decompositions == whole.work.decompositions == SITES
    lost = 2 if stage == "safety answers" else 0
    assert first.answered + second.answered == whole.work.answered + lost == 7 + lost


def test_a_build_may_be_stopped_again_and_again(sources: BuildSources, whole: Whole, tmp_path: Path) -> None:
    out, read, runs = tmp_path / "ref", Counter[tuple[int, ...]](), 0
    seen: set[tuple[str, int]] = set()

    def stop(stage: str, done: int) -> bool:
        """Every third time that something new was finished."""
        seen.add((stage, done))
        return len(seen) % 3 == 0

    manifest = None
    while manifest is None:
        manifest, work = build(out, sources, stop=stop)
        read, runs = read + work.read, runs + 1
        seen.add(("run", runs))
    assert runs > 5
    assert files(out) == files(whole.folder)
    assert read == whole.work.read
    assert not partial(out).exists()


def test_what_was_finished_is_kept_however_little_time_it_took(
    sources: BuildSources, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 3600.0)
    out = tmp_path / "ref"
    _, first = build(out, sources, stop=lambda stage, done: (stage, done) == ("eigenpairs", 2))
    assert first.read == whole.work.read
    _, second = build(out, sources)
    assert (sum(second.read.values()), second.answered, second.decompositions) == (0, 0, SITES - 2)
    assert files(out) == files(whole.folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from safegraft.engine import checkpoint
from tests.engine.test_checkpoint import BuildSources, PROMPTS, SETTINGS, build_reference

checkpoint.SECONDS_BETWEEN = 0.0
out, base, aligned = map(Path, sys.argv[1:])
kill_at = ("general statistics", 4)

def progress(stage, done, total):
    if (stage, done) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

sources = BuildSources(aligned=aligned, base=base)
build_reference(out, sources=sources, prompts=PROMPTS, settings=SETTINGS, progress=progress)
"""


def test_a_process_that_is_killed_leaves_what_another_can_go_on_from(
    base: Path, aligned: Path, sources: BuildSources, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "ref"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(out), str(base), str(aligned)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()[-2000:]
    assert not out.exists()
    assert partial(out).is_dir()
    manifest, work = build(out, sources)
    # Four of five general conversations were read; the fifth, the unsafe answers and the pairs were not.
    assert work.answered == 0
    assert sum(work.read.values()) == 1 + len(UNSAFE) + 4 * len(UNSAFE)
    assert work.read <= whole.work.read
    assert files(out) == files(whole.folder)
    assert undated(manifest) == undated(whole.manifest)
    assert not partial(out).exists()


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        (PROMPTS, replace(SETTINGS, ridge=0.1)),
        (replace(PROMPTS, safety=[*PROMPTS.safety[:4], Conversation("please help", "sorry")]), SETTINGS),
        (replace(PROMPTS, safety=[*PROMPTS.safety[:4], replace(SAFETY[4], unsafe="sure")]), SETTINGS),
        (replace(PROMPTS, general=GENERAL), SETTINGS),
    ],
    ids=["settings", "safety", "unsafe", "general"],
)
def test_other_settings_or_prompts_start_afresh(
    sources: BuildSources, tmp_path: Path, prompts: BuildPrompts, settings: BuildSettings
) -> None:
    out = tmp_path / "ref"
    build(out, sources, stop=lambda stage, done: stage == "eigenpairs")
    manifest, work = build(out, sources, prompts, settings)
    assert manifest is not None
    # Each set once, and four times each pair for its preference.
    assert sum(work.read.values()) == len(SAFETY) + len(GENERAL) + len(UNSAFE) + 4 * len(UNSAFE)
    assert work.answered == (2 if prompts.general is GENERAL else 7)
    assert work.decompositions == SITES
    assert [path.name for path in tmp_path.iterdir()] == ["ref"]


def test_another_model_in_the_same_folder_starts_afresh(base: Path, aligned: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(aligned, tmp_path / "adapter"))
    sources, out = BuildSources(aligned=adapter, base=base), tmp_path / "out" / "ref"
    prompts, settings = BuildPrompts(safety=SAFETY, general=GENERAL), BuildSettings(sparsity=0.5)
    build(out, sources, prompts, settings, stop=lambda stage, done: stage == "eigenpairs")
    tiny.change_tensors(adapter, lambda tensors: {name: -tensor for name, tensor in tensors.items()})
    _, work = build(out, sources, prompts, settings)
    build(tmp_path / "clean" / "ref", sources, prompts, settings)
    assert sum(work.read.values()) == len(SAFETY) + len(GENERAL) + len(UNSAFE)
    assert files(out) == files(tmp_path / "clean" / "ref")


# The folder itself


def some() -> Statistics:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    name = "model.layers.0.self_attn.o_proj"
    return Statistics(
        second_moments={name: random(3, 3)},
        means={name: random(3)},
        response_squares={name: random(3)},
        grams={name: random(2, 2).double()},
        gradients={name: (random(2, 3), random(4, 2))},
        last={name: random(2, 5, 3)},
        sites={name: name, "model.layers.0.other": name},
        tokens=7,
        response_tokens=5,
        done=2,
    )


def equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("final", [False, True])
def test_sums_come_back_as_they_were(tmp_path: Path, final: bool) -> None:
    sums = some().finished() if final else some()
    Checkpoint(tmp_path / "p", "x").save_statistics("statistics-safety", sums, final=final)
    found = Checkpoint(tmp_path / "p", "x").statistics("statistics-safety", "cpu")
    assert found is not None
    assert equal(vars(found), vars(sums))
    assert found.forward_passes == int(final)


def test_sums_go_back_to_the_models_device_and_last_tokens_to_main_memory(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "p", "x").save_statistics("s", some(), final=True)
    found = Checkpoint(tmp_path / "p", "x").statistics("s", "meta")
    assert found is not None
    for part in ("second_moments", "means", "response_squares", "grams"):
        assert all(tensor.is_meta for tensor in getattr(found, part).values())
    assert all(tensor.is_meta for pair in found.gradients.values() for tensor in pair)
    assert not any(tensor.is_meta for tensor in found.last.values())


def test_sums_are_kept_once_a_minute_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 60.0)
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    kept = Checkpoint(tmp_path / "p", "x")
    states = []
    for seconds in (1.0, 59.0, 61.0, 62.0, 122.0):
        now = 1000.0 + seconds
        kept.save_statistics("s", replace(some(), done=int(seconds)))
        found = kept.statistics("s", "cpu")
        states.append(found.done if found else None)
    assert states == [None, None, 61, 61, 122]
    kept.save_statistics("s", replace(some(), done=123), final=True)
    found = kept.statistics("s", "cpu")
    assert found is not None
    assert found.done == 123


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_is_cut_short_leaves_what_was_kept_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    kept = Checkpoint(tmp_path / "p", "x")
    kept.save_statistics("s", some(), final=True)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    later = replace(some(), done=3, means={"other": torch.ones(2)})
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        kept.save_statistics("s", later, final=True)
    monkeypatch.undo()
    found = Checkpoint(tmp_path / "p", "x").statistics("s", "cpu")
    assert found is not None
    assert equal(vars(found), vars(some()))


def test_notes_and_tensors_are_kept_apart(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "p", "x")
    tensors = {"b.V": torch.ones(2, 3, dtype=torch.bfloat16), "a.mu": torch.zeros(2)}
    kept.save("pairs-1", tensors, {"energy": 0.5, "words": ["ä", "\n"]})
    again = Checkpoint(tmp_path / "p", "x")
    assert again.has("pairs-1")
    assert not again.has("pairs-2")
    assert again.meta("pairs-1") == {"energy": 0.5, "words": ["ä", "\n"]}
    assert equal(again.tensors("pairs-1"), tensors)
    assert again.shapes("pairs-1") == {"b.V": ("BF16", (2, 3)), "a.mu": ("F32", (2,))}
    again.save("pairs-1", {}, {})
    assert kept.tensors("pairs-1") == {}


def test_the_folder_of_another_build_is_emptied_and_its_own_is_not(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "p", "x").save("s", {}, {"n": 1})
    # What a process that was killed while it wrote leaves.
    (tmp_path / "p" / ".writing-abc").write_bytes(b"half")
    assert Checkpoint(tmp_path / "p", "x").has("s")
    other = Checkpoint(tmp_path / "p", "y")
    assert not other.has("s")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["fingerprint.txt"]
    assert not Checkpoint(tmp_path / "p", "x").has("s")
    other.save("s", {}, {"n": 2})
    other.remove()
    assert not list(tmp_path.iterdir())
    other.remove()


def test_a_folder_that_no_build_made_is_left_alone(tmp_path: Path, base: Path) -> None:
    (tmp_path / "ref.partial").mkdir()
    (tmp_path / "ref.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        build(tmp_path / "ref", BuildSources(aligned=base), BuildPrompts(safety=SAFETY), BuildSettings())
    assert (tmp_path / "ref.partial" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "ref.partial").iterdir()] == ["thesis.txt"]


def test_nothing_lies_in_the_way_before_there_is_something_to_keep(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "p", "x")
    assert not kept.has("s")
    assert kept.statistics("s", "cpu") is None
    assert not list(tmp_path.iterdir())
    # An empty folder, as a process leaves that was killed in its first moment.
    (tmp_path / "p").mkdir()
    Checkpoint(tmp_path / "p", "x").save("s", {}, {})
    assert Checkpoint(tmp_path / "p", "x").has("s")


def test_without_a_folder_things_are_kept_for_as_long_as_it_is_open() -> None:
    kept = Checkpoint()
    assert not kept.has("s")
    kept.save_statistics("s", some(), final=True)
    kept.remove()
    with kept.opened() as folder:
        folder.save("s", {"a": torch.ones(1)}, {})
        path = folder.path("s")
        assert path.is_file()
        assert folder.has("s")
    assert not path.exists()
    assert not kept.has("s")
