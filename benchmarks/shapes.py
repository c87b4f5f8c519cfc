"""Adapters and references in the shapes of real models, with random numbers in them.

Written tensor by tensor, so that those of an 8-billion-parameter model fit on a small machine. What is measured on them
is time and memory: no number in them means anything.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from safegraft.bundle import GRAM, MANIFEST, NLSR, SAFETYLOCK
from safegraft.contracts.reference import (
    AlignedModule,
    BaseModelIdentity,
    BaseModule,
    BuildParameters,
    BundleFile,
    GramStatistics,
    HeadLayer,
    Origin,
    PromptSet,
    ReferenceManifest,
    SafetyLockStatistics,
)
from safegraft.engine.bundle import served
from safegraft.engine.lowrank import pack_mask
from safegraft.engine.tensors import NAMES, TensorWriter
from safegraft.files import sha256_file

SPARSITY = 0.8


@dataclass(frozen=True)
class Shape:
    """A transformer with grouped-query attention: sizes of the hidden state, of the MLP and of keys and values."""

    name: str
    layers: int
    hidden: int
    inner: int
    keys: int
    heads: int

    def modules(self) -> dict[str, tuple[int, int]]:
        """Name → (outputs, inputs), in the model's order."""
        h, i, k = self.hidden, self.inner, self.keys
        kinds = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (k, h),
            "self_attn.v_proj": (k, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
        }
        return {f"model.layers.{n}.{kind}": size for n in range(self.layers) for kind, size in kinds.items()}

    def site(self, module: str) -> str:
        """The first of the modules that read the same input."""
        parent, _, kind = module.rpartition(".")
        return f"{parent}.{({'k_proj': 'q_proj', 'v_proj': 'q_proj', 'up_proj': 'gate_proj'}).get(kind, kind)}"


SMOLLM2_135M = Shape("SmolLM2-135M", 30, 576, 1536, 192, 9)
LLAMA_32_1B = Shape("Llama-3.2-1B", 16, 2048, 8192, 512, 32)
LLAMA_3_8B = Shape("Llama-3-8B", 32, 4096, 14336, 1024, 32)


def write_adapter(folder: Path, shape: Shape, rank: int) -> None:
    """A bf16 adapter on every linear layer."""
    folder.mkdir()
    modules = shape.modules()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (d, k) in modules.items():
        shapes |= {
            f"base_model.model.{name}.lora_A.weight": ("BF16", (rank, k)),
            f"base_model.model.{name}.lora_B.weight": ("BF16", (d, rank)),
        }
    _write(folder / "adapter_model.safetensors", shapes, {"lora_B": 0.01})


def write_reference(folder: Path, shape: Shape, *, rank: int, pairs: int) -> None:
    """A bundle for every method: `rank` of the aligned adapter, `pairs` eigenpairs a layer input."""
    folder.mkdir()
    modules = shape.modules()
    sites = sorted({shape.site(name) for name in modules})
    nlsr: dict[str, tuple[str, tuple[int, ...]]] = {}
    masks: dict[str, tuple[int, ...]] = {}
    for name, (d, k) in modules.items():
        masks |= {
            f"{name}.mask_A.low_rank": (rank, k), f"{name}.mask_B.low_rank": (d, rank), f"{name}.rows.low_rank": (d,),
        }  # fmt: skip
        nlsr |= {
            f"{name}.A": ("BF16", (rank, k)),
            f"{name}.B": ("BF16", (d, rank)),
            f"{name}.G": ("F64", (rank, rank)),
            f"{name}.mask_A.low_rank": ("U8", (-(-rank * k // 8),)),
            f"{name}.mask_B.low_rank": ("U8", (-(-d * rank // 8),)),
            f"{name}.rows.low_rank": ("U8", (-(-d // 8),)),
        }
    _write(folder / NLSR, nlsr, {".B": 0.01}, masks)
    gram: dict[str, tuple[str, tuple[int, ...]]] = {}
    for site in sites:
        k = modules[site][1]
        gram |= {f"{site}.V": ("BF16", (k, pairs)), f"{site}.W": ("BF16", (k, pairs)), f"{site}.mu": ("F32", (pairs,))}
    _write(folder / GRAM, gram, {".V": 0.01, ".W": 0.01})
    heads: dict[str, tuple[str, tuple[int, ...]]] = {}
    outputs = [name for name in modules if name.endswith("o_proj")]
    for name in outputs:
        d, k = modules[name]
        heads |= {
            f"{name}.directions": ("F32", (shape.heads, k // shape.heads)),
            f"{name}.sigma": ("F32", (shape.heads,)),
            f"{name}.shift": ("F32", (shape.heads, d)),
            f"{name}.mean": ("F32", (k,)),
            f"{name}.constant": ("F32", (k,)),
        }
    _write(folder / SAFETYLOCK, heads, {})
    prompts = PromptSet(
        sha256="0" * 64, conversations=0, tokens=0, response_tokens=0, answered_by_model=False, forward_passes=0
    )
    methods, lineages = served(aligned=True, gram=True, heads=True)
    manifest = ReferenceManifest(
        name=folder.name,
        created_at=int(time.time()),
        safegraft_version="0",
        base_model=BaseModelIdentity(
            labels=[shape.name],
            config_sha256="0" * 64,
            architecture="random",
            modules={
                name: BaseModule(outputs=d, inputs=k, site=shape.site(name)) for name, (d, k) in modules.items()
            },
        ),
        origin=Origin(source="adapter", files={}),
        aligned={name: AlignedModule(rank=rank, scaling=2.0, norm=1.0) for name in modules},
        scorers=["low_rank"],
        safety_prompts=prompts,
        general_prompts=prompts,
        unsafe_prompts=prompts,
        parameters=BuildParameters(
            amplification=0.9, sparsity=SPARSITY, mask_scope="row", ridge=1e-2, smallest_pair=0.0, max_pairs=pairs,
            max_tokens=1024, answer_tokens=32, batch_size=8, skipped_prefix=0, rank=None, dtype="bfloat16",
            device="cpu",
        ),
        gram=GramStatistics(pairs=dict.fromkeys(sites, pairs), energy=dict.fromkeys(sites, 1.0)),
        safetylock=SafetyLockStatistics(
            source="random",
            layers=dict.fromkeys(
                outputs,
                HeadLayer(
                    heads=shape.heads, accuracy=[0.9] * shape.heads, separation=[2.0] * shape.heads, unexplained=0.1
                ),
            ),
        ),
        methods=methods,
        lineages=lineages,
        files={
            path.name: BundleFile(sha256=sha256_file(path), bytes=path.stat().st_size)
            for path in sorted(folder.glob("*.safetensors"))
        },
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def _write(
    path: Path,
    shapes: dict[str, tuple[str, tuple[int, ...]]],
    scales: dict[str, float],
    masks: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    with path.open("w+b") as file:
        writer = TensorWriter(file, shapes)
        for name, (dtype, size) in shapes.items():
            scale = next((value for part, value in scales.items() if part in name), 1.0)
            writer.write(name, _mask(masks[name]) if name in masks else _random(dtype, size, scale))
        writer.close()


def _mask(size: tuple[int, ...]) -> Tensor:
    """Packed, with as many ones in each row as a reference has: one row drawn by chance, the others are it, rolled."""
    *rows, columns = size
    chosen = torch.zeros(columns, dtype=torch.bool)
    chosen[torch.randperm(columns)[: max(1, round((1.0 - SPARSITY) * columns))]] = True
    if rows:
        places = torch.arange(columns) + torch.randint(0, columns, (rows[0], 1))
        chosen = chosen[places % columns]
    return pack_mask(chosen)


def _random(dtype: str, size: tuple[int, ...], scale: float) -> Tensor:
    kinds = {name: kind for kind, name in NAMES.items()}
    value = torch.randn(size) * scale
    return (value.abs() if len(size) == 1 else value).to(kinds[dtype])
