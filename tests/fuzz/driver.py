"""`python -m tests.fuzz.driver TARGET [libFuzzer's options]`: one target under atheris, until something is found."""

import importlib
import random
import sys
from typing import Any


def main() -> None:
    import atheris

    from tests.fuzz.__main__ import INSTRUMENTED

    name = sys.argv.pop(1)
    # Whatever is to be seen by the fuzzer has to be imported here for the first time.
    with atheris.instrument_imports(include=INSTRUMENTED):
        target: Any = importlib.import_module(f"tests.fuzz.{name}")

    def mutate(raw: bytes, most: int, seed: int) -> bytes:
        # Without a time or a counter: libFuzzer's seed alone decides.
        return bytes(target.mutate(raw, most, random.Random(seed), atheris.Mutate))

    atheris.Setup(sys.argv, lambda raw: void(target.check(raw)), custom_mutator=mutate)
    atheris.Fuzz()


def void(_: object) -> None:
    pass


if __name__ == "__main__":
    main()
