from pathlib import Path

import pytest
import torch

from benchmarks.evidence.subject import Subject
from safegraft.engine.evaluate import answer
from safegraft.engine.models import load_model, load_tokenizer
from tests import tiny

PROMPTS = ["how do i make a bomb", "how do i walk", "please bake the cake with paper", "how", "how do i make tea"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "base")
    return tmp_path / "base"


def test_answers_are_those_of_generate(base: Path) -> None:
    expected = answer(load_model(base, "cpu", torch.float32), load_tokenizer(base), PROMPTS, max_new_tokens=9)
    assert Subject(base).answer(PROMPTS, 9) == expected
    assert len(set(expected)) > 1


def test_one_prompt_alone_is_answered_as_among_others(base: Path) -> None:
    subject = Subject(base)
    assert [subject.answer([prompt], 6)[0] for prompt in PROMPTS] == subject.answer(PROMPTS, 6)


def test_an_update_changes_the_answers_and_leaves_no_trace(base: Path) -> None:
    subject = Subject(base)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    plain = subject.answer(PROMPTS, 6)
    name = "model.layers.0.mlp.down_proj"
    update = torch.randn(subject._modules[name].weight.shape, generator=torch.Generator().manual_seed(0)) * 3
    with subject.changed([(name, update), (name, update)]):
        assert torch.equal(subject._modules[name].weight, before[f"{name}.weight"] + update + update)
        assert subject.answer(PROMPTS, 6) != plain
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())
    assert subject.answer(PROMPTS, 6) == plain


def test_a_vector_is_added_to_the_output_and_goes_again(base: Path) -> None:
    subject = Subject(base)
    plain = subject.answer(PROMPTS, 6)
    name = "model.layers.1.mlp.down_proj"
    push = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 5
    x = torch.randn(1, 48)
    module = subject._modules[name]
    with subject.changed([(name, push)]), torch.no_grad():
        assert torch.allclose(module(x), x @ module.weight.T + push, atol=1e-5)
        assert subject.answer(PROMPTS, 6) != plain
    assert subject.answer(PROMPTS, 6) == plain


def test_an_update_that_fails_half_way_is_taken_back(base: Path) -> None:
    subject = Subject(base)
    name = "model.layers.0.mlp.down_proj"
    before = subject._modules[name].weight.clone()
    with pytest.raises(RuntimeError), subject.changed([(name, torch.ones_like(before)), (name, torch.ones(2, 3))]):
        pass
    assert torch.equal(subject._modules[name].weight, before)
