"""The parts of the command line that :mod:`robust_if.cli` puts together."""
