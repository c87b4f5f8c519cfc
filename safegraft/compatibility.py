"""Do an adapter, a reference and a method fit together? Answered from headers and the manifest alone.

The gateway asks before it queues a job, so that a wrong base costs the customer a second and not a job; the engine asks
again, because files can be handed to it without a gateway, and with the lineage, which only weights tell. Every refusal
names the methods that would serve instead.
"""

from collections.abc import Callable

from safegraft.adapter import AdapterDescription
from safegraft.contracts.methods import (
    MODELS,
    AntidoteParameters,
    AutoParameters,
    GramParameters,
    Method,
    NlsrParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.contracts.reference import Lineage, ReferenceManifest
from safegraft.errors import Incompatible

# In the order in which they are recommended: by what this project measured (docs/methods.md).
RECOMMENDED = ("gram", "nlsr", "safetylock", "antidote")


def check_compatible(
    adapter: AdapterDescription,
    manifest: ReferenceManifest,
    parameters: AutoParameters | Method,
    lineage: Lineage | None = None,
) -> None:
    """Raises Incompatible with the first thing that stands in the way. lineage: None where it is not known yet."""
    check_base(adapter, manifest)
    if isinstance(parameters, AutoParameters):
        recommend(adapter, manifest, lineage)
        return
    try:
        _check_method(adapter, manifest, parameters, lineage)
    except Incompatible as error:
        others = serving(adapter, manifest, lineage, besides=parameters.type)
        if others:
            error.hint = f"{error.hint} These methods would serve: {', '.join(others)}.".strip()
        raise


def serving(
    adapter: AdapterDescription, manifest: ReferenceManifest, lineage: Lineage | None, *, besides: str = ""
) -> list[str]:
    """The repair methods that would treat this adapter with their default parameters."""
    found = []
    for name, model in MODELS.items():
        if name in ("none", besides):
            continue
        try:
            _check_method(adapter, manifest, model(), lineage)
        except Incompatible:
            continue
        found.append(name)
    return found


def recommend(adapter: AdapterDescription, manifest: ReferenceManifest, lineage: Lineage | None) -> tuple[str, str]:
    """(method, reason): what runs where no method is named. Raises Incompatible where none would serve."""
    offered = serving(adapter, manifest, lineage)
    method = next((name for name in RECOMMENDED if name in offered), None)
    if method is None:
        raise Incompatible(
            f"The reference {manifest.name!r} offers no method that is recommended for this adapter.",
            code="no_method",
            param="method",
            hint=f"Name one of: {', '.join([*offered, 'none'])}.",
        )
    return method, _reason(method, lineage)


def _reason(method: str, lineage: Lineage | None) -> str:
    kind = f"a {lineage} adapter" if lineage else "any adapter"
    return {
        "gram": f"gram serves {kind} of any rank, and is the method that lowered the harm score furthest for its cost "
        "wherever this project measured it.",
        "nlsr": f"The reference has no statistics of general prompts, which gram needs; nlsr serves {kind}, though it "
        "lowered the harm score little or not at all where this project measured it.",
        "safetylock": "Neither gram nor nlsr can be had for this adapter with this reference; safetylock "
        f"serves {kind} from the directions of attention heads.",
        "antidote": f"Of the methods that the reference offers, antidote is the one that serves {kind}.",
    }[method]


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


def _check_method(
    adapter: AdapterDescription, manifest: ReferenceManifest, parameters: object, lineage: Lineage | None
) -> None:
    check_offered(manifest, str(getattr(parameters, "type", "")))
    check = _CHECKS.get(type(parameters))
    if check is not None:
        check(adapter, manifest, parameters, lineage)


def check_offered(manifest: ReferenceManifest, name: str) -> None:
    """Raises Incompatible unless the reference was built for this method, whatever the adapter."""
    if name not in manifest.methods:
        raise Incompatible(
            f"The reference {manifest.name!r} was not built for the method {name!r}.",
            code="method_not_offered",
            param="method.type",
            hint=f"It offers: {', '.join(manifest.methods)}.",
        )


def _check_reach(adapter: AdapterDescription, manifest: ReferenceManifest) -> None:
    """The aligned update need not reach every module that the customer adapted, but it has to reach one."""
    if not any(module.name in manifest.aligned for module in adapter.modules):
        first = adapter.modules[0].name
        raise Incompatible(
            f"{first}: the aligned adapter reaches neither this module nor any other of this adapter.",
            code="module_not_in_reference",
            param=first,
        )


def _check_nlsr(
    adapter: AdapterDescription, manifest: ReferenceManifest, parameters: NlsrParameters, lineage: Lineage | None
) -> None:
    _check_reach(adapter, manifest)
    if parameters.scorer not in (*manifest.scorers, "magnitude", "random"):
        raise Incompatible(
            f"The reference {manifest.name!r} was built without the scorer {parameters.scorer!r}.",
            code="scorer_not_offered",
            param="method.scorer",
            hint=f"It offers: {', '.join([*manifest.scorers, 'magnitude', 'random'])}.",
        )
    if parameters.form not in ("factor", "paper"):
        return
    if lineage is not None and lineage != "continued":
        raise lineage_mismatch(parameters.form, lineage)
    for module in adapter.modules:
        aligned = manifest.aligned.get(module.name)
        if aligned is not None and aligned.rank != module.rank:
            raise Incompatible(
                f"{module.name}: the form {parameters.form!r} needs the aligned adapter's rank {aligned.rank}; this "
                f"adapter has {module.rank}.",
                code="rank_mismatch",
                param=module.name,
                hint="Masks on the factors only mean something to adapters continued from the aligned one; use the "
                "form neuron.",
            )


def lineage_mismatch(form: str, relation: str) -> Incompatible:
    return Incompatible(
        f"The form {form!r} needs an adapter that was continued from the aligned one; this one is {relation}.",
        code="lineage_mismatch",
        param="method.form",
        hint="Use the form neuron.",
    )


def _check_safelora(
    adapter: AdapterDescription, manifest: ReferenceManifest, parameters: SafeLoraParameters, lineage: Lineage | None
) -> None:
    _check_reach(adapter, manifest)


def _check_antidote(
    adapter: AdapterDescription, manifest: ReferenceManifest, parameters: AntidoteParameters, lineage: Lineage | None
) -> None:
    if parameters.spare != "safety":
        return
    if parameters.basis != "rows":
        raise Incompatible(
            f"Safety-critical neurons are output rows; the basis {parameters.basis!r} prunes entries of factors.",
            code="parameters_conflict",
            param="method.spare",
            hint="Use the basis rows, or spare general.",
        )
    if "nlsr" not in manifest.methods:
        raise Incompatible(
            f"The reference {manifest.name!r} has no safety-critical neurons, because it has no aligned update.",
            code="method_not_offered",
            param="method.spare",
        )


def _check_safetylock(
    adapter: AdapterDescription, manifest: ReferenceManifest, parameters: SafetyLockParameters, lineage: Lineage | None
) -> None:
    if parameters.output == "side_car":
        return
    own = {module.name for module in adapter.modules}
    for layer in top_heads(manifest, parameters.heads):
        if layer not in own:
            raise Incompatible(
                f"{layer}: {parameters.heads} heads are to be pushed, one of them here, and the adapter has no factors "
                "on this module to carry it.",
                code="module_not_in_adapter",
                param=layer,
                hint="Use the output side_car, or fewer heads.",
            )


def _check_gram(
    adapter: AdapterDescription, manifest: ReferenceManifest, parameters: GramParameters, lineage: Lineage | None
) -> None:
    if parameters.amplification > 0:
        if not manifest.aligned:
            raise Incompatible(
                f"The reference {manifest.name!r} has no aligned update, so there is nothing to amplify.",
                code="no_aligned_update",
                param="method.amplification",
                hint="Leave amplification at 0.",
            )
        _check_reach(adapter, manifest)


def top_heads(manifest: ReferenceManifest, count: int) -> dict[str, list[int]]:
    """The `count` heads that tell safe from unsafe answers best, by output projection, in the model's order."""
    assert manifest.safetylock is not None, "a manifest that offers safetylock holds its heads"
    order = [
        (-accuracy, -found.separation[head], at, head, layer)
        for at, (layer, found) in enumerate(manifest.safetylock.layers.items())
        for head, accuracy in enumerate(found.accuracy)
        if accuracy > 0.0
    ]
    chosen: dict[str, list[int]] = {}
    for *_, head, layer in sorted(order)[:count]:
        chosen.setdefault(layer, []).append(head)
    return {layer: sorted(chosen[layer]) for layer in manifest.safetylock.layers if layer in chosen}


_CHECKS: dict[type, Callable[..., None]] = {
    NlsrParameters: _check_nlsr,
    SafeLoraParameters: _check_safelora,
    AntidoteParameters: _check_antidote,
    SafetyLockParameters: _check_safetylock,
    GramParameters: _check_gram,
}
