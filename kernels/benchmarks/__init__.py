"""Throughput of local attention, ours and the alternatives, against what the hardware allows.

``cases`` and ``cards`` say what the least traffic, arithmetic and time of a shape are; ``providers`` are the ways to
compute it; ``runner`` checks a provider and then times it, with the clocks of ``timing``; ``static`` says what can be
known of the GPU kernels without a GPU; ``record`` and ``plots`` keep and draw the rows. The command line is
``htnet profile``.
"""
