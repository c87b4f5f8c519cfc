"""The fault scoreboard: `python -m tests.chaos`. Real services, faults on purpose, one checker of what must hold."""
