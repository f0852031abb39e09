"""Ray actors, thin: unpack, call an engine, pack. No maths here."""

import os

# Ray reads these when it is imported, so they are set before any module here imports it. Token authentication is said
# explicitly: a local Ray turns it on by itself, but processes that join would then not know of it.
for _key, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_key, _value)
