"""Counter-based uniforms: a draw is a pure function of what it is for, never of when or where it is made.

Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), written with int64 tensors so
that it gives the same bits on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32-bit words, from a counter of four such tensors (broadcast) and a key of two ints."""
    a, b, c, d = torch.broadcast_tensors(*(word & _MASK for word in counter))
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(_ROUNDS):
        # The 64-bit products wrap in int64; the mask after the shift recovers the unsigned high word.
        p0, p1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((p1 >> 32) & _MASK) ^ b ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ d ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return a, b, c, d


@dataclass(frozen=True)
class Rng:
    """The source of every random draw of one training step, keyed by the run's seed and the step."""

    seed: int
    step: int

    def uniform(self, sample_id: Tensor, anchor: Tensor, thought: Tensor, token: Tensor | int) -> Tensor:
        """One fp32 uniform in (0, 1) per broadcast element, keyed by (seed, step, sample id, anchor, thought, token).

        The arguments are int64 tensors taken modulo 2³². Values are odd multiples of 2⁻²⁴, so neither 0 nor 1 occurs.
        """
        token = torch.as_tensor(token, device=sample_id.device)
        word = philox4x32((sample_id, anchor, thought, token), (self.seed, self.step))[0]
        return ((word >> 9) * 2 + 1).to(torch.float32) * 2.0**-24
