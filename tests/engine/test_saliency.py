"""Gradients of single conversations and of preference pairs against naive loops over a float64 model."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safegraft.engine import lowrank, models
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference, placeholder
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.conversations import Conversation, Encoded, encode
from safegraft.engine.reference import LoadedReference
from safegraft.engine.saliency import PREFERENCE_BETA, preference_gradients
from safegraft.engine.statistics import Statistics, gather
from tests import tiny

# Of a gradient's norm: a way back through two layers in float32 differs from float64 by less than 1e-5.
FLOAT32 = 1e-4
SAFE = tiny.HARMFUL[:5]
UNSAFE = [Conversation(item.prompt, placeholder(item.prompt)) for item in SAFE]
Factors = dict[str, tuple[nn.Parameter, nn.Parameter]]
Gradients = dict[str, tuple[Tensor, Tensor]]


def wrapped_model(base: Path, aligned: Path, dtype: torch.dtype) -> Any:
    """The base with the aligned adapter beside its weights, all of it in `dtype`."""
    from peft import PeftModel

    model = models.load_model(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(aligned)).to(dtype).eval().requires_grad_(False)


def factors_of(wrapped: Any) -> Factors:
    found = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            found[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return found


@pytest.fixture(scope="module")
def wrapped(base: Path, aligned: Path) -> Any:
    return wrapped_model(base, aligned, torch.float32)


@pytest.fixture(scope="module")
def twin(base: Path, aligned: Path) -> Any:
    return wrapped_model(base, aligned, torch.float64)


@pytest.fixture(scope="module")
def safe(base: Path) -> list[Encoded]:
    return encoded(base, SAFE)


@pytest.fixture(scope="module")
def unsafe(base: Path) -> list[Encoded]:
    return encoded(base, UNSAFE)


def encoded(base: Path, conversations: list[Conversation]) -> list[Encoded]:
    tokenizer = models.load_tokenizer(base)
    return [encode(tokenizer, item) for item in conversations]


def log_likelihoods(model: Any, item: Encoded) -> Tensor:
    """log π of each of the answer's tokens, from the logits one place before it."""
    logits = model(input_ids=torch.tensor([item.ids])).logits[0]
    places = range(item.response_start, len(item.ids))
    return torch.stack([logits[at - 1].log_softmax(0)[item.ids[at]] for at in places])


def mean_loss(model: Any, *items: Encoded) -> Tensor:
    """The loss of each conversation's answer, added up."""
    return torch.stack([-log_likelihoods(model, item).mean() for item in items]).sum()


def absolute_gradients(losses: Sequence[Callable[[], Tensor]], factors: Factors) -> Gradients:
    """Σ|∂L/∂A|, Σ|∂L/∂B|: each loss by itself, with gradients that nothing was added to before."""
    parameters = [parameter for pair in factors.values() for parameter in pair]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    for loss in losses:
        for total, gradient in zip(sums, torch.autograd.grad(loss(), parameters), strict=True):
            total += gradient.abs()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return {name: (sums[2 * at], sums[2 * at + 1]) for at, name in enumerate(factors)}


def close(actual: Gradients, wanted: Gradients) -> None:
    assert set(actual) == set(wanted)
    for name, pair in wanted.items():
        for one, other in zip(actual[name], pair, strict=True):
            assert one.dtype == torch.float32
            assert float(other.norm()) > 0
            assert float((one.double() - other).norm()) <= FLOAT32 * float(other.norm())


def untouched(wrapped: Any) -> bool:
    """No gradient is kept or wanted, no hook is left, and the adapter is on."""
    parameters = list(wrapped.parameters())
    layers = [layer for layer in wrapped.modules() if hasattr(layer, "lora_A")]
    return (
        all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
        and not any(layer._forward_pre_hooks for layer in layers)
        and not any(layer.disable_adapters for layer in layers)
    )


def passed(wrapped: Any, safe: list[Encoded], **wanted: Any) -> Statistics:
    model = wrapped.get_base_model()
    factors = {name: a.detach().clone() for name, (a, _) in factors_of(wrapped).items()}
    outputs = [name for name in factors if name.endswith("o_proj")]
    return gather(model, list(factors), safe, pad=0, skip=2, factors=factors, outputs=outputs, batch_size=2, **wanted)


def preferred(wrapped: Any, safe: list[Encoded], unsafe: list[Encoded], **wanted: Any) -> Gradients:
    return preference_gradients(
        wrapped.get_base_model(), wrapped.disable_adapter, factors_of(wrapped), safe, unsafe, pad=0, **wanted
    )


def test_snip_sums_the_absolute_gradients_of_single_conversations(wrapped: Any, twin: Any, safe: list[Encoded]) -> None:
    found = passed(wrapped, safe, trained=factors_of(wrapped))
    losses = [partial(mean_loss, twin, item) for item in safe]
    close(found.gradients, absolute_gradients(losses, factors_of(twin)))
    assert untouched(wrapped)


def test_gradients_that_were_not_cleared_between_samples_would_be_seen(twin: Any, safe: list[Encoded]) -> None:
    """What published code does: the second sample's gradient has the first one's in it, and so on."""
    wanted = absolute_gradients([partial(mean_loss, twin, item) for item in safe], factors_of(twin))
    running = [partial(mean_loss, twin, *safe[:upto]) for upto in range(1, len(safe) + 1)]
    kept = absolute_gradients(running, factors_of(twin))
    for name, pair in wanted.items():
        for one, other in zip(pair, kept[name], strict=True):
            assert float((one - other).norm()) > 1000 * FLOAT32 * float(one.norm())


def test_what_is_gathered_on_the_way_is_what_a_pass_without_gradients_gathers(
    wrapped: Any, safe: list[Encoded]
) -> None:
    with_gradients = passed(wrapped, safe, trained=factors_of(wrapped))
    without = passed(wrapped, safe)
    assert not without.gradients
    for part in ("second_moments", "means", "response_squares", "grams", "last"):
        one, other = getattr(with_gradients, part), getattr(without, part)
        assert list(one) == list(other)
        for name, value in one.items():
            assert not value.requires_grad
            # Single conversations are summed in another order than batches.
            assert float((value - other[name]).norm()) <= 1e-5 * float(value.norm())
    for part in ("sites", "tokens", "response_tokens", "done", "forward_passes"):
        assert getattr(with_gradients, part) == getattr(without, part)


def test_preference_gradients_are_those_of_the_dpo_loss_against_the_model_without_its_adapter(
    base: Path, wrapped: Any, twin: Any, safe: list[Encoded], unsafe: list[Encoded]
) -> None:
    found = preferred(wrapped, safe, unsafe)
    policy, reference = twin, models.load_model(base, dtype=torch.float64)

    def loss(good: Encoded, bad: Encoded) -> Tensor:
        ratios = [log_likelihoods(policy, item).sum() - log_likelihoods(reference, item).sum() for item in (good, bad)]
        return -torch.log(torch.sigmoid(PREFERENCE_BETA * (ratios[0] - ratios[1])))

    losses = [partial(loss, *pair) for pair in zip(safe, unsafe, strict=True)]
    close(found, absolute_gradients(losses, factors_of(twin)))
    assert untouched(wrapped)


def test_interrupted_gradients_go_on_where_they_were_and_end_in_the_same_bits(
    wrapped: Any, safe: list[Encoded], unsafe: list[Encoded]
) -> None:
    snip, preference = passed(wrapped, safe, trained=factors_of(wrapped)), preferred(wrapped, safe, unsafe)
    states: list[Statistics] = []
    passed(wrapped, safe, trained=factors_of(wrapped), save=lambda sums: states.append(copy.deepcopy(sums)))
    again = passed(wrapped, safe, trained=factors_of(wrapped), state=copy.deepcopy(states[2]))
    pairs: list[Statistics] = []
    preferred(wrapped, safe, unsafe, save=lambda sums: pairs.append(copy.deepcopy(sums)))
    assert [state.done for state in states] == [state.done for state in pairs] == [1, 2, 3, 4, 5]
    rest: list[int] = []
    other = preferred(
        wrapped, safe, unsafe, state=copy.deepcopy(pairs[2]), progress=lambda done, total: rest.append(done)
    )
    assert rest == [4, 5]
    for name in snip.gradients:
        assert all(map(torch.equal, snip.gradients[name], again.gradients[name]))
        assert all(map(torch.equal, preference[name], other[name]))


def test_a_model_is_as_it_was_after_a_loss_that_fails(
    wrapped: Any, safe: list[Encoded], unsafe: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Tensor, "backward", fail)
    with pytest.raises(MemoryError):
        passed(wrapped, safe, trained=factors_of(wrapped))
    assert untouched(wrapped)
    with pytest.raises(MemoryError):
        preferred(wrapped, safe, unsafe)
    assert untouched(wrapped)


@pytest.mark.parametrize(("snip", "preference"), [(True, False), (False, True), (True, True)])
def test_a_bundle_holds_the_masks_that_were_asked_for_and_no_others(
    base: Path, aligned: Path, wrapped: Any, safe: list[Encoded], unsafe: list[Encoded], tmp_path: Path,
    snip: bool, preference: bool,
) -> None:  # fmt: skip
    settings = BuildSettings(sparsity=0.5, dtype="float32", snip=snip, preference_snip=preference)
    manifest = build_reference(
        tmp_path / "out",
        sources=BuildSources(aligned=aligned, base=base),
        prompts=BuildPrompts(safety=SAFE),
        settings=settings,
    )
    gradients = {}
    if snip:
        gradients["snip"] = passed(wrapped, safe, trained=factors_of(wrapped)).gradients
    if preference:
        gradients["preference_snip"] = preferred(wrapped, safe, unsafe)
    assert manifest.scorers == ["low_rank", "wanda", *gradients]
    reference = LoadedReference(tmp_path / "out")
    keys = {key.rpartition(".")[2] for key in reference._reader_of if ".mask_A." in key or ".rows." in key}
    assert keys == set(manifest.scorers)
    for name in manifest.aligned:
        update = reference.aligned(name)
        assert update is not None
        for scorer, found in gradients.items():
            of_a, of_b = update[1].abs() * found[name][0], update[0].abs() * found[name][1]
            masks = reference.neurons(name, scorer)  # type: ignore[arg-type]
            assert torch.equal(masks.mask_a, lowrank.top_mask(of_a, 0.5, per_row=True))
            assert torch.equal(masks.mask_b, lowrank.top_mask(of_b, 0.5, per_row=True))
            assert torch.equal(masks.rows, lowrank.top_mask(of_b.sum(dim=1), 0.5, per_row=False))


def test_a_bundle_has_no_gradients_where_none_were_asked_for(reference: LoadedReference) -> None:
    assert reference.manifest.scorers == ["low_rank", "wanda"]
    assert not [key for key in reference._reader_of if key.endswith("snip")]
