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
        assert error.code != error.default_code, f"{type(error).__name__} without a code of its own: {error}"
        for text in (error.message, error.param or ""):
            assert len(text) < MAX_SHOWN, f"{error.code} shows {len(text)} characters"
            assert text.isprintable(), f"{error.code} shows what is not printable: {text!a}"
        return error.code
    return ""
