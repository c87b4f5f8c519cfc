"""Tables in Markdown, and pages whose tables stand between markers, `<!-- name -->` and `<!-- /name -->`."""

from collections.abc import Iterable, Mapping, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    parts = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(parts + ["| " + " | ".join(line) + " |" for line in lines])


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The page with every part between its markers made anew. Raises ValueError where a marker is missing."""
    for name, part in parts.items():
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not found or not end:
            raise ValueError(f"no {first} … {last}")
        text = f"{before}{first}\n\n{part}\n\n{last}{after}"
    return text
