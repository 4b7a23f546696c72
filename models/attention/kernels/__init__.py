"""Triton kernels of thought attention, each with the torch-facing function that launches it.

`dense`: whole thoughts at every text position, in one pass, forward and backward.
`step`: the newest token of thoughts at every text position: private keys on top of a finished text part.
`decode`: new tokens of thoughts at a few anchors: the shared text split over programs, then own keys and merge.

The sizes a kernel is compiled for come from the function beside it that returns its constants, so that what is tested
ahead of time is what is launched. Softmax is in base 2 throughout, with log2(e) folded into the scale of the scores.
Products take their operands in the dtype of the inputs, fp32 without TF32, and accumulate in fp32.
"""
