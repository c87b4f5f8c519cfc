"""The HTTP shell. Parses, authorises, calls `safegraft`, answers. Never imports torch, safegraft.engine or worker."""
