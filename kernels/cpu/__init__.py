"""Loops compiled for the CPU, for work in which memory or Python's lock slows down single operations of PyTorch."""
