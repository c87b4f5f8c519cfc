"""What every test may ask for: a tiny model, its aligned adapter, and a reference built from them as users build it."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from safegraft.engine.reference import LoadedReference


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
