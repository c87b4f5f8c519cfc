"""What may come out of a parser, whatever went in: a value, or a user's error with a code of its own."""

from collections.abc import Callable

from safegraft.errors import UserError

# Longer than any honest message; a customer's text in one is cut.
MAX_SHOWN = 1000


def only_user_errors(parse: Callable[[], object]) -> str:
    """Runs it. Returns the code of its error, or "". Anything else than a UserError with a code goes through."""
    try:
        parse()
    except UserError as error:
        found = error
    else:
        return ""
    assert found.code != found.default_code, f"{type(found).__name__} without a code of its own: {found}"
    for text in (found.message, found.param or ""):
        assert len(text) < MAX_SHOWN, f"{found.code} shows {len(text)} characters"
        assert text.isprintable(), f"{found.code} shows what is not printable: {text!a}"
    return found.code
