"""One side of the comparison of both engines, in a process that Ray starts on the side's node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlprm.actors.network import use_own_interface
from rlprm.doctor.parity import SIDES, finite
from rlprm.errors import RlprmError


def side_of(side: str, told: Mapping[str, Any]) -> Any:
    """The log-probs, or in words why there are none."""
    use_own_interface()
    try:
        found = SIDES[side](told)
    except RlprmError as error:
        return str(error)
    return found if finite(found) else "it gave a NaN or an infinity"
