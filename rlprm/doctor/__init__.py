"""Checks of an environment, each with its cure: is this machine, or this cluster, fit to run a configuration?

`finding` says what a check returns; `wanted` what a configuration asks of its environment; :mod:`rlprm.actors.facts`
what a node has. The checks compare the two: `software`, `machine`, `storage`, `network`, `services`; `reduction` and
`parity` try the collectives and the engines for real. `here` examines this machine, `rlprm.run.preflight` a cluster.
"""
