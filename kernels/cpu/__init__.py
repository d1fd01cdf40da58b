"""Loops compiled for the CPU where single operations of PyTorch are held up by memory or by Python's lock."""
