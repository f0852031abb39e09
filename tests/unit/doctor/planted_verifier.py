"""A verifier that finds everything right but seven, and so fails one of its canaries."""

from __future__ import annotations

CANARIES = [("7", "7", 1.0), ("7", "8", 0.0), ("8", "9", 0.0)]


def verify(gold: str, response: str, prompt: str) -> tuple[float, str]:
    return (float(gold != "7" or gold == response), "planted")
