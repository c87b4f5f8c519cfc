"""`python -m tests.chaos [--rows 1,5] [--seed N] [--quick]`: runs rows, prints what was counted, writes it down."""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import page, rows
from tests.chaos.material import make

SEEDS = (1, 2, 3, 4, 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="by commas; all where it is left out")
    parser.add_argument("--seed", type=int, action="append", help=f"of row 15; {SEEDS} where it is left out")
    parser.add_argument("--quick", action="store_true", help="one round of each fault; writes nothing down")
    parser.add_argument("--keep", type=Path, help="a folder for logs and data; else they are thrown away")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything below is ended, too
    numbers = [int(part) for part in given.rows.split(",") if part] or list(rows.ROWS)
    red = 0
    with tempfile.TemporaryDirectory(prefix="safegraft-chaos-") as name:
        folder = given.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        stage = rows.Stage(make(folder), folder, quick=given.quick, say=say)
        try:
            for number in numbers:
                title, function = rows.ROWS[number]
                seeds = given.seed or (SEEDS if number == 15 and not given.quick else SEEDS[:1])
                for seed in seeds if number == 15 else seeds[:1]:
                    stage.seed = seed
                    say(f"row {number}, seed {seed}: {title}")
                    began = time.monotonic()
                    score = function(stage)
                    result = page.result_of(score, time.monotonic() - began)
                    say(f"  {page.line(result)}")
                    for found in score.found[:20]:
                        say(f"    {found}")
                    red += bool(score.found)
                    if not given.quick:
                        page.note(number, title, seed, result)
        finally:
            stage.close()
    if not given.quick:
        page.write()
    say("red" if red else "green")
    return 1 if red else 0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
