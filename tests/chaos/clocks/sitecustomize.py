"""On the path of a worker whose clock is wrong: `time.time` is moved by CHAOS_CLOCK_SECONDS before all else runs."""

import os
import sys
import time

_seconds = float(os.environ.get("CHAOS_CLOCK_SECONDS", "0"))
if _seconds:
    _true, _true_ns = time.time, time.time_ns
    time.time = lambda: _true() + _seconds
    time.time_ns = lambda: _true_ns() + int(_seconds * 1e9)
    print(f"clock moved by {_seconds:g}", file=sys.stderr, flush=True)  # noqa: T201
