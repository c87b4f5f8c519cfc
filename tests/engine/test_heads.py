"""Directions, deviations and probes of attention heads on data whose answer is known."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)  # fmt: skip

from safegraft.engine.heads import attention_outputs, measure_heads
from safegraft.engine.models import linear_modules

HEADS, SIZE, TOKENS = 3, 4, 5


def noise(conversations: int, seed: int, heads: int = HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(conversations, TOKENS, heads * SIZE, generator=generator)


def shifted(x: Tensor, head: int, by: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, head * SIZE : (head + 1) * SIZE] += by
    return x


def test_a_direction_is_that_from_the_mean_of_unsafe_to_the_mean_of_safe_answers() -> None:
    safe, unsafe = noise(20, 0), noise(20, 1)
    found = measure_heads(safe, unsafe, HEADS)
    for head in range(HEADS):
        part = slice(head * SIZE, (head + 1) * SIZE)
        good = safe[:, :, part].double().reshape(-1, SIZE)
        bad = unsafe[:, :, part].double().reshape(-1, SIZE)
        difference = good.mean(dim=0) - bad.mean(dim=0)
        theta = difference / difference.norm()
        assert torch.allclose(found.directions[head], theta, atol=1e-12)
        # Of all activations, of both sets together, and without the correction for the mean.
        along = torch.cat([good, bad]) @ theta
        deviation = float((along - along.mean()).square().mean().sqrt())
        assert float(found.sigma[head]) == pytest.approx(deviation, abs=1e-12)
    assert found.directions.shape == (HEADS, SIZE)


def test_a_head_that_answers_moved_points_along_the_move() -> None:
    move = torch.tensor([3.0, 0.0, 4.0, 0.0])
    safe = torch.zeros(10, TOKENS, HEADS * SIZE)
    found = measure_heads(safe, shifted(safe, 1, -move), HEADS)
    assert found.directions[1].tolist() == pytest.approx([0.6, 0.0, 0.8, 0.0])
    # Half of all activations lie 5 away from the other half along it.
    assert float(found.sigma[1]) == pytest.approx(2.5)
    # The others did not move: no direction, and no push along none.
    for head in (0, 2):
        assert found.directions[head].tolist() == [0.0] * SIZE
        assert float(found.sigma[head]) == 0.0


def test_a_probe_tells_separable_heads_apart_and_no_others() -> None:
    safe, unsafe = noise(100, 0), noise(100, 1)
    far = torch.tensor([20.0, -20.0, 0.0, 0.0])
    found = measure_heads(shifted(safe, 2, far), shifted(unsafe, 2, -far), HEADS)
    assert float(found.accuracy[2]) == 1.0
    # On noise: half of the unseen 400 tokens, which a standard error of .025 blurs, and a little more of the seen.
    for head in (0, 1):
        assert float(found.accuracy[head]) == pytest.approx(0.5, abs=0.08)


def test_a_probe_finds_a_difference_that_lies_off_the_origin() -> None:
    """All activations on one side: without an intercept, or with one that is held down, no linear probe parts them."""
    safe, unsafe = 0.01 * noise(40, 0) + 5.0, 0.01 * noise(40, 1) + 6.0
    assert measure_heads(safe, unsafe, HEADS).accuracy.tolist() == [1.0] * HEADS


def test_a_probe_is_judged_on_whole_answers_that_it_did_not_see() -> None:
    """Every answer has a mark of its own, which a probe learns by heart and which tells nothing about other answers.

    What it saw it then gets right, of what it did not see half: three quarters, as published code averages the two.
    Were single tokens held out, their neighbours would give the answer away.
    """
    conversations, size = 60, 128
    generator = torch.Generator().manual_seed(3)
    marks = torch.randn(2, conversations, 1, size, generator=generator)
    safe, unsafe = (mark.expand(conversations, TOKENS, size).clone() for mark in marks)
    accuracy = float(measure_heads(safe, unsafe, 1).accuracy[0])
    assert accuracy == pytest.approx(0.75, abs=0.1)


def test_the_split_repeats_with_its_seed() -> None:
    safe, unsafe = noise(30, 0), noise(30, 1)

    def accuracy(seed: int) -> Tensor:
        return measure_heads(safe, unsafe, HEADS, seed).accuracy

    assert torch.equal(accuracy(0), accuracy(0))
    assert torch.equal(accuracy(0), measure_heads(safe, unsafe, HEADS).accuracy)
    assert not torch.equal(accuracy(0), accuracy(1))
    # Directions know nothing of the split.
    one, other = measure_heads(safe, unsafe, HEADS, 0), measure_heads(safe, unsafe, HEADS, 1)
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(one.sigma, other.sigma)


@pytest.mark.parametrize("conversations", [1, 2, 3])
def test_a_few_pairs_are_enough_to_measure(conversations: int) -> None:
    safe, unsafe = noise(conversations, 0) + 30.0, noise(conversations, 1) - 30.0
    found = measure_heads(safe, unsafe, HEADS)
    assert found.accuracy.tolist() == [1.0] * HEADS
    assert bool(torch.isfinite(found.directions).all())


def test_the_size_of_activations_does_not_decide_whether_they_are_told_apart() -> None:
    safe, unsafe = noise(50, 0) + 0.4, noise(50, 1) - 0.4
    wanted = measure_heads(safe, unsafe, HEADS)
    for scale in (1e-4, 1e4):
        found = measure_heads(scale * safe, scale * unsafe, HEADS)
        assert torch.allclose(found.directions, wanted.directions, atol=1e-5)
        assert torch.allclose(found.sigma, scale * wanted.sigma, rtol=1e-5)
        assert torch.allclose(found.accuracy, wanted.accuracy, atol=0.01)
    assert 0.6 < float(wanted.accuracy.min()) < float(wanted.accuracy.max()) < 0.95


def test_heads_that_never_move_are_told_apart_by_nothing() -> None:
    still = torch.ones(10, TOKENS, HEADS * SIZE)
    assert measure_heads(still, still, HEADS).accuracy.tolist() == [0.0] * HEADS


SMALL: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


@pytest.mark.parametrize(
    ("kind", "config", "outputs"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
         ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]),
        (LlamaForCausalLM, LlamaConfig(**SMALL, intermediate_size=48, head_dim=16, num_key_value_heads=2),
         ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, intermediate_size=48),
         ["gpt_neox.layers.0.attention.dense", "gpt_neox.layers.1.attention.dense"]),
        (PhiForCausalLM, PhiConfig(**SMALL, intermediate_size=48),
         ["model.layers.0.self_attn.dense", "model.layers.1.self_attn.dense"]),
        (OPTForCausalLM, OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32),
         ["model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.1.self_attn.out_proj"]),
    ],
)  # fmt: skip
def test_the_output_projections_of_the_known_families_are_found_with_their_heads(
    kind: Any, config: Any, outputs: list[str]
) -> None:
    with torch.device("meta"):
        model: nn.Module = kind(config)
    shapes = linear_modules(model)
    assert attention_outputs(config, shapes, {name: k for name, (_, k) in shapes.items()}) == dict.fromkeys(outputs, 4)


@pytest.mark.parametrize(
    ("count", "name", "inputs"),
    [
        (None, "model.layers.0.self_attn.o_proj", 32),
        (0, "model.layers.0.self_attn.o_proj", 32),
        ([4, 8], "model.layers.0.self_attn.o_proj", 32),
        (5, "model.layers.0.self_attn.o_proj", 32),
        (4, "model.layers.0.mlp.dense", 32),
        (4, "transformer.h.0.mlp.c_proj", 32),
        (4, "model.layers.0.self_attn.q_proj", 32),
        (4, "o_proj", 32),
    ],
)
def test_layers_whose_heads_cannot_be_told_are_left_out(count: Any, name: str, inputs: int) -> None:
    class Config:
        num_attention_heads = count

    assert attention_outputs(Config(), [name], {name: inputs}) == {}
    assert attention_outputs(object(), [name], {name: inputs}) == {}
