"""The names on the wire between gateway and worker: one task, one queue, one argument (a job's id).

A message says that there is work; whose turn it is, the worker asks the job records."""

REALIGN_TASK = "safegraft.realign"
REALIGN_QUEUE = "safegraft.realign"
# The exit status of a worker that cannot start until somebody has done something: sysexits' EX_CONFIG.
NOT_STARTED = 78
