"""The random number behind each drawn token, as a pure function of (seed, sample index, position).

Counter-based: no generator state, so a token's draw is the same alone or in any batch, after a preemption or a
restart, on any rank. The function is documented because answers depend on it; changing it changes every seeded
answer.

    stream  = mix(mix(seed + G) ^ (sample_index + 1) * G)      once per sample
    uniform = (mix(stream + (position + 1) * G) >> 11) * 2^-53

with all arithmetic modulo 2^64, G = 0x9E3779B97F4A7C15 and mix the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import secrets

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
UNIT = 2.0**-53


def mix(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers; each input bit changes half of the output bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def stream_of(seed: int, sample_index: int) -> int:
    """The stream of draws of one sample of one request."""
    return mix(mix((seed + GOLDEN) & MASK) ^ (((sample_index + 1) * GOLDEN) & MASK))


def uniform(stream: int, position: int) -> float:
    """The draw in [0, 1) for the token that will stand at `position` of its sequence."""
    return (mix((stream + (position + 1) * GOLDEN) & MASK) >> 11) * UNIT


def fresh_seed() -> int:
    """A seed for a request that gave none; 63 bits, so that it fits every interface's signed integer."""
    return secrets.randbits(63)
