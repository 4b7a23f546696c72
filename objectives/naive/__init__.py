"""Each algorithm as one plain loop over explicit sequences: no sharing of prefixes, no caches, no masks, no batches.

This is what to read first, and what the library is tested against: loss and every gradient, in fp64.
"""
