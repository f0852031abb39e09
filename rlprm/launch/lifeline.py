"""What a launcher tells the programs on other machines through their stdin: secrets first, wishes later.

Secrets never stand on a command line, where every user of the machine could read them. While the stream is open the
launcher is there; its end means that the connection is gone, and the program ends its part.
"""

from __future__ import annotations

import json
import select
from collections.abc import Mapping
from io import TextIOWrapper

from rlprm.errors import ConfigError
from rlprm.launch.processes import Wishes

FIRST_S = 60.0
STOP_LINE = b"stop\n"


def opening(secrets: Mapping[str, str]) -> bytes:
    """The first line that a launcher writes.

    >>> opening({"RAY_AUTH_TOKEN": "t"})
    b'{"RAY_AUTH_TOKEN": "t"}\\n'
    """
    return json.dumps(dict(secrets)).encode() + b"\n"


def first_line(stream: TextIOWrapper, wishes: Wishes) -> dict[str, str]:
    """The secrets; afterwards ``wishes`` listens to the stream.

    Raises:
        ConfigError: nothing came, or something else.
    """
    if not select.select([stream], [], [], FIRST_S)[0]:
        raise ConfigError(f"no line of secrets came on stdin within {FIRST_S:.0f} s; expected one from rlprm launch")
    line = stream.readline()
    try:
        values = json.loads(line)
        secrets = {str(key): str(value) for key, value in values.items()}
    except (ValueError, AttributeError):
        # the line is not shown: it may hold a secret
        raise ConfigError(
            "the first line on stdin is no JSON object of secrets; expected one from rlprm launch"
        ) from None
    wishes.on_lifeline(stream)
    return secrets
