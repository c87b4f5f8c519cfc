"""What every test may ask for: a tiny model, its aligned adapter, a reference built from them as users build it, and a
browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import scaled

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from safegraft.engine.reference import LoadedReference


# Few tests that wait long, for processes that drain, start, or answer hundreds of requests: begun first, so that in the
# end no process is left alone with them. xdist orders files by how many tests they have.
LONG = (
    "worker/test_drain.py", "service/test_schema.py", "test_cli.py", "service/test_secrets.py",
    "service/test_operations_page.py", "test_launch.py", "chaos/test_rows.py", "service/test_realignments.py",
    "service/test_webhooks.py", "service/test_openai_client.py", "service/test_webhooks_page.py",
    "service/test_batches_page.py", "service/test_uploads_page.py", "commands/test_admin.py",
    "commands/test_provenance.py", "service/test_resumable.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONG)}
    assert all(path.is_file() for path in place), "a file of LONG was renamed"
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True)
def installation(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the scaled backend: settings that a test makes in this process name a database and a prefix of its own."""
    if not scaled.SCALED or "tmp_path" not in request.fixturenames:
        yield
        return
    # Not the fixture of that name, which tests undo.
    with pytest.MonkeyPatch.context() as patch, scaled.disposed_engines():
        for name, value in scaled.environment(request.getfixturevalue("tmp_path")).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def storage_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Places for bytes on a real S3 server, a new one with each call, on either backend."""
    with pytest.MonkeyPatch.context() as patch:
        count = 0

        def place(root: str) -> str:
            nonlocal count
            count += 1
            return f"{root}/place{scaled.process()}_{count}"

        if scaled.SCALED:
            yield lambda: place(os.environ["SAFEGRAFT_TEST_STORAGE_URL"])
            return
        with scaled.s3_server() as aws:
            for name, value in aws.items():
                patch.setenv(name, value)
            root = scaled.make_bucket(aws["AWS_ENDPOINT_URL"], "places")
            yield lambda: place(root)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def aligned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The provider's adapter: rank 4, all linear layers."""
    from tests import tiny

    return tiny.save_adapter(base, tmp_path_factory.mktemp("adapters") / "aligned", seed=1)


@pytest.fixture(scope="session")
def fresh(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A customer's adapter of the same shape that shares nothing with the aligned one."""
    from tests import tiny

    return tiny.save_adapter(base, tmp_path_factory.mktemp("adapters") / "fresh", seed=3)


@pytest.fixture(scope="session")
def continued(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A customer's adapter that was trained further from the aligned one."""
    from tests import tiny

    return tiny.continue_adapter(aligned, tmp_path_factory.mktemp("adapters") / "continued")


@pytest.fixture(scope="session")
def bundle(base: Path, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference bundle of the tiny model, for every method."""
    from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
    from safegraft.engine.bundle import BuildSettings
    from tests import tiny

    out = tmp_path_factory.mktemp("references") / "tiny"
    build_reference(
        out,
        sources=BuildSources(base=base, aligned=aligned, labels=["tiny-llama", str(base)]),
        prompts=BuildPrompts(safety=tiny.HARMFUL, general=tiny.GENERAL),
        settings=BuildSettings(sparsity=0.5),
    )
    return out


@pytest.fixture(scope="session")
def reference(bundle: Path) -> "LoadedReference":
    """The bundle, loaded."""
    from safegraft.engine.reference import LoadedReference

    return LoadedReference(bundle)


# For the module alone: its driver keeps an event loop in this thread, in which no other test could start its own.
@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium as the machine has it; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()
