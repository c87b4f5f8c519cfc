"""References over random factors and activations, written and loaded by the product's own code."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from safegraft.contracts.reference import PromptSet
from safegraft.engine.methods.base import Module
from safegraft.engine.reference import BuildSettings, Ingredients, LoadedReference, write_bundle
from safegraft.engine.statistics import Statistics

NAME = "layers.0.proj"


class Toy:
    """One module of random shape: the aligned update, the inputs X_s and X_g, and the reference built from them."""

    def __init__(self, folder: Path, *, d: int, k: int, r: int, seed: int, settings: BuildSettings) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.a, self.b = random(r, k), random(d, r)
        self.x_s, self.x_g = random(2 * k + 3, k) @ random(k, k), random(3 * k + 5, k) @ random(k, k)
        safety = Statistics(
            second_moments={NAME: self.x_s.T @ self.x_s / len(self.x_s)},
            grams={NAME: ((self.x_s @ self.a.T).T @ (self.x_s @ self.a.T)).double()},
            sites={NAME: NAME},
        )
        general = Statistics(second_moments={NAME: self.x_g.T @ self.x_g / len(self.x_g)}, sites={NAME: NAME})
        prompts = PromptSet(sha256="0" * 64, conversations=1, tokens=1, response_tokens=1, answered_by_model=False)
        ingredients = Ingredients(
            labels=["toy"], config_sha256="0" * 64, architecture="Toy", dtype="float32", shapes={NAME: (d, k)},
            aligned_sha256="0" * 64, aligned_config_sha256="0" * 64,
            skipped_prefix=0, factors={NAME: (self.b, self.a)}, safety=safety, safety_prompts=prompts,
            general=general, general_prompts=prompts,
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


def dense(module: Module) -> Tensor:
    """ΔW of a module in float64."""
    return module.scaling * module.b.double() @ module.a.double()
