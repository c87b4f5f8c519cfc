"""Timings, always beside something of known cost in the same run. Absolute times on a shared machine mean nothing."""
