"""The words that gateway, worker, command line and clients share. Pydantic only: no torch, no HTTP, no SQL."""
