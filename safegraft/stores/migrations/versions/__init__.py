"""One file a revision, `NNNN_what.py`, each after the one before."""
