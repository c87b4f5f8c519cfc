"""The record of an adapter folder: what the API shows, derived from its files alone."""

import time
from pathlib import Path

from safegraft.adapter import WEIGHTS, AdapterDescription
from safegraft.contracts.adapter import Adapter, AdapterFile, Compatibility, Origin, Servable
from safegraft.files import sha256_file

# vLLM's default limit, and the ranks it has kernels for.
VLLM_DEFAULT_MAX_RANK = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def adapter_record(
    adapter_id: str,
    name: str,
    folder: Path,
    description: AdapterDescription,
    *,
    dropped: list[str],
    origin: Origin,
) -> Adapter:
    """The record of the sound adapter in `folder`. Hashes every file once."""
    files = [
        AdapterFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(folder.iterdir())
    ]
    config = description.config
    return Adapter(
        id=adapter_id,
        name=name or adapter_id,
        base_model=config.base_model_name_or_path,
        rank=config.r,
        alpha=config.lora_alpha,
        target_modules=description.kinds,
        modules=len(description.modules),
        parameters=description.parameters,
        dtype=description.dtype,
        bytes=sum(file.bytes for file in files),
        sha256=next(file.sha256 for file in files if file.name == WEIGHTS),
        files=files,
        dropped_files=dropped,
        compatibility=compatibility(description),
        origin=origin,
        created_at=int(time.time()),
    )


def compatibility(description: AdapterDescription) -> Compatibility:
    """Which servers load an adapter of this form, as far as its configuration and keys tell."""
    ranks = {module.rank for module in description.modules}
    scalings = {round(module.scaling, 9) for module in description.modules}
    uneven = len(ranks) > 1 or len(scalings) > 1
    per_module = Servable(ok=False, reason="ranks or scalings differ between modules (rank_pattern, alpha_pattern)")
    highest = max(ranks)
    if uneven:
        vllm = per_module
    elif highest > VLLM_RANKS[-1]:
        vllm = Servable(ok=False, reason=f"rank {highest} is above vLLM's largest, {VLLM_RANKS[-1]}")
    elif highest > VLLM_DEFAULT_MAX_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= highest)
        vllm = Servable(ok=True, reason=f"needs --max-lora-rank {needed}")
    else:
        vllm = Servable(ok=True)
    if description.config.lora_bias:
        biased = Servable(ok=False, reason="carries biases (lora_bias), which only PEFT loads")
        return Compatibility(peft=Servable(ok=True), vllm=biased, lorax=biased, tgi=biased)
    # The servers look for lora_A.weight; so does PEFT before 0.21, which drops other keys without a word.
    if not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in description.header.tensors):
        unnamed = Servable(ok=False, reason="keys carry an adapter name (lora_A.default.weight)")
        return Compatibility(peft=unnamed, vllm=unnamed, lorax=unnamed, tgi=unnamed)
    peft = Servable(ok=True)
    even = per_module if uneven else Servable(ok=True)
    return Compatibility(peft=peft, vllm=vllm, lorax=even, tgi=even)
