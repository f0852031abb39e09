"""From reward streams to advantages, in the one order that every method shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.estimators import gae, none
from rlprm.core.gates import open_gate, trust_gate
from rlprm.core.groups import group_sum, known, lone, no_spread
from rlprm.core.merge import separate
from rlprm.core.normalize import check_axes, is_raw, normalize
from rlprm.core.reduce import Identity
from rlprm.core.whiten import Whiten, whiten as whitened
from rlprm.errors import ConfigError
from rlprm.records import Advantages, Shard, Stream
from rlprm.roles import Estimator, Gate, Merge, Normalizer, Reduce
