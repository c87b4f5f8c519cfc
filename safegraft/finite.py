"""Are all values of a safetensors file finite? By numpy on the raw bits, in pieces, so that the gateway can ask.

PEFT loads NaN without a word and then answers like the base model, or not at all: for a safety product the worst
failure, hence one more pass over the bytes before an upload is accepted.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from safegraft.errors import InvalidTensors
from safegraft.header import Header, TensorEntry

# dtype → (unsigned integer of the same width, its exponent bits): all exponent bits set means infinite or NaN.
EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
PIECE = 2**22


def check_finite(path: Path, header: Header, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Raises InvalidTensors (`non_finite`) with the name of the first tensor that holds a NaN or an infinity.

    progress: called with tensors read and in all.
    """
    with path.open("rb") as file:
        for done, entry in enumerate(header.tensors.values()):
            progress(done, len(header.tensors))
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                asked = min(PIECE, left)
                piece = file.read(asked)
                left -= asked
                if len(piece) != asked:
                    raise InvalidTensors(f"{entry.name}: the file ends in this tensor.", code="truncated_file")
                if not _finite(entry, piece):
                    raise InvalidTensors(
                        f"{entry.name} holds values that are not finite (NaN or infinity).",
                        code="non_finite",
                        param=entry.name,
                        hint="The training diverged; use an earlier checkpoint.",
                    )


def _finite(entry: TensorEntry, piece: bytes) -> bool:
    kind, exponent = EXPONENT[entry.dtype]
    bits = np.frombuffer(piece, dtype=kind)
    return not bool(np.any((bits & bits.dtype.type(exponent)) == exponent))
