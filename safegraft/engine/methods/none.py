"""No repair, as a control: every table needs a row of what happens when nothing is done."""

from collections.abc import Mapping
from typing import ClassVar

from safegraft.engine import lowrank
from safegraft.engine.methods.base import (
    BREAK_EVEN,
    GENERAL_SHARE,
    Fidelity,
    Kinship,
    Method,
    Module,
    Proposal,
    Selection,
)
from safegraft.engine.reference import LoadedReference


class Nothing(Method):
    type = "none"
    fidelity: ClassVar[Mapping[str, Fidelity]] = {"none": "paper"}
    explanation = "Nothing was done."

    def __init__(self, parameters: object, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        self._measures = reference.manifest.gram is not None
        self.similarity_meaning = (
            GENERAL_SHARE if self._measures else "cosine between the reference's and the adapter's update"
        )
        self.break_even = BREAK_EVEN if self._measures else None

    def reaches(self, name: str) -> bool:
        return self._measures or self.reference.reaches(name)

    def similarity(self, module: Module) -> float:
        if self._measures:
            return self.general_share(module)
        aligned = self.reference.aligned(module.name)
        assert aligned is not None, "asked for modules that the method reaches"
        return lowrank.cosine(*aligned, *self.total(module))

    def select(self, similarities: Mapping[str, float]) -> Selection:
        return Selection(frozenset())

    def propose(self, module: Module) -> Proposal:
        return Proposal(module.b, module.a)
