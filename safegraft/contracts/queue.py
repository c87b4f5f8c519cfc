"""The names on the wire between gateway and worker: one task, one queue, one argument (the job's id)."""

REALIGN_TASK = "safegraft.realign"
REALIGN_QUEUE = "safegraft.realign"
