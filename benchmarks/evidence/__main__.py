"""`python -m benchmarks.evidence`: trains and measures what is missing. `… tables` writes docs/evidence.

`… identify` times the scorers of neurons. `… judge` judges the answers anew that still lie in the cache, after a judge
has changed; `… sample FILE` and `… labels FILE` hold the judges against labels set by hand (labels.py).
"""

import argparse
from pathlib import Path

from benchmarks.evidence import identification, labels, run, tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "what", nargs="?", choices=["measure", "identify", "judge", "tables", "sample", "labels"], default="measure"
    )
    parser.add_argument("file", nargs="?", type=Path, help="of `sample` and `labels`: see labels.py")
    parser.add_argument("--base", default=run.BASE, help="a model folder, or a package that carries one")
    parser.add_argument("--cell", action="append", default=[], help="only this cell; repeatable")
    parser.add_argument("--row", action="append", default=[], help="only this row of a cell; repeatable")
    parser.add_argument("--restart", action="append", default=[], help="measure this cell anew; repeatable")
    parser.add_argument("--minutes", type=float, default=None, help="begin no row after so many minutes")
    arguments = parser.parse_args()
    if arguments.what == "identify":
        identification.run(arguments.base)
        return
    if arguments.what == "judge":
        run.judge_again()
        return
    if arguments.what in ("sample", "labels"):
        if arguments.file is None:
            parser.error("sample and labels need a file")
        (labels.sample if arguments.what == "sample" else labels.write)(run.answers(), arguments.file)
        return
    if arguments.what == "tables":
        tables.write()
        return
    run.run(arguments.base, arguments.cell, arguments.row, arguments.minutes, arguments.restart)


if __name__ == "__main__":
    main()
