"""Known answers of Random123's own test file, and what the draws are keyed by."""

from __future__ import annotations

import pytest
import torch

from models.philox import Rng, philox4x32

KNOWN_ANSWERS = [
    # counter, key, result: philox4x32 with 10 rounds, kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    words = philox4x32(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == result


def test_uniforms_are_uniform_and_inside_the_open_interval():
    n = torch.arange(200_000)
    u = Rng(3, 5).uniform(n, n * 0, n * 0, 0).double()
    assert 0 < u.min() and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    chi_square = ((counts - 4000) ** 2 / 4000).sum().item()
    assert chi_square < 86  # 49 degrees of freedom, p = 0.001
    # The extremes the arithmetic can produce are exact in fp32.
    assert (torch.tensor([0, 2**23 - 1]) * 2 + 1).float().mul(2.0**-24).tolist() == [2.0**-24, 1 - 2.0**-24]


def test_every_part_of_the_key_matters():
    base = dict(sample_id=1, anchor=2, thought=3, token=4)

    def draw(seed=0, step=0, **changes):
        return Rng(seed, step).uniform(**{k: torch.tensor(v) for k, v in (base | changes).items()}).item()

    draws = [draw(), draw(seed=1), draw(step=1), *(draw(**{name: 9}) for name in base)]
    assert len(set(draws)) == len(draws)
    assert draw() == draw()
