"""How each library is asked to do the same work; every file runs in a virtual environment of its own, see ``benchmarks/peers.py``."""
