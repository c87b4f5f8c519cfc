"""The size of an update against the dense product, in every dtype that adapters come in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safegraft.adapter import WEIGHTS, describe
from safegraft.errors import InvalidTensors
from safegraft.sizes import update_sizes
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sizes_are_those_of_the_dense_product(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = tiny.save_adapter(base, tmp_path / "adapter", dtype=dtype)
    description = describe(adapter)
    seen: list[tuple[int, int]] = []
    found = update_sizes(adapter / WEIGHTS, description, lambda done, total: seen.append((done, total)))
    tensors = load_file(adapter / WEIGHTS)
    assert list(found) == [module.name for module in description.modules]
    for module in description.modules:
        dense = module.scaling * tensors[module.b.name].double() @ tensors[module.a.name].double()
        assert found[module.name] == pytest.approx(float(dense.square().mean().sqrt()), rel=1e-9)
    assert seen == [(done, len(found)) for done in range(1, len(found) + 1)]


def test_an_update_of_zeros_has_no_size(fresh: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in fresh.iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    tiny.change_tensors(adapter, lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()})
    assert set(update_sizes(adapter / WEIGHTS, describe(adapter)).values()) == {0.0}


def test_the_largest_numbers_of_a_dtype_do_not_overflow(fresh: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in fresh.iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    large = torch.finfo(torch.bfloat16).max
    tiny.change_tensors(adapter, lambda tensors: {name: tensor * 0 + large for name, tensor in tensors.items()})
    assert all(np.isfinite(size) for size in update_sizes(adapter / WEIGHTS, describe(adapter)).values())


def test_a_file_that_became_shorter_is_named(fresh: Path, tmp_path: Path) -> None:
    description = describe(fresh)
    short = tmp_path / WEIGHTS
    short.write_bytes((fresh / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(InvalidTensors, match="ends in this tensor"):
        update_sizes(short, description)
