"""The program ``ray``, which takes a loopback address at its word and ends with the process that has started it.

By itself ``ray start --node-ip-address=127.0.0.1`` puts the machine's own address in the place of the loopback one, and
then its ports are open to the network.
"""

from __future__ import annotations

import sys

from ray._private import services
from ray.scripts.scripts import main

from rlprm.launch.processes import bind_to_parent

if __name__ == "__main__":
    bind_to_parent()
    if hasattr(services, "resolve_ip_for_localhost"):  # not public: another Ray may not have it
        services.resolve_ip_for_localhost = lambda host: host
    sys.exit(main())
