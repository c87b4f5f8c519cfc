"""What the services of a scoreboard are fed with: the tiny model's reference, and customers' adapters."""

from pathlib import Path

from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from tests import tiny
from tests.chaos.ground import Material


def make(folder: Path) -> Material:
    """As the fixtures of tests/conftest.py make them."""
    base, bundle = folder / "tiny-llama", folder / "bundle"
    tiny.save_model(base)
    aligned = tiny.save_adapter(base, folder / "aligned", seed=1)
    build_reference(
        bundle,
        sources=BuildSources(base=base, aligned=aligned, labels=["tiny-llama", str(base)]),
        prompts=BuildPrompts(safety=tiny.HARMFUL, general=tiny.GENERAL),
        settings=BuildSettings(sparsity=0.5),
    )
    adapters = (
        tiny.save_adapter(base, folder / "fresh", seed=3),
        tiny.continue_adapter(aligned, folder / "continued"),
        tiny.save_adapter(base, folder / "wide", seed=5, rank=6),
    )
    return Material(bundle, adapters)
