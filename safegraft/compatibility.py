"""Do an adapter, a reference and a method fit together? Answered from headers and the manifest alone.

The gateway asks before it queues a job, so that a wrong base costs the customer a second and not a job; the engine asks
again, because files can be handed to it without a gateway.
"""

from safegraft.adapter import AdapterDescription, LoraModule
from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.contracts.reference import ReferenceManifest
from safegraft.errors import Incompatible


def check_compatible(
    adapter: AdapterDescription, manifest: ReferenceManifest, parameters: NlsrParameters | GramParameters
) -> None:
    """Raises Incompatible with the first module that stands in the way."""
    check_base(adapter, manifest)
    if parameters.type not in manifest.methods:
        raise Incompatible(
            f"The reference {manifest.name!r} was not built for the method {parameters.type!r}.",
            code="method_not_offered",
            param="method.type",
            hint=f"It offers: {', '.join(manifest.methods)}.",
        )
    if isinstance(parameters, NlsrParameters):
        _check_nlsr(adapter, manifest, parameters)


def check_base(adapter: AdapterDescription, manifest: ReferenceManifest) -> None:
    """Raises Incompatible unless every module exists in the base model with these inputs and outputs."""
    known = manifest.base_model.modules
    for module in adapter.modules:
        base = known.get(module.name)
        if base is None:
            hint = f"Its layers are named like {next(iter(known), None)!r}."
            if module.name.startswith("base_model.model."):
                hint = "The adapter was saved from a model wrapped by PEFT twice; PEFT would ignore these keys."
            raise Incompatible(
                f"{module.name}: the reference's base model has no such linear layer.",
                code="module_not_in_base",
                param=module.name,
                hint=hint,
            )
        if module.rank > max(base.outputs, base.inputs):
            raise Incompatible(
                f"{module.name}: rank {module.rank} is above both sides of the layer, {base.outputs}x{base.inputs}.",
                code="rank_above_layer",
                param=module.name,
            )
        if (base.outputs, base.inputs) != (module.outputs, module.inputs):
            raise Incompatible(
                f"{module.name}: the adapter is for {module.outputs}x{module.inputs} (outputs x inputs), the base "
                f"model's layer is {base.outputs}x{base.inputs}.",
                code="base_mismatch",
                param=module.name,
                hint="The adapter was trained on another base model.",
            )


def _check_nlsr(adapter: AdapterDescription, manifest: ReferenceManifest, parameters: NlsrParameters) -> None:
    assert manifest.aligned is not None, "a manifest that offers nlsr names its aligned adapter"
    for module in adapter.modules:
        aligned = manifest.aligned.modules.get(module.name)
        if aligned is None:
            raise Incompatible(
                f"{module.name}: the aligned adapter does not reach this module, so it has no neurons to transplant.",
                code="module_not_in_reference",
                param=module.name,
                hint="Use the method gram, which serves every linear layer." if "gram" in manifest.methods else "",
            )
        if parameters.form in ("factor", "paper") and aligned.rank != module.rank:
            raise rank_mismatch(module, aligned.rank, parameters.form)


def rank_mismatch(module: LoraModule, reference_rank: int, form: str) -> Incompatible:
    return Incompatible(
        f"{module.name}: the form {form!r} needs the aligned adapter's rank {reference_rank}; this adapter has "
        f"{module.rank}.",
        code="rank_mismatch",
        param=module.name,
        hint="Masks on the factors only mean something to adapters continued from the aligned one; use the form neuron "
        "or the method gram.",
    )
