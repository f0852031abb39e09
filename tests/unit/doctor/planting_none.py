"""A verifier of somebody's own, without canaries."""

from __future__ import annotations


def verify(gold: str, response: str, prompt: str) -> tuple[float, str]:
    return (float(gold == response), "equal")
