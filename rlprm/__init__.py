"""rlprm: reinforcement learning of language models with process rewards."""

import os

__version__ = "0.1.0"

# Ray reads these when it is imported, so they are set before any module of this package can import it. Token
# authentication is said explicitly: a local Ray turns it on by itself, but processes that join would not know of it.
for _key, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_key, _value)
