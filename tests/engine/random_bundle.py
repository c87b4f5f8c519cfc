"""References over random factors and activations, written and loaded by the product's own code."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from safegraft.contracts.reference import PromptSet
from safegraft.engine.bundle import BuildSettings, Ingredients, write_bundle
from safegraft.engine.heads import Heads
from safegraft.engine.methods.base import Method, Module
from safegraft.engine.pipeline import fitted
from safegraft.engine.reference import LoadedReference
from safegraft.engine.sources import AlignedFactors, AlignedUpdate
from safegraft.engine.statistics import Statistics

NAME = "layers.0.self_attn.o_proj"
PROMPTS = PromptSet(
    sha256="0" * 64, conversations=1, tokens=1, response_tokens=1, answered_by_model=False, forward_passes=1
)


class Toy:
    """One module of random shape: the aligned update, the inputs X_s and X_g, and the reference built from them.

    a, b: the aligned factors, `aligned` = (B, A) where given; weak: those of a weaker adapter, of rank `weak_rank`;
    x_s, x_g: `inputs` where given; x_r: the rows of X_s that are answers' tokens; gradients: random |∂A|, |∂B| by
    scorer; w_o: the layer's own weight; heads: `head_count` random ones where k allows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        d: int,
        k: int,
        r: int,
        seed: int,
        settings: BuildSettings,
        weak_rank: int = 0,
        head_count: int = 1,
        source: str = "adapter",
        aligned: tuple[Tensor, Tensor] | None = None,
        inputs: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.a, self.b = random(r, k), random(d, r)
        if aligned is not None:
            self.b, self.a = aligned
        self.weak = (random(d, weak_rank), random(weak_rank, k)) if weak_rank else None
        self.x_s, self.x_g = random(2 * k + 3, k) @ random(k, k), random(3 * k + 5, k) @ random(k, k)
        self.x_s, self.x_g = self.x_s + random(k), self.x_g + random(k)
        if inputs is not None:
            self.x_s, self.x_g = inputs
        self.x_r = self.x_s[len(self.x_s) // 2 :]
        factors = AlignedFactors(a=self.a, b=self.b, weak=self.weak)
        z = self.x_r @ factors.stacked_a.T
        safety = statistics(self.x_s, self.x_r)
        safety.grams[NAME] = (z.T @ z).double()
        self.gradients = {scorer: (random(r, k).abs(), random(d, r).abs()) for scorer in ("snip", "preference_snip")}
        self.w_o = random(d, k)
        size = k // head_count
        directions = torch.nn.functional.normalize(random(head_count, size), dim=1)
        accuracy = torch.linspace(1.0, 0.5, head_count)
        self.heads = Heads(directions, random(head_count).abs() + 0.1, accuracy, accuracy)
        update = AlignedUpdate(source, {} if source == "none" else {NAME: factors})  # type: ignore[arg-type]
        ingredients = Ingredients(
            labels=["toy"], config_sha256="0" * 64, architecture="Toy", dtype="float32", shapes={NAME: (d, k)},
            aligned=update, skipped_prefix=0, safety=safety, safety_prompts=PROMPTS, general=statistics(self.x_g),
            general_prompts=PROMPTS, gradients={scorer: {NAME: found} for scorer, found in self.gradients.items()},
            heads={NAME: self.heads} if k == size * head_count else {}, projections={NAME: self.w_o},
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        write_bundle(folder, ingredients, settings)
        self.reference = LoadedReference(folder)
        self.settings = settings
        self.random = random

    def fresh(self, rank: int, scaling: float) -> Module:
        """A customer's module that shares nothing with the aligned one."""
        d, k = self.b.shape[0], self.a.shape[1]
        return Module(NAME, self.random(rank, k), self.random(d, rank), scaling)

    def continued(self, scaling: float, drift: float = 0.3) -> Module:
        """The aligned module, moved a little, in the customer's scaling."""
        a = self.a + drift * self.random(*self.a.shape)
        b = (self.b + drift * self.random(*self.b.shape)) / scaling
        return Module(NAME, a, b, scaling)


def statistics(x: Tensor, response: Tensor | None = None) -> Statistics:
    """What one pass would have gathered over the inputs x (T, k) of the one module; `response`: the answers' rows."""
    answers = x if response is None else response
    return Statistics(
        second_moments={NAME: x.T @ x / len(x)},
        means={NAME: x.mean(dim=0)},
        response_squares={NAME: answers.square().sum(dim=0)},
        sites={NAME: NAME},
    )


def dense(module: Module) -> Tensor:
    """ΔW of a module in float64."""
    return module.scaling * module.b.double() @ module.a.double()


class Repaired(NamedTuple):
    module: Module
    truncation_error: float


def repaired(method: Method, module: Module) -> Repaired:
    """What the pipeline makes of a proposal: the module in its own rank, and the truncation error."""
    return Repaired(*fitted(module, method.propose(module), module.rank))
