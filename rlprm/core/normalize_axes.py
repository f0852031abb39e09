"""The axes of :func:`rlprm.core.normalize.normalize`: what each may say, and which combinations mean nothing."""

from __future__ import annotations

import math
from typing import Literal, get_args

from rlprm.errors import ConfigError

Unit = Literal["token", "step", "response"]
Subset = Literal["all", "correct", "incorrect"]
Accumulate = Literal["none", "prefix", "suffix"]
Centre = Literal[
    "none",
    "group",
    "leave_one_out",
    "token_mean_group",
    "token_mean_loo",
    "token_mean_loo_released",
    "length_weighted",
    "incorrect_mean",
    "step_index",
    "position",
    "batch",
    "running",
]
Scale = Literal[
    "none",
    "group_std",
    "token_mean_std",
    "batch_std",
    "running_std",
    "return_range",
    "local_return_range",
    "min_max",
    "rank",
    "length",
]
Order = Literal["none", "centre_then_scale", "scale_then_centre"]
Bound = float | Literal["none", "tanh", "sigmoid"]

NO_DIVISOR = ("none", "min_max", "rank", "length")  # nothing that could come close to 0 is divided by
# Centres that differ within a row; all others move (or stretch) a whole row by one number.
WITHIN_ROW = ("step_index", "position")


def check_axes(
    *,
    unit: Unit,
    subset: Subset,
    clip_first: float | None,
    accumulate: Accumulate,
    centre: Centre,
    scale: Scale,
    order: Order,
    bound: Bound,
    eps: float,
    decay: float | None,
) -> None:
    """Refuse combinations that mean nothing, and settings that would be read by nobody.

    >>> check_axes(unit="response", subset="all", clip_first=None, accumulate="none", centre="step_index", scale="none",
    ...            order="none", bound="none", eps=0.0, decay=None)
    Traceback (most recent call last):
    rlprm.errors.ConfigError: centre step_index needs unit token or step; a whole response has no step index

    Raises:
        ConfigError: always with the axis, what was found and what to write instead.
    """
    for name, value, options in (
        ("unit", unit, get_args(Unit)),
        ("subset", subset, get_args(Subset)),
        ("accumulate", accumulate, get_args(Accumulate)),
        ("centre", centre, get_args(Centre)),
        ("scale", scale, get_args(Scale)),
        ("order", order, get_args(Order)),
    ):
        if value not in options:
            raise ConfigError(f"normalizer {name} is {value!r}; expected one of {', '.join(options)}")
    _check_units(unit, accumulate, centre, scale)
    _check_pairs(subset, accumulate, centre, scale)
    _check_order(centre, scale, order)
    _check_numbers(scale, bound, eps, clip_first)
    if centre != "running" and scale != "running_std":
        if decay is not None:
            raise ConfigError(f"decay is {decay}, but neither centre nor scale is a running one; set decay null")
    elif decay is None or not 0 < decay <= 1:
        raise ConfigError(f"decay is {decay}; running statistics need one in (0, 1], where 1 forgets nothing")


def _check_units(unit: Unit, accumulate: Accumulate, centre: Centre, scale: Scale) -> None:
    """Axes that only some units have."""
    if centre == "step_index" and unit == "response":
        raise ConfigError("centre step_index needs unit token or step; a whole response has no step index")
    if centre == "position" and unit != "token":
        raise ConfigError(f"centre position needs unit token, found {unit}; steps are compared by centre step_index")
    if centre == "length_weighted" and unit != "response":
        raise ConfigError(f"centre length_weighted needs unit response, found {unit}; it weighs whole responses")
    for name, value in (("centre", centre), ("scale", scale)):
        if value.startswith("token_mean") and unit == "response":
            raise ConfigError(
                f"{name} {value} needs unit token or step, found {unit}; use group, leave_one_out or group_std for responses"
            )
    if unit == "response" and scale == "min_max":
        raise ConfigError(
            "scale min_max compares the entries of one response, and unit response has one; use token or step"
        )
    if unit == "response" and accumulate != "none":
        raise ConfigError(f"accumulate is {accumulate}, and unit response has one entry to sum; set accumulate none")


def _check_pairs(subset: Subset, accumulate: Accumulate, centre: Centre, scale: Scale) -> None:
    """Axes that take each other's meaning away."""
    if centre == "none" and scale in ("group_std", "token_mean_std"):
        raise ConfigError(f"scale {scale} needs a centre: it is 0 in a group of equal rewards; set centre group")
    if centre != "none" and scale == "rank":
        raise ConfigError(
            f"scale rank centres already (ranks lie in [-1, 1]), so centre {centre} is a second one; set none"
        )
    if centre == "incorrect_mean" and subset != "all":
        raise ConfigError(
            f"centre incorrect_mean compares right with wrong responses, and subset is {subset}; set subset all"
        )
    if accumulate != "none" and scale in ("return_range", "local_return_range"):
        raise ConfigError(f"scale {scale} sums up what follows by itself; set accumulate none, found {accumulate}")


def _check_order(centre: Centre, scale: Scale, order: Order) -> None:
    """``order`` speaks where there are a centre and a scale, and only then."""
    both = centre != "none" and scale != "none"
    if both and order == "none":
        raise ConfigError("order is none with both a centre and a scale; say centre_then_scale or scale_then_centre")
    if not both and order != "none":
        raise ConfigError(f"order is {order}, but there is no centre or no scale to be ordered; set order none")
    if not both:
        return
    if scale == "min_max" and order == "centre_then_scale" and centre not in WITHIN_ROW:
        raise ConfigError(
            f"scale min_max undoes centre {centre}, which moves a whole response; use order scale_then_centre"
        )
    # Running moments are those of the entries, so what they are applied to must still be the entries.
    if centre == "running" and order == "scale_then_centre":
        raise ConfigError("centre running holds the mean of unscaled rewards; use order centre_then_scale")
    if scale == "running_std" and centre != "running" and order == "centre_then_scale":
        raise ConfigError("scale running_std holds the spread of uncentred rewards; use order scale_then_centre")


def _check_numbers(scale: Scale, bound: float | str, eps: float, clip_first: float | None) -> None:
    if scale in NO_DIVISOR and eps != 0:
        raise ConfigError(f"eps is {eps}, but scale {scale} divides by nothing that could be 0; set eps 0.0")
    if scale not in NO_DIVISOR and not (eps > 0 and math.isfinite(eps)):
        raise ConfigError(f"eps is {eps}; scale {scale} needs one above 0, such as 1e-6")
    if clip_first is not None and not clip_first > 0:
        raise ConfigError(f"clip_first is {clip_first}; a clip bound must be above 0 (or null)")
    if isinstance(bound, str):
        if bound not in ("none", "tanh", "sigmoid"):
            raise ConfigError(f"bound is {bound!r}; expected none, tanh, sigmoid or a number to clip at")
    elif not bound > 0:
        raise ConfigError(f"bound is {bound}; a clip bound must be above 0 (or none)")
