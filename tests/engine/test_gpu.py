"""On a GPU: the same repair as on the CPU, within what sums in another order can differ. Skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safegraft.contracts.methods import (
    AntidoteParameters,
    GramParameters,
    NlsrParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# Of a module's norm. Float32 products of some thousand terms differ by 1e-6; recompression divides by gaps between
# singular values, and masks could only differ where two scores are equal to the last bits.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "parameters",
    [
        NlsrParameters(),
        NlsrParameters(form="neuron"),
        GramParameters(),
        GramParameters(amplification=0.5),
        SafeLoraParameters(threshold=1.0),
        AntidoteParameters(basis="rows"),
        SafetyLockParameters(heads=3),
    ],
    ids=lambda p: p.type,
)
@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_a_gpu_repairs_like_the_cpu(
    base: Path, bundle: Path, aligned: Path, tmp_path: Path, lineage: str, parameters: Any
) -> None:
    if lineage == "fresh":
        folder = tiny.save_adapter(base, tmp_path / "in", seed=3, dtype=torch.float32)
    else:
        folder = tiny.continue_adapter(aligned, tmp_path / "in")
        tiny.change_tensors(folder, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    reports, updates = [], []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        reports.append(realign(folder, LoadedReference(bundle, device), parameters, out))
        tensors = load_file(out / "adapter_model.safetensors")
        names = {name.rpartition(".lora_")[0] for name in tensors}
        updates.append({n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names})
    for one, other in zip(reports[0].modules, reports[1].modules, strict=True):
        assert one.repaired == other.repaired
        assert one.similarity_after == pytest.approx(other.similarity_after, abs=TOLERANCE)
    for name, update in updates[0].items():
        assert float((update - updates[1][name]).norm()) <= TOLERANCE * float(update.norm())
