"""The methods, by the name that requests use. A new one costs its file, a line here, a model in `contracts`."""

from safegraft.engine.methods.antidote import Antidote
from safegraft.engine.methods.base import Method
from safegraft.engine.methods.gram import Gram
from safegraft.engine.methods.nlsr import Nlsr
from safegraft.engine.methods.none import Nothing
from safegraft.engine.methods.safelora import SafeLora
from safegraft.engine.methods.safetylock import SafetyLock

METHODS: dict[str, type[Method]] = {
    method.type: method for method in (Nlsr, Gram, SafeLora, Antidote, SafetyLock, Nothing)
}
