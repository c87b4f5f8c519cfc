"""Cheap rivals and controls that are no methods of the engine, as dense updates of one module after the other.

Each takes what a repair could know: the customer's update, the aligned adapter, the reference, safety inputs. Updates
are relative to the untouched base, so that a fresh adapter's contains the aligned one's.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.evidence.subject import Subject, Updates
from benchmarks.evidence.training import merged
from examples.train import REFUSALS
from safegraft.adapter import describe
from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.engine.adapter import AdapterReader
from safegraft.engine.conversations import Conversation, batches, encode
from safegraft.engine.methods.base import Kinship
from safegraft.engine.methods.gram import Gram
from safegraft.engine.methods.nlsr import Nlsr
from safegraft.engine.models import load_model
from safegraft.engine.reference import LoadedReference

Where = Literal["half", "mlp", "attention", "neurons", "similarity"]


@dataclass(frozen=True)
class Setting:
    """One customer's adapter, what it sits on, and what the operator has."""

    adapter: Path
    aligned: Path
    base: Path
    on_aligned: bool
    reference: LoadedReference
    subject: Subject
    safety: list[Conversation]


def updates(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → (s·B, A), float32."""
    description = describe(folder, own=True)
    with AdapterReader(folder, description) as reader:
        return {item.name: reader.module(item).update for item in description.modules}


def dense(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, (b, a) in updates(folder).items():
        yield name, b @ a


def below(setting: Setting) -> Iterator[tuple[str, Tensor]]:
    """What a fresh adapter sits on; nothing for a continued one, which contains it."""
    if setting.on_aligned:
        yield from dense(setting.aligned)


def interpolated(setting: Setting, share: float) -> Updates:
    """(1 − share)·customer + share·aligned (WiSE-FT; several libraries' "realignment")."""
    aligned = updates(setting.aligned)
    for name, (b, a) in updates(setting.adapter).items():
        yield name, (1.0 - share) * (b @ a)
        if not setting.on_aligned and name in aligned:
            yield name, share * (aligned[name][0] @ aligned[name][1])
    yield from below(setting)


def with_safety_vector(setting: Setting, weight: float) -> Updates:
    """Customer + weight·(aligned − base) (task arithmetic; RESTA)."""
    yield from dense(setting.adapter)
    for name, update in dense(setting.aligned):
        yield name, weight * update
    yield from below(setting)


def rescaled(setting: Setting) -> Updates:
    """The customer's update made smaller: of each module's as much is kept as `gram` keeps, without its direction."""
    aligned = {} if setting.on_aligned else dict(dense(setting.aligned))
    for name, own, repaired in _before_and_after(setting):
        low = aligned.get(name, torch.zeros(()))
        # Relative to the aligned model, which a continued adapter contains.
        change = own - low
        kept = float((change * (repaired - low)).sum() / change.square().sum().clamp_min(1e-12))
        yield name, low + change * min(1.0, max(0.0, kept))
    yield from below(setting)


def perturbed(setting: Setting, seed: int = 0) -> Updates:
    """The customer's update with a random edit as large as `gram`'s, and in the span of its own output directions."""
    generator = torch.Generator().manual_seed(seed)
    factors = updates(setting.adapter)
    for name, own, repaired in _before_and_after(setting):
        b, a = factors[name]
        noise = b @ torch.randn(a.shape, generator=generator)
        yield name, own + noise * ((repaired - own).norm() / noise.norm().clamp_min(1e-12))
    yield from below(setting)


def _before_and_after(setting: Setting) -> Iterator[tuple[str, Tensor, Tensor]]:
    description = describe(setting.adapter)
    method = Gram(GramParameters(), setting.reference, _kinship(setting))
    with AdapterReader(setting.adapter, description) as reader, torch.inference_mode():
        for item in description.modules:
            module = reader.module(item)
            proposal = method.propose(module)
            b, a = module.update
            yield item.name, b @ a, module.scaling * (proposal.b @ proposal.a)


def zeroed(setting: Setting) -> Updates:
    """What `nlsr` would transplant, set to zero instead, in every module."""
    description = describe(setting.adapter)
    method = Nlsr(NlsrParameters(skip_share=0.0), setting.reference, _kinship(setting))
    with AdapterReader(setting.adapter, description) as reader, torch.inference_mode():
        for item in description.modules:
            b, a = reader.module(item).update
            if setting.reference.reaches(item.name):
                safe = setting.reference.neurons(item.name, "low_rank")
                if method.form == "neuron":
                    b = b * ~safe.rows[:, None]
                else:
                    b, a = b * ~safe.mask_b, a * ~safe.mask_a
            yield item.name, b @ a
    yield from below(setting)


def combined(setting: Setting, where: Where) -> Updates:
    """`gram` with something else deciding where: in some modules (the half that acts least alike on safety and general
    inputs, MLPs, attention), in NLSR's safety-critical output rows alone, or with a λ that follows a module's
    similarity."""
    description = describe(setting.adapter)
    usual = Gram(GramParameters(), setting.reference, _kinship(setting))
    with AdapterReader(setting.adapter, description) as reader, torch.inference_mode():
        shares = {item.name: usual.similarity(reader.module(item)) for item in description.modules}
        middle = median(shares.values())
        for item in description.modules:
            name, module, method = item.name, reader.module(item), usual
            b, a = module.update
            own = b @ a
            if where == "similarity":
                # From half to twice the default, as the share goes from half the usual one to twice.
                weight = GramParameters().general_weight * min(2.0, max(0.5, shares[name] / middle))
                method = Gram(GramParameters(general_weight=weight), setting.reference, _kinship(setting))
            proposal = method.propose(module)
            repaired = module.scaling * (proposal.b @ proposal.a)
            chosen = {
                "similarity": True,
                "half": shares[name] <= middle,
                "mlp": ".mlp." in name,
                "attention": ".mlp." not in name,
                "neurons": setting.reference.reaches(name),
            }[where]
            if not chosen:
                yield name, own
            elif where == "neurons":
                rows = setting.reference.neurons(name, "low_rank").rows
                yield name, torch.where(rows[:, None], repaired, own)
            else:
                yield name, repaired
    yield from below(setting)


def _kinship(setting: Setting) -> Kinship:
    return Kinship("fresh", 0.0, False) if setting.on_aligned else Kinship("continued", 1.0, True)


def safe_delta(setting: Setting, threshold: float, keep_out: float = 0.15, block: int = 2048) -> Updates:
    """SafeDelta (arXiv 2505.12038): keep the fine-tuning's largest gains under a bound of safety lost, compensate it.

    Entry by entry of the full update δ: its cost is δ²/[H⁻¹] with H = 2·E[xxᵀ] on safety inputs of the aligned model;
    the cheapest columns first are kept until the costs reach threshold/2·mean(1/[H⁻¹]²)·d/4096 in each block of 2,048
    columns (the authors' setting, as is the half), and what is dropped is
    made up for in later columns as optimal brain surgeons do. Columns are treated one by one (the authors' code takes
    four at a time) and the last 15 % are never kept, as in theirs.
    """
    moments = _moments(setting)
    aligned = updates(setting.aligned)
    for name, (b, a) in updates(setting.adapter).items():
        low = aligned.get(name)
        # Relative to the aligned model.
        start = torch.zeros(b.shape[0], a.shape[1])
        delta = b @ a if setting.on_aligned or low is None else b @ a - low[0] @ low[1]
        kept = _select_and_compensate(start, delta, moments[name], threshold / 2, keep_out, block)
        yield name, kept
        if low is not None:
            yield name, low[0] @ low[1]


def _select_and_compensate(
    start: Tensor, delta: Tensor, h: Tensor, threshold: float, keep_out: float, block: int
) -> Tensor:
    """The update (d, k) that is kept of `delta`."""
    columns = h.shape[0]
    h = 2.0 * h
    diagonal = torch.arange(columns)
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    h[diagonal, diagonal] += 0.01 * h.diagonal().mean()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h.double())), upper=True).float()
    out = start.clone()
    for first in range(0, columns, block):
        last = min(first + block, columns)
        own, wanted, part = out[:, first:last].clone(), delta[:, first:last], factor[first:last, first:last]
        scale = part.diagonal().reshape(1, -1) ** 2
        importance = (1.0 / scale).expand_as(own)
        # The customer's weights against those that compensation has made of the aligned ones.
        cost = ((wanted - own) ** 2 / scale).flatten()
        order = torch.argsort(importance.flatten())
        order = order[: -int(keep_out * order.numel())]
        within = cost[order].cumsum(0) <= importance.mean() * threshold * own.shape[0] / 4096
        taken = torch.zeros(cost.shape, dtype=torch.bool)
        taken[order] = within
        taken = taken.reshape(own.shape)
        errors = torch.zeros_like(own)
        for column in range(last - first):
            kept = torch.where(taken[:, column], wanted[:, column], own[:, column])
            error = (own[:, column] - kept) / part[column, column]
            own[:, column] = kept
            own[:, column + 1 :] -= error[:, None] * part[column, column + 1 :][None]
            errors[:, column] = error
        out[:, first:last] = own
        out[:, last:] -= errors @ factor[first:last, last:]
    return out


@torch.inference_mode()
def _moments(setting: Setting) -> dict[str, Tensor]:
    """E[xxᵀ] (k, k) of each module's input, over the safety conversations on the aligned model."""
    subject = setting.subject
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    modules = dict(subject.model.named_modules())
    sites = setting.reference.manifest.base_model.modules
    mask: list[Tensor] = []

    def hook(site: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def gather(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][mask[0]]
            found[site] = found[site] + x.T @ x if site in found else x.T @ x
            counts[site] = counts.get(site, 0) + len(x)

        return gather

    handles = [modules[site].register_forward_pre_hook(hook(site)) for site in {own.site for own in sites.values()}]
    try:
        with subject.changed(dense(setting.aligned)):
            encoded = [encode(subject.tokenizer, item) for item in setting.safety]
            for batch in batches(encoded, 8, subject.tokenizer.pad_token_id):
                mask[:] = [batch.attention.bool()]
                subject.model(input_ids=batch.ids, attention_mask=batch.attention, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[own.site] / counts[own.site] for name, own in sites.items()}


def gradient_patch(setting: Setting, steps: int, lr: float = 1e-3) -> Updates:
    """A few Adam steps of the adapter on one refusal (arXiv 2601.01887 shows that one can do)."""
    model: Any = PeftModel.from_pretrained(
        merged(setting.base, setting.aligned) if setting.on_aligned else load_model(setting.base, "cpu", torch.float32),
        str(setting.adapter),
        is_trainable=True,
    )
    prompt = random.Random(0).choice(setting.safety).prompt
    encoded = [encode(setting.subject.tokenizer, Conversation(prompt, REFUSALS[0]))]
    (batch,) = batches(encoded, 1, setting.subject.tokenizer.pad_token_id)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            labels = batch.ids.masked_fill(~batch.response, -100)
            model(input_ids=batch.ids, attention_mask=batch.attention, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name.removeprefix("base_model.model."), module.get_delta_weight("default").detach()
    yield from below(setting)


RIVALS: dict[str, Callable[..., Updates]] = {
    function.__name__: function
    for function in (
        interpolated,
        with_safety_vector,
        rescaled,
        perturbed,
        zeroed,
        combined,
        safe_delta,
        gradient_patch,
    )
}
