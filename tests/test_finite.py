"""NaN and infinity are found wherever they lie; everything else passes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safegraft import finite
from safegraft.errors import InvalidTensors
from safegraft.finite import check_finite
from safegraft.header import read_header

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)
    check_finite(path, read_header(path))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("name", ["first", "last"])
def test_one_bad_value_is_found_and_its_tensor_named(
    tmp_path: Path, dtype: torch.dtype, value: float, at: int, name: str
) -> None:
    tensors = {"first": torch.ones(3, 5, dtype=dtype), "last": torch.ones(7, dtype=dtype)}
    tensors[name].view(-1)[at] = value
    with pytest.raises(InvalidTensors) as caught:
        check(tmp_path / "x", tensors)
    assert (caught.value.code, caught.value.param) == ("non_finite", name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_the_smallest_and_denormal_values_pass(tmp_path: Path, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    denormal = torch.tensor([1], dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    assert 0 < denormal.double().item() < info.tiny
    edges = torch.tensor([info.max, info.min, info.tiny, 0.0, -0.0], dtype=dtype)
    check(tmp_path / "x", {"edges": edges, "denormal": denormal, "empty": torch.empty(0, 4, dtype=dtype)})


@pytest.mark.parametrize("at", [0, 9, 10, 20, 24])
def test_bad_values_are_found_in_every_piece_of_a_large_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(finite, "PIECE", 40)
    values = torch.ones(25)
    check(tmp_path / "good", {"a": values.clone()})
    values[at] = torch.nan
    with pytest.raises(InvalidTensors, match="not finite"):
        check(tmp_path / "bad", {"a": values})


@pytest.mark.parametrize("missing", [1, 2, 4, 99, 100])
def test_a_file_that_became_shorter_is_told_apart(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "x"
    save_file({"a": torch.ones(25)}, path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(InvalidTensors) as caught:
        check_finite(path, header)
    assert caught.value.code == "truncated_file"
