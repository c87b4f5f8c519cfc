"""The methods, by the name that requests use. A new one costs its file, a line here, a model in `contracts`."""

from safegraft.engine.methods.base import Method
from safegraft.engine.methods.gram import Gram
from safegraft.engine.methods.nlsr import Nlsr

METHODS: dict[str, type[Method]] = {method.type: method for method in (Nlsr, Gram)}
