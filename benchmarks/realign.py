"""`make bench`: realigning an adapter against copying its file, in turn, in one process with a warm reference.

The adapters have SmolLM2-135M's shapes (30 layers, 7 projections) and random factors; the reference has its shapes too,
with random statistics. For every method and rank: the median over pairs of (seconds of `realign`) / (seconds of copying
and syncing the same file). Writes benchmarks/results/realign.json.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.contracts.reference import PromptSet
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import BuildSettings, Ingredients, LoadedReference, write_bundle
from safegraft.engine.statistics import Statistics

LAYERS, HIDDEN, INNER, KEYS = 30, 576, 1536, 192
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SITE = {"k_proj": "self_attn.q_proj", "v_proj": "self_attn.q_proj", "up_proj": "mlp.gate_proj"}
RANKS = (8, 32, 128)
PAIRS = 5
RESULTS = Path(__file__).parent / "results" / "realign.json"


def write_adapter(folder: Path, rank: int) -> None:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [n.split(".")[1] for n in SHAPES],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(LAYERS):
        for name, (d, k) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, k, dtype=torch.bfloat16)
            tensors[f"{key}.lora_B.weight"] = torch.randn(d, rank, dtype=torch.bfloat16) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_reference(folder: Path, rank: int = 32) -> None:
    safety, general = Statistics(), Statistics()
    shapes, factors = {}, {}
    for layer in range(LAYERS):
        for name, (d, k) in SHAPES.items():
            full = f"model.layers.{layer}.{name}"
            shapes[full] = (d, k)
            factors[full] = (torch.randn(d, rank), torch.randn(rank, k))
            safety.grams[full] = torch.eye(rank, dtype=torch.float64)
            safety.sites[full] = f"model.layers.{layer}.{SITE.get(name.split('.')[1], name)}"
            if safety.sites[full] == full:
                for gathered in (safety, general):
                    x = torch.randn(2 * k, k)
                    gathered.second_moments[full] = x.T @ x / len(x)
    prompts = PromptSet(sha256="0" * 64, conversations=0, tokens=0, response_tokens=0, answered_by_model=False)
    ingredients = Ingredients(
        labels=["random"], config_sha256="0" * 64, architecture="random", dtype="float32", shapes=shapes,
        aligned_sha256="0" * 64, aligned_config_sha256="0" * 64,
            skipped_prefix=0, factors=factors, safety=safety, safety_prompts=prompts, general=general,
        general_prompts=prompts,
    )  # fmt: skip
    write_bundle(folder, ingredients, BuildSettings())


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        print("building a reference of SmolLM2-135M's shapes …")
        write_reference(work / "reference")
        reference = LoadedReference(work / "reference")
        for rank in RANKS:
            write_adapter(work / f"rank{rank}", rank)
            weights = work / f"rank{rank}" / "adapter_model.safetensors"
            for parameters in (NlsrParameters(form="neuron"), GramParameters()):
                ratios = []
                for turn in range(PAIRS + 1):
                    out = work / "out"
                    run = seconds(lambda out=out, p=parameters, r=rank: realign(work / f"rank{r}", reference, p, out))  # type: ignore[misc]
                    # A copy of a few megabytes takes milliseconds; one alone would be noise.
                    beside = statistics.median(seconds(lambda w=weights: copy(w, work / "copy")) for _ in range(5))  # type: ignore[misc]
                    shutil.rmtree(out)
                    if turn:  # the first warms both up
                        ratios.append(run / beside)
                rows.append(
                    {
                        "method": parameters.type,
                        "rank": rank,
                        "megabytes": round(weights.stat().st_size / 1e6, 1),
                        "ratio_to_copy": round(statistics.median(ratios), 1),
                        "spread": [round(min(ratios), 1), round(max(ratios), 1)],
                    }
                )
                low, high = rows[-1]["spread"]
                print(
                    f"{parameters.type:5} rank {rank:<4} {rows[-1]['megabytes']:6} MB: "
                    f"{rows[-1]['ratio_to_copy']} x copying and syncing the file (from {low} to {high})"
                )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "pairs": PAIRS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
