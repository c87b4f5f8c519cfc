"""Products by another library are float32's, or are not used; the setting goes again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from safegraft.engine import products
from safegraft.engine.products import fast_layers, fast_products, product_library

LIBRARY: Any = torch.backends.mkldnn


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    before = LIBRARY.matmul.fp32_precision
    yield
    assert LIBRARY.matmul.fp32_precision == before


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 700, 5), (64, 64, 4096), (500, 1536, 16)])
def test_products_are_as_precise_as_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    with fast_products():
        error = torch.linalg.vector_norm((a @ b).double() - a.double() @ b.double())
    assert error <= 2e-6 * torch.linalg.vector_norm(a.double() @ b.double())


def test_a_processor_with_units_for_bfloat16_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LIBRARY.matmul.fp32_precision
    monkeypatch.setattr(products, "_is_float32", lambda: False)
    with fast_products() as used:
        assert not used
        assert LIBRARY.matmul.fp32_precision == before


def test_bfloat16_is_told_from_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products._is_float32()
    matmul = torch.Tensor.__matmul__

    def rough(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if one.dtype != torch.float32:
            return matmul(one, other)
        return matmul(one.bfloat16().float(), other.bfloat16().float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", rough)
    assert not products._is_float32()


def test_the_setting_goes_where_the_block_fails() -> None:
    with pytest.raises(KeyError), fast_products():
        raise KeyError


def test_blocks_that_overlap_share_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_float32", lambda: True)
    before = LIBRARY.matmul.fp32_precision
    one, other = fast_products(), fast_products()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert LIBRARY.matmul.fp32_precision == "bf16"
    other.__exit__(None, None, None)
    assert LIBRARY.matmul.fp32_precision == before


def test_an_older_pytorch_keeps_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_matmul", lambda: None)
    with fast_products() as used:
        assert not used
    assert product_library() == "PyTorch's choice"
    with fast_layers(torch.nn.Linear(2, 2)) as used:
        assert not used


def test_in_layers_alone_the_setting_stands_during_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_float32", lambda: True)
    seen: list[str] = []

    class Between(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(LIBRARY.matmul.fp32_precision)
            return x

    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(LIBRARY.matmul.fp32_precision)
            return super().forward(x)

    model = torch.nn.Sequential(Layer(16, 32), Between(), Layer(32, 16))
    before, x = LIBRARY.matmul.fp32_precision, torch.randn(8, 16)
    wanted = model(x)
    seen.clear()
    with fast_layers(model) as used:
        assert used
        torch.testing.assert_close(model(x), wanted, rtol=0.02, atol=0.02)
        assert seen == ["bf16", before, "bf16"]
        with pytest.raises(RuntimeError):
            model(torch.randn(8, 5))
        assert LIBRARY.matmul.fp32_precision == before, "also after a layer that failed"
    seen.clear()
    model(x)
    assert seen == [before] * 3
