"""Imported before numpy in the process that judging processes are forked from.

Its threads' stacks and buffers would count against the memory that each of those may have: on 64 cores, all of it.
"""

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
