"""Throughput: the runner, the record and the pictures of every benchmark, and the parts of that of local attention.

``race`` takes samples in turn under a clock; ``record`` is a row of a CSV file; ``plots`` draws rows. Of attention,
``cases`` and ``cards`` say what the least traffic, arithmetic and time of a shape are, ``providers`` are the ways to
compute it, ``attention`` checks a provider, then times it with the clocks of ``timing``, and ``static`` says what can
be known of the GPU kernels without a GPU. The command line is ``htnet profile``.
"""
