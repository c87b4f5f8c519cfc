"""What a long build has already measured, beside its target: a build that was killed goes on where it was.

A folder `<out>.partial` of safetensors files, each written whole or not at all, and the fingerprint of everything that
decides their contents. Another fingerprint means another build: the folder is then emptied. The numbers and words that
go with a file's tensors are a tensor of bytes in it, so that neither can be there without the other.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safegraft.engine.statistics import Statistics
from safegraft.engine.tensors import NAMES, TensorReader, TensorWriter
from safegraft.files import atomic_file, write_atomic

FINGERPRINT, NOTE = "fingerprint.txt", "note"
# A checkpoint of an 8-billion-parameter model's moments is tens of gigabytes; more often would cost more than it saves.
SECONDS_BETWEEN = 60.0


class Checkpoint:
    """Tensors and notes by name, in a folder that the first of them makes; without one, in a temporary folder while it
    is `opened`."""

    def __init__(self, folder: Path | None = None, fingerprint: str = "") -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._saved_at = time.monotonic()
        if folder is None:
            return
        found = folder / FINGERPRINT
        if folder.is_dir() and not found.is_file() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise FileExistsError(f"{folder} exists already, and no unfinished build lies there.")
        if found.is_file() and found.read_text(encoding="utf-8") != fingerprint:
            self._empty(folder)
            write_atomic(found, fingerprint.encode())

    @staticmethod
    def _empty(folder: Path) -> None:
        """The fingerprint stays: without it a build that is killed here would leave a folder that nobody may empty."""
        for path in folder.iterdir():
            if path.name != FINGERPRINT:
                path.unlink()

    @contextmanager
    def opened(self) -> Iterator["Checkpoint"]:
        """Itself, with a folder for the length of the block."""
        if self._folder is not None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="safegraft-") as name:
            yield Checkpoint(Path(name) / "partial")

    def path(self, name: str) -> Path:
        assert self._folder is not None, "opened() gives it a folder"
        return self._folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return self._folder is not None and self.path(name).is_file()

    def meta(self, name: str) -> dict[str, Any]:
        with TensorReader(self.path(name)) as reader:
            found: dict[str, Any] = json.loads(reader.bytes(NOTE))
        return found

    def shapes(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Key → (safetensors dtype, shape)."""
        header = TensorReader(self.path(name)).header
        return {key: (entry.dtype, entry.shape) for key, entry in header.tensors.items() if key != NOTE}

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """What was kept under this name before stays until all of it is written."""
        assert self._folder is not None, "opened() gives it a folder"
        if not (self._folder / FINGERPRINT).is_file():
            write_atomic(self._folder / FINGERPRINT, self._fingerprint.encode())
        note = json.dumps(meta).encode()
        shapes = {key: (NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}
        with atomic_file(self.path(name)) as file:
            writer = TensorWriter(file, shapes | {NOTE: ("U8", (len(note),))})
            for key, tensor in tensors.items():
                writer.write(key, tensor)
            writer.write(NOTE, note)
            writer.close()

    def tensors(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        with TensorReader(self.path(name)) as reader:
            return {key: reader.tensor(key).to(device) for key in reader.header.tensors if key != NOTE}

    def remove(self) -> None:
        if self._folder is not None and self._folder.is_dir():
            self._empty(self._folder)
            shutil.rmtree(self._folder)

    def save_statistics(self, name: str, found: Statistics, *, final: bool = False) -> None:
        """Keeps the sums of a pass, once a minute and at its end."""
        if self._folder is None or (not final and time.monotonic() - self._saved_at < SECONDS_BETWEEN):
            return
        tensors = {
            f"{part}.{key}": tensor
            for part in ("second_moments", "means", "response_squares", "grams", "last")
            for key, tensor in getattr(found, part).items()
        }
        for key, (a, b) in found.gradients.items():
            tensors |= {f"gradient_a.{key}": a, f"gradient_b.{key}": b}
        meta = {
            "sites": found.sites,
            "tokens": found.tokens,
            "response_tokens": found.response_tokens,
            "done": found.done,
            "forward_passes": found.forward_passes,
        }
        self.save(name, tensors, meta)
        self._saved_at = time.monotonic()

    def statistics(self, name: str, device: str | torch.device) -> Statistics | None:
        """What `save_statistics` kept, on `device`; None where there is nothing."""
        if not self.has(name):
            return None
        found = Statistics(**self.meta(name))
        halves: dict[str, dict[str, Tensor]] = {"gradient_a": {}, "gradient_b": {}}
        for key, tensor in self.tensors(name).items():
            part, _, of = key.partition(".")
            if part in halves:
                halves[part][of] = tensor.to(device)
            else:
                # The last tokens are gathered in main memory, wherever the model is.
                getattr(found, part)[of] = tensor if part == "last" else tensor.to(device)
        found.gradients = {key: (a, halves["gradient_b"][key]) for key, a in halves["gradient_a"].items()}
        return found
