"""Benchmarks that compare whole training steps; those of single kernels are in :mod:`kernels.benchmarks`."""
