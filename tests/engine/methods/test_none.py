"""The control: nothing is done, and what is measured is what other methods would measure."""

from pathlib import Path

import pytest
import torch

from safegraft.contracts.methods import GramParameters, NoneParameters
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.methods.base import Kinship, Method, Selection
from safegraft.engine.methods.gram import Gram
from safegraft.engine.methods.none import Nothing
from tests.engine.random_bundle import NAME, Toy, dense

CONTINUED = Kinship("continued", 0.9, True)
FRESH = Kinship("fresh", 0.0, False)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "ref", d=8, k=10, r=3, seed=1, settings=BuildSettings(ridge=1e-4, smallest_pair=0.0))


def without_gram(toy: Toy) -> Toy:
    toy.reference.manifest = toy.reference.manifest.model_copy(update={"gram": None})
    return toy


def test_nothing_is_selected_and_a_module_stays_as_it_is(toy: Toy) -> None:
    method = Nothing(NoneParameters(), toy.reference, FRESH)
    assert method.select({"a": 0.1, "b": 0.9}) == Selection(frozenset())
    module = toy.fresh(2, 0.5)
    proposal = method.propose(module)
    assert torch.equal(proposal.a, module.a)
    assert torch.equal(proposal.b, module.b)
    assert proposal.bias is None
    assert method.rank(NAME, 2) == 2
    assert not method.adds_biases
    assert method.side_car() == {}


@pytest.mark.parametrize("kinship", [FRESH, CONTINUED])
def test_its_similarity_is_that_of_gram_where_the_reference_has_general_prompts(toy: Toy, kinship: Kinship) -> None:
    module = toy.continued(2.0) if kinship is CONTINUED else toy.fresh(2, 2.0)
    method, gram = (
        Nothing(NoneParameters(), toy.reference, kinship),
        Gram(GramParameters(), toy.reference, kinship),
    )
    update = dense(module) - (toy.b.double() @ toy.a.double() if kinship is CONTINUED else 0.0)
    on_safety = float((toy.x_s.double() @ update.T).square().sum()) / len(toy.x_s)
    on_general = float((toy.x_g.double() @ update.T).square().sum()) / len(toy.x_g)
    wanted = (on_general / (on_general + on_safety)) ** 0.5
    # The eigenpairs are kept as bfloat16.
    assert method.similarity(module) == pytest.approx(wanted, abs=0.03)
    assert method.similarity(module) == gram.similarity(module)
    assert method.similarity_meaning == gram.similarity_meaning
    assert method.break_even == gram.break_even
    assert method.reaches("a layer without an aligned update")


@pytest.mark.parametrize("kinship", [FRESH, CONTINUED])
def test_its_similarity_is_a_cosine_with_the_aligned_update_elsewhere(toy: Toy, kinship: Kinship) -> None:
    method: Method = Nothing(NoneParameters(), without_gram(toy).reference, kinship)
    module = toy.continued(2.0) if kinship is CONTINUED else toy.fresh(2, 2.0)
    aligned = toy.b.double() @ toy.a.double()
    # A fresh adapter sits on the aligned model, so that the whole of what is served is both.
    served = dense(module) + (0.0 if kinship is CONTINUED else aligned)
    wanted = float((aligned * served).sum() / (aligned.norm() * served.norm()))
    assert method.similarity(module) == pytest.approx(wanted, abs=1e-6)
    assert "cosine" in method.similarity_meaning
    assert method.break_even is None
    assert method.reaches(NAME)
    assert not method.reaches("a layer without an aligned update")
