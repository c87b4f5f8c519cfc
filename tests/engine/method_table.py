"""`make methods`: what works on what, tried out on tiny models, and every parameter, written into docs/methods.md."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safegraft.contracts.methods import MODELS, STRENGTH
from safegraft.engine.models import quiet_libraries
from tests.engine.families import COLUMNS, ROWS, Workshop

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def table(workshop: Workshop) -> str:
    """Methods against lineages. Architectures share a cell where they agree, and are named in it where they do not."""
    stands = workshop.stands
    body = []
    for (method, form), own in ROWS.items():
        cells = [merged({name: stands[name].outcome(column, own).text for name in stands}) for column in COLUMNS]
        body.append([f"`{method}`" + (f", `{form}`" if form else ""), *cells])
    return f"Tried on tiny models of {listed(list(stands))}.\n\n{markdown(['method', *COLUMNS], body)}"


def merged(texts: Mapping[str, str]) -> str:
    """One text where all architectures have the same, else each with those that have it."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        found.setdefault(text, []).append(name)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in found.items())


def parameters() -> str:
    """Every parameter of every method, from the models that check requests."""
    parts = []
    for method, model in MODELS.items():
        rows = [
            [f"`{name}`", _values(schema), _default(schema), schema.get("description", "").replace("|", "\\|")]
            for name, schema in model.model_json_schema()["properties"].items()
            if name != "type"
        ]
        strength = f"Its strength is `{STRENGTH[method]}`." if method in STRENGTH else "It has no strength."
        head = f"**`{method}`.** {strength}"
        parts.append(
            f"{head}\n\n{markdown(['parameter', 'values', 'default', 'meaning'], rows)}"
            if rows
            else f"{head} It has no parameters."
        )
    return "\n\n".join(parts)


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return ", ".join(_values(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "null":
        return "`null`"
    if schema["type"] == "integer":
        return f"whole, {schema['minimum']} to {schema.get('maximum', schema.get('exclusiveMaximum', 0) - 1)}"
    return f"{schema['minimum']:g} to {schema['maximum']:g}"


def _default(schema: dict[str, Any]) -> str:
    value = schema["default"]
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def between(text: str, marker: str) -> str:
    """What stands between `<!-- marker -->` and `<!-- /marker -->`. Raises ValueError unless both are there once."""
    found = re.findall(rf"<!-- {marker} -->\n\n(.*?)\n\n<!-- /{marker} -->", text, flags=re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"the page has {len(found)} places for {marker}")
    return str(found[0])


def rewritten(text: str, marker: str, content: str) -> str:
    """`text` with `content` between the markers, and nothing else changed."""
    old = f"<!-- {marker} -->\n\n{between(text, marker)}\n\n<!-- /{marker} -->"
    return text.replace(old, f"<!-- {marker} -->\n\n{content}\n\n<!-- /{marker} -->")


def main() -> None:
    quiet_libraries()
    # Matrices this small only wait for each other on several threads.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="safegraft-") as folder:
        text = rewritten(PAGE.read_text(encoding="utf-8"), "table", table(Workshop(Path(folder) / "families")))
    PAGE.write_text(rewritten(text, "parameters", parameters()), encoding="utf-8")


if __name__ == "__main__":
    main()
