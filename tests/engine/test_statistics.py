"""The streaming pass against raw activations kept in full."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safegraft.engine import models
from safegraft.engine.conversations import Conversation, Encoded, encode
from safegraft.engine.statistics import common_prefix, gather
from tests import tiny


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return models.load_model(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def encoded(base: Path) -> list[Encoded]:
    tokenizer = models.load_tokenizer(base)
    return [encode(tokenizer, item) for item in tiny.HARMFUL[:7]]


def raw_inputs(model: Any, name: str, encoded: list[Encoded], skip: int) -> tuple[Tensor, Tensor]:
    """All inputs of a layer, one conversation at a time without padding: (all tokens but the prefix, answers')."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for item in encoded:
            model(input_ids=torch.tensor([item.ids]))
    handle.remove()
    everything = torch.cat([x[skip:] for x in seen])
    answers = torch.cat([x[item.response_start :] for x, item in zip(seen, encoded, strict=True)])
    return everything, answers


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_one_padded_pass_gives_what_raw_activations_give(model: Any, encoded: list[Encoded], batch_size: int) -> None:
    names = list(models.linear_modules(model))
    generator = torch.Generator().manual_seed(0)
    factors = {name: torch.randn(3, model.get_submodule(name).in_features, generator=generator) for name in names[::2]}
    found = gather(model, names, encoded, pad=0, skip=2, factors=factors, batch_size=batch_size)
    for name in names:
        everything, answers = raw_inputs(model, name, encoded, 2)
        wanted = everything.T @ everything / len(everything)
        assert torch.allclose(found.second_moments[found.sites[name]], wanted, atol=1e-4 * float(wanted.norm()))
        if name in factors:
            z = answers @ factors[name].T
            assert torch.allclose(found.grams[name].float(), z.T @ z, atol=1e-4 * float((z.T @ z).norm()))
    assert found.tokens == sum(len(item.ids) - 2 for item in encoded)
    assert found.response_tokens == sum(len(item.ids) - item.response_start for item in encoded)


def test_layers_that_read_the_same_tensor_share_a_site(model: Any, encoded: list[Encoded]) -> None:
    sites = gather(model, list(models.linear_modules(model)), encoded, pad=0).sites
    layer = "model.layers.0"
    attention = {sites[f"{layer}.self_attn.{kind}"] for kind in ("q_proj", "k_proj", "v_proj")}
    gated = {sites[f"{layer}.mlp.{kind}"] for kind in ("gate_proj", "up_proj")}
    others = {sites[f"{layer}.self_attn.o_proj"], sites[f"{layer}.mlp.down_proj"]}
    assert len(attention) == len(gated) == 1
    assert len(attention | gated | others) == 4
    assert len(set(sites.values())) == 4 * tiny.LAYERS


def test_every_conversation_passes_once_whatever_the_number_of_layers(
    model: Any, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = 0
    forward: Callable[..., Any] = model.model.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal passed
        passed += named["input_ids"].shape[0]
        return forward(*arguments, **named)

    monkeypatch.setattr(model.model, "forward", counted)
    gather(model, list(models.linear_modules(model)), encoded, pad=0, batch_size=2)
    assert passed == len(encoded)


def test_the_common_prefix_ends_where_conversations_differ_or_an_answer_begins() -> None:
    assert common_prefix([Encoded([1, 2, 3, 9], 3), Encoded([1, 2, 4, 9], 3)]) == 2
    assert common_prefix([Encoded([1, 2, 3, 9], 2), Encoded([1, 2, 3, 9], 3)]) == 2
    assert common_prefix([Encoded([5, 2], 1), Encoded([1, 2], 1)]) == 0
    # One conversation alone has nothing in common with others.
    assert common_prefix([Encoded([1, 2, 3], 2)]) == 0


def test_no_hook_stays_behind_when_a_pass_fails(model: Any, base: Path) -> None:
    bad = [encode(models.load_tokenizer(base), Conversation("how do i", "sorry"))]
    bad[0].ids[0] = 10**6
    with pytest.raises(IndexError):
        gather(model, list(models.linear_modules(model)), bad, pad=0)
    assert all(not model.get_submodule(name)._forward_pre_hooks for name in models.linear_modules(model))
