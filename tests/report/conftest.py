"""A deep model's report by the real path."""

import pytest

from safegraft.contracts.report import Report

LAYERS = 70


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What realigning an adapter of 70 layers and 7 projections said: PEFT's adapter, a reference, the engine's run."""
    from safegraft.contracts.methods import NlsrParameters
    from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
    from safegraft.engine.bundle import BuildSettings
    from safegraft.engine.pipeline import realign
    from safegraft.engine.reference import LoadedReference
    from tests import tiny

    folder = tmp_path_factory.mktemp("deep")
    tiny.save_model(folder / "base", LAYERS)
    tiny.save_adapter(folder / "base", folder / "aligned", seed=1)
    tiny.continue_adapter(folder / "aligned", folder / "customer", drift=0.6)
    build_reference(
        folder / "reference",
        sources=BuildSources(aligned=folder / "aligned", base=folder / "base"),
        # Without general prompts, whose statistics nlsr does not need and which take most of the time.
        prompts=BuildPrompts(safety=tiny.HARMFUL[:3], general=None),
        settings=BuildSettings(sparsity=0.5, amplification=0.7),
    )
    reference = LoadedReference(folder / "reference", "cpu")
    return realign(folder / "customer", reference, NlsrParameters(form="neuron"), folder / "out")
