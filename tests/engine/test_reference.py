"""Loading a bundle: tensors as they were written, where they lie, and what is refused."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safegraft.adapter import WEIGHTS
from safegraft.bundle import GRAM, MANIFEST, NLSR, SAFETYLOCK, read_manifest, reference_id
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.reference import LoadedReference, magnitude_neurons, random_neurons
from safegraft.errors import CorruptReference
from tests.engine.random_bundle import NAME, Toy

SITE = "model.layers.0.self_attn.q_proj"
OUTPUT = "model.layers.1.self_attn.o_proj"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def bits(packed: Tensor, *shape: int) -> Tensor:
    """Eight entries a byte, the first in the highest bit."""
    flat = [bool(byte >> (7 - at) & 1) for byte in packed.tolist() for at in range(8)]
    count = int(torch.tensor(shape).prod())
    assert not any(flat[count:])
    return torch.tensor(flat[:count]).reshape(shape)


def test_tensors_are_those_of_the_files(bundle: Path, reference: LoadedReference) -> None:
    nlsr, gram, heads = (load_file(bundle / name) for name in (NLSR, GRAM, SAFETYLOCK))
    for name, module in reference.manifest.base_model.modules.items():
        b, a = reference.aligned(name) or (None, None)
        assert a is not None
        assert b is not None
        # α/r of the tiny adapter is 2.
        assert torch.equal(a, nlsr[f"{name}.A"].float())
        assert torch.equal(b, 2.0 * nlsr[f"{name}.B"].float())
        pairs = reference.pairs(name)
        assert torch.equal(pairs.mu, gram[f"{module.site}.mu"])
        assert torch.equal(pairs.v, gram[f"{module.site}.V"].float())
        assert torch.equal(pairs.w, gram[f"{module.site}.W"].float())
        for scorer in reference.manifest.scorers:
            found = reference.neurons(name, scorer)
            assert torch.equal(found.mask_a, bits(nlsr[f"{name}.mask_A.{scorer}"], 4, module.inputs))
            assert torch.equal(found.mask_b, bits(nlsr[f"{name}.mask_B.{scorer}"], module.outputs, 4))
            assert torch.equal(found.rows, bits(nlsr[f"{name}.rows.{scorer}"], module.outputs))
    kept = reference.heads(OUTPUT)
    for part in ("directions", "sigma", "shift", "mean", "constant"):
        assert torch.equal(getattr(kept, part), heads[f"{OUTPUT}.{part}"])


def test_it_knows_itself_by_its_manifest(bundle: Path, reference: LoadedReference) -> None:
    manifest, digest = read_manifest(bundle)
    assert reference.manifest == manifest
    assert reference.sha256 == digest
    assert reference.id == reference_id(digest)
    assert reference.amplification == manifest.parameters.amplification == 0.9


def test_a_module_that_the_aligned_update_does_not_reach_has_none(reference: LoadedReference) -> None:
    assert reference.reaches(SITE)
    assert not reference.reaches("model.layers.9.mlp")
    assert reference.aligned("model.layers.9.mlp") is None
    assert reference.weak("model.layers.9.mlp") is None
    assert reference.amplified("model.layers.9.mlp", 0.5) is None
    assert reference.surplus("model.layers.9.mlp", 0.5) is None
    assert reference.amplified_rank("model.layers.9.mlp", 0.5) == 0


def test_without_a_weak_adapter_amplifying_scales(aligned: Path, reference: LoadedReference) -> None:
    tensors = load_file(aligned / WEIGHTS)
    a, b = (tensors[f"base_model.model.{SITE}.lora_{side}.weight"].double() for side in "AB")
    delta = 2.0 * b @ a
    for beta in (0.0, 0.5, 3.0):
        amplified = reference.amplified(SITE, beta)
        assert amplified is not None
        torch.testing.assert_close(amplified[0].double() @ amplified[1].double(), (1 + beta) * delta)
        torch.testing.assert_close(reference.amplified_on_a(SITE, beta).double() @ a, (1 + beta) * delta)
        surplus = reference.surplus(SITE, beta)
        assert (surplus is None) == (beta == 0.0)
        if surplus is not None:
            torch.testing.assert_close(surplus[0].double() @ surplus[1].double(), beta * delta)
    assert reference.weak(SITE) is None
    assert reference.amplified_rank(SITE, 0.5) == 4


def test_what_a_job_does_to_a_tensor_no_other_job_sees(reference: LoadedReference) -> None:
    first = reference.pairs(SITE)
    wanted = first.v.clone()
    first.v.zero_()
    update = reference.aligned(SITE)
    assert update is not None
    for tensor in update:
        tensor.zero_()
    assert torch.equal(reference.pairs(SITE).v, wanted)
    again = reference.aligned(SITE)
    assert again is not None
    assert bool(again[0].any())
    assert bool(again[1].any())


def test_on_the_cpu_nothing_stays_in_memory_and_on_a_device_everything_does(bundle: Path) -> None:
    assert not LoadedReference(bundle)._resident
    # The device that every machine has: its tensors have no values, but they are elsewhere.
    elsewhere = LoadedReference(bundle, "meta")
    assert set(elsewhere._resident) == {key for name in (NLSR, GRAM, SAFETYLOCK) for key in load_file(bundle / name)}
    tensors = [*vars(elsewhere.pairs(SITE)).values(), *vars(elsewhere.heads(OUTPUT)).values()]
    tensors += [*(elsewhere.aligned(SITE) or ()), *(elsewhere.amplified(SITE, 0.5) or ())]
    assert len(tensors) == 3 + 5 + 2 + 2
    assert all(tensor.is_meta for tensor in tensors)


def test_closing_gives_files_and_memory_back(bundle: Path) -> None:
    loaded = LoadedReference(bundle)
    files = [reader._file for reader in set(loaded._reader_of.values())]
    assert len(files) == 3
    loaded.close()
    assert all(file is not None and file.closed for file in files)
    with pytest.raises(ValueError, match="closed file"):
        loaded.pairs(SITE)
    elsewhere = LoadedReference(bundle, "meta")
    elsewhere.close()
    assert not elsewhere._resident
    # Twice does no harm.
    elsewhere.close()


def test_what_nobody_uses_any_more_is_closed(bundle: Path) -> None:
    loaded = LoadedReference(bundle)
    files = [reader._file for reader in set(loaded._reader_of.values())]
    gone = weakref.ref(loaded)
    del loaded
    gc.collect()
    assert gone() is None
    assert all(file is not None and file.closed for file in files)


def test_a_reference_that_is_removed_while_it_is_in_use_stays_readable(copy: Path, reference: LoadedReference) -> None:
    loaded = LoadedReference(copy)
    shutil.rmtree(copy)
    assert torch.equal(loaded.pairs(SITE).v, reference.pairs(SITE).v)
    assert torch.equal(loaded.heads(OUTPUT).shift, reference.heads(OUTPUT).shift)


@pytest.mark.parametrize("version", [1, 3, "2", None, "missing"])
def test_a_bundle_of_another_form_is_refused_with_what_to_do(copy: Path, version: Any) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    if version == "missing":
        del manifest["schema_version"]
    else:
        manifest["schema_version"] = version
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorruptReference) as caught:
        LoadedReference(copy)
    assert caught.value.code == "reference_version"
    assert caught.value.param == str(copy / MANIFEST)
    assert caught.value.hint == "Build the reference again."


@pytest.mark.parametrize("name", [NLSR, GRAM, SAFETYLOCK])
@pytest.mark.parametrize("at", [9, -1])
def test_a_file_with_a_flipped_bit_is_refused_by_name(copy: Path, name: str, at: int) -> None:
    raw = bytearray((copy / name).read_bytes())
    raw[at] ^= 1
    (copy / name).write_bytes(raw)
    with pytest.raises(CorruptReference) as caught:
        LoadedReference(copy)
    assert (caught.value.code, caught.value.param) == ("corrupt_reference", str(copy / name))


def test_the_leading_eigenpairs_are_the_first(reference: LoadedReference) -> None:
    everything, two = reference.pairs(SITE), reference.pairs(SITE, 2)
    assert torch.equal(two.mu, everything.mu[:2])
    assert torch.equal(two.v, everything.v[:, :2])
    assert torch.equal(two.w, everything.w[:, :2])


def test_random_neurons_of_a_module_depend_on_its_name_and_the_seed_alone(reference: LoadedReference) -> None:
    first, again = (random_neurons(reference, SITE, 1) for _ in range(2))
    assert all(map(torch.equal, vars(first).values(), vars(again).values()))
    for other in (random_neurons(reference, SITE, 2), random_neurons(reference, SITE.replace("0", "1"), 1)):
        assert not torch.equal(first.mask_a, other.mask_a)
    # Half of each row, as the bundle was built.
    assert first.mask_a.sum(dim=1).tolist() == [16] * 4
    assert first.mask_b.sum(dim=1).tolist() == [2] * 32
    assert int(first.rows.sum()) == 16


def test_magnitude_takes_the_largest_of_the_amplified_update(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "toy", d=4, k=6, r=2, seed=3, settings=BuildSettings(sparsity=0.5), weak_rank=1)
    assert toy.weak is not None
    found = magnitude_neurons(toy.reference, NAME)
    delta = 1.9 * toy.b.double() @ toy.a.double() - 0.9 * toy.weak[0].double() @ toy.weak[1].double()
    assert set(found.rows.nonzero()[:, 0].tolist()) == set(delta.norm(dim=1).argsort(descending=True)[:2].tolist())
    for row, kept in zip(toy.a.abs(), found.mask_a, strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == set(row.argsort(descending=True)[:3].tolist())


def test_what_depends_on_the_reference_alone_is_computed_once_and_not_kept_without_end(
    reference: LoadedReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def number(value: int) -> float:
        def computed() -> float:
            asked.append(value)
            return float(value)

        return reference.remembered(("number", value), computed)

    assert [number(value) for value in (1, 2, 1, 2)] == [1.0, 2.0, 1.0, 2.0]
    assert asked == [1, 2]
    monkeypatch.setattr("safegraft.engine.reference._REMEMBERED", 10)
    assert [number(value) for value in range(100)] == [float(value) for value in range(100)]
    assert len(reference._remembered) <= 10
