"""Tensors of safetensors files, read, compared and copied a piece at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safegraft.engine.tensors import PIECE, TORCH_DTYPES, TensorReader, TensorWriter, view_of_bytes
from safegraft.errors import InvalidTensors

# In bytes: less than one piece, just one, one and a bit, several.
SIZES = [8, PIECE - 8, PIECE, PIECE + 8, 3 * PIECE + 16]


def written(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("size", SIZES)
def test_pieces_are_the_tensors_bytes_in_order(tmp_path: Path, size: int) -> None:
    value = torch.randint(0, 256, (size,), dtype=torch.uint8)
    with TensorReader(written(tmp_path / "a", before=torch.ones(3), value=value, after=torch.ones(5))) as reader:
        # Each piece is copied at once: the next one comes in the same memory.
        pieces = [bytes(piece) for piece in reader.pieces("value")]
        assert b"".join(pieces) == reader.bytes("value") == bytes(value.numpy())
        assert all(len(piece) <= PIECE for piece in pieces)


@pytest.mark.parametrize("size", SIZES)
def test_the_same_bytes_are_told_from_others(tmp_path: Path, size: int) -> None:
    value = torch.randint(0, 256, (size,), dtype=torch.uint8)
    with TensorReader(written(tmp_path / "a", value=value)) as reader:
        assert reader.holds("value", view_of_bytes(value))
        for place in (0, size // 2, size - 1):
            other = value.clone()
            other[place] += 1
            assert not reader.holds("value", view_of_bytes(other)), place
        assert not reader.holds("value", view_of_bytes(value[:-1]))
        assert not reader.holds("value", view_of_bytes(torch.cat([value, value[:1]])))


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_every_dtype_is_read_written_and_copied(tmp_path: Path, name: str) -> None:
    value = (torch.randn(37, 11) * 50).to(TORCH_DTYPES[name])
    empty = torch.empty(0, 11, dtype=value.dtype)
    source = written(tmp_path / "a", value=value, empty=empty)
    shapes = {"value": (name, (37, 11)), "empty": (name, (0, 11)), "turned": (name, (11, 37))}
    with TensorReader(source) as reader, (tmp_path / "b").open("w+b") as file:
        assert torch.equal(reader.tensor("value"), value)
        assert reader.tensor("empty").shape == (0, 11)
        writer = TensorWriter(file, shapes)
        writer.copy("value", reader)
        writer.copy("empty", reader)
        # Its rows lie apart in memory: they are written in the tensor's order.
        writer.write("turned", reader.tensor("value").T)
        writer.close()
    found = load_file(tmp_path / "b")
    assert torch.equal(found["value"], value)
    assert torch.equal(found["turned"], value.T)
    assert found["empty"].shape == (0, 11)


def test_what_has_another_size_is_not_copied(tmp_path: Path) -> None:
    source = written(tmp_path / "a", value=torch.ones(4))
    with TensorReader(source) as reader, (tmp_path / "b").open("w+b") as file:
        writer = TensorWriter(file, {"value": ("F32", (5,))})
        with pytest.raises(ValueError, match="16 bytes do not fill 20"):
            writer.copy("value", reader)


def test_a_file_that_became_shorter_is_told_by_its_tensor(tmp_path: Path) -> None:
    path = written(tmp_path / "a", value=torch.ones(2 * PIECE))
    with TensorReader(path) as reader:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - PIECE)
        asked = (reader.tensor, reader.bytes, lambda name: list(reader.pieces(name)))
        for ask in asked:
            with pytest.raises(InvalidTensors) as caught:
                ask("value")
            assert (caught.value.code, caught.value.param) == ("truncated_file", "value")
