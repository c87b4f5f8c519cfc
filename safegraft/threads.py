"""Threads of the numerical libraries, on machines that do other things as well."""

import os


def share_cores() -> None:
    """Has OpenMP's threads sleep while they wait for each other, unless the environment says otherwise.

    By default they turn in circles, and on a core that others use too, one that waits so keeps away the one for which
    it waits. For work of many small steps, like answering. To be called before PyTorch is loaded: OpenMP reads the
    variable then, and not again.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
