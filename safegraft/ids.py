"""Ids of records: a prefix that tells what it is, then the time, so that they sort by age, then chance."""

import secrets
import time


def new_id(prefix: str) -> str:
    """For example `adp_0192f3c1a2b4…`: 48 bits of milliseconds and 64 random bits, in hex."""
    return f"{prefix}_{int(time.time() * 1000):012x}{secrets.token_hex(8)}"
