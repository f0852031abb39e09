from __future__ import annotations

import pytest

from rlprm.errors import ConfigError
from rlprm.paths import _locate


def test_a_checkout_a_wheel_and_neither(tmp_path):
    package = tmp_path / "rlprm"
    package.mkdir()
    with pytest.raises(ConfigError, match="found no folder of conf"):
        _locate("conf", package)
    (tmp_path / "conf").mkdir()
    assert _locate("conf", package) == tmp_path / "conf"
    (package / "_shipped" / "conf").mkdir(parents=True)
    assert _locate("conf", package) == package / "_shipped" / "conf"
