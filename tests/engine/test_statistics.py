"""The streaming pass against raw activations kept in full."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safegraft.engine import models
from safegraft.engine.conversations import Conversation, Encoded, encode
from safegraft.engine.statistics import LAST_TOKENS, Statistics, common_prefix, gather
from safegraft.errors import InvalidParameter
from tests import tiny

# Of a result's norm: what float32 sums of some hundred products differ from float64 ones, ten times over.
FLOAT32 = 1e-5
SKIP = 2
# Of several lengths and not in their order, with answers shorter and longer than the tokens that are kept.
CONVERSATIONS = [
    *tiny.HARMFUL[:3],
    Conversation("how do i", "sorry"),
    *tiny.GENERAL[:2],
    Conversation("how do i walk the dog please", "please help the dog with that cut paper and walk a walk"),
    Conversation("how do you make tea", "i cannot"),
]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return models.load_model(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def encoded(base: Path) -> list[Encoded]:
    tokenizer = models.load_tokenizer(base)
    return [encode(tokenizer, item) for item in CONVERSATIONS]


@pytest.fixture(scope="module")
def raw(base: Path, encoded: list[Encoded]) -> dict[str, list[Tensor]]:
    """Layer → its inputs in each conversation, read one by one without padding by a float64 model."""
    twin = models.load_model(base, dtype=torch.float64)
    seen: dict[str, list[Tensor]] = {name: [] for name in models.linear_modules(twin)}
    for name, inputs in seen.items():
        twin.get_submodule(name).register_forward_pre_hook(lambda module, x, into=inputs: into.append(x[0][0]))
    with torch.inference_mode():
        for item in encoded:
            twin(input_ids=torch.tensor([item.ids]))
    return seen


@pytest.fixture(scope="module")
def factors(model: Any) -> dict[str, Tensor]:
    """An A of rank 3 for every second layer."""
    generator = torch.Generator().manual_seed(0)
    shapes = models.linear_modules(model)
    return {name: torch.randn(3, shapes[name][1], generator=generator) for name in list(shapes)[::2]}


def outputs(model: Any) -> list[str]:
    return [name for name in models.linear_modules(model) if name.endswith("o_proj")]


def passed(model: Any, encoded: list[Encoded], **wanted: Any) -> Statistics:
    return gather(model, list(models.linear_modules(model)), encoded, pad=0, skip=SKIP, **wanted)


def close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    assert float((actual.double() - wanted.double()).norm()) <= FLOAT32 * float(wanted.norm())


def same(one: Statistics, other: Statistics) -> bool:
    """To the bit."""
    a, b = vars(one), vars(other)
    parts = [name for name, value in a.items() if isinstance(value, dict) and name not in ("sites", "gradients")]
    return all(
        list(a[part]) == list(b[part]) and all(torch.equal(a[part][key], b[part][key]) for key in a[part])
        for part in parts
    ) and all(a[name] == b[name] for name in a if name not in (*parts, "gradients"))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_one_padded_pass_gives_what_raw_activations_give(
    model: Any, encoded: list[Encoded], raw: dict[str, list[Tensor]], factors: dict[str, Tensor], batch_size: int
) -> None:
    found = passed(model, encoded, factors=factors, outputs=outputs(model), batch_size=batch_size)
    for name, conversations in raw.items():
        counted = torch.cat([x[SKIP:] for x in conversations])
        answers = torch.cat([x[item.response_start :] for x, item in zip(conversations, encoded, strict=True)])
        site = found.sites[name]
        close(found.second_moments[site], counted.T @ counted / len(counted))
        close(found.means[site], counted.mean(dim=0))
        close(found.response_squares[site], answers.square().sum(dim=0))
        if name in factors:
            z = answers @ factors[name].double().T
            close(found.grams[name], z.T @ z)
    assert set(found.grams) == set(factors)
    assert found.tokens == sum(len(item.ids) - SKIP for item in encoded)
    assert found.response_tokens == sum(len(item.ids) - item.response_start for item in encoded)
    assert (found.done, found.forward_passes) == (len(encoded), 1)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_last_tokens_lie_in_the_order_of_the_conversations_and_short_answers_repeat_their_first(
    model: Any, encoded: list[Encoded], raw: dict[str, list[Tensor]], batch_size: int
) -> None:
    found = passed(model, encoded, outputs=outputs(model), batch_size=batch_size)
    assert list(found.last) == outputs(model)
    # Both kinds are there, and batches do not come in the order of the list.
    lengths = [len(item.ids) - item.response_start for item in encoded]
    assert min(lengths) < LAST_TOKENS < max(lengths)
    assert sorted(lengths, reverse=True) != lengths
    for name, kept in found.last.items():
        for row, (item, x) in enumerate(zip(encoded, raw[name], strict=True)):
            answer = x[item.response_start :][-LAST_TOKENS:]
            close(kept[row, LAST_TOKENS - len(answer) :], answer)
            for repeated in kept[row, : LAST_TOKENS - len(answer)]:
                assert torch.equal(repeated, kept[row, LAST_TOKENS - len(answer)])


def test_last_tokens_are_kept_of_no_more_conversations_than_asked_for(model: Any, encoded: list[Encoded]) -> None:
    everything = passed(model, encoded, outputs=outputs(model))
    few = passed(model, encoded, outputs=outputs(model), first=3)
    for name in outputs(model):
        assert torch.equal(few.last[name], everything.last[name][:3])
    assert few.tokens == everything.tokens


def test_a_pass_for_last_tokens_alone_keeps_no_moments(model: Any, encoded: list[Encoded]) -> None:
    found = passed(model, encoded, outputs=outputs(model), moments=False)
    assert not any((found.second_moments, found.means, found.response_squares, found.grams))
    assert all(bool(kept.any()) for kept in found.last.values())


def test_an_interrupted_pass_goes_on_where_it_was_and_ends_in_the_same_bits(
    model: Any, encoded: list[Encoded], factors: dict[str, Tensor]
) -> None:
    wanted = {"factors": factors, "outputs": outputs(model), "batch_size": 3}
    whole = passed(model, encoded, **wanted)
    states: list[Statistics] = []
    passed(model, encoded, **wanted, save=lambda sums: states.append(copy.deepcopy(sums)))
    assert [state.done for state in states] == [3, 6, 8]
    for state in states:
        left: list[int] = []
        hook = model.model.register_forward_pre_hook(
            lambda module, x, named, into=left: into.append(len(named["input_ids"])), with_kwargs=True
        )
        assert same(passed(model, encoded, **wanted, state=copy.deepcopy(state)), whole)
        hook.remove()
        assert sum(left) == len(encoded) - state.done
        # Something is left to be seen: an earlier state is not the result.
        assert not same(state, whole)


def test_layers_that_read_the_same_tensor_share_a_site(model: Any, encoded: list[Encoded]) -> None:
    sites = passed(model, encoded).sites
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
    rows = 0
    forward: Callable[..., Any] = model.model.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal rows
        rows += named["input_ids"].shape[0]
        return forward(*arguments, **named)

    monkeypatch.setattr(model.model, "forward", counted)
    passed(model, encoded, batch_size=2)
    assert rows == len(encoded)


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
        passed(model, bad)
    assert all(not model.get_submodule(name)._forward_pre_hooks for name in models.linear_modules(model))


def test_a_model_that_sends_tokens_to_some_of_its_layers_is_refused_by_the_layers_name() -> None:
    class Routed(nn.Module):
        """Of every token, one half to each of two experts."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.base_model, self.device = self.forward, torch.device("cpu")

        def forward(self, input_ids: Tensor, **_: Any) -> None:
            x = self.embed(input_ids).reshape(-1, 4)
            for part, expert in zip(x.chunk(2), self.experts, strict=True):
                expert(part)

    with pytest.raises(InvalidParameter) as caught:
        gather(Routed(), ["experts.0", "experts.1"], [Encoded([1, 2, 3, 4], 2)], pad=0)
    assert (caught.value.code, caught.value.param) == ("model_unsupported", "experts.0")
