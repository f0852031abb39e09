"""Verifiers (maths, exact match, format) and the pool of killable processes they run in.

A verifier is a plain function ``(gold, response, prompt) -> (outcome in [0, 1], reason)``; a third entry may hold
labels per reasoning step. It is named in YAML by its dotted path, with keyword options beside it. This package imports
no torch, so that a worker starts in a fraction of a second; only :mod:`rlprm.verify.pool`, which lives in the parent,
does.
"""
