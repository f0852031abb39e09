"""Planted dummy keys never appear in anything a run writes. Each is made up, and wears the clothes of a real one."""

from __future__ import annotations

import json

import pytest

from rlprm.run.folder import write_run_header
from rlprm.run.redact import HIDDEN, is_secret_name, redact, redact_text
from rlprm.run.tracker import MetricsLog, RolloutLog, TensorBoard, Trackers, WandB
from tests.unit.run.wandb_log import contents

# where a key hides -> the part that must never be seen
PLANTED = {
    "yaml value": "plantedyaml0001",
    "command line override": "plantedoverride0002",
    "environment": "plantedenvironment0003",
    "user part of an address": "planteduserinfo0004",
    "header": "plantedheader0005",
    "netrc": "plantednetrc0006",
    "hub token": "hf_plantedhubtoken0007",
}
CONFIG = {
    "model": {"path": "org/model", "api_key": PLANTED["yaml value"]},
    "overrides": [f"hub.hf_token={PLANTED['command line override']}", "steps=3"],
    "note": f"the key is {PLANTED['environment']} today",
    "store": f"https://me:{PLANTED['user part of an address']}@host.example/path",
    "header": f"Authorization: Bearer {PLANTED['header']}",
    "netrc": f"machine host login me password {PLANTED['netrc']}",
    "hub": f"use {PLANTED['hub token']}",
    "max_tokens": 64,
}


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_API_KEY", PLANTED["environment"])


def assert_clean(text):
    assert [where for where, secret in PLANTED.items() if secret in text] == []


def test_every_planted_key_is_taken_out_of_a_nested_config(planted):
    clean = redact(CONFIG)
    assert_clean(json.dumps(clean))
    assert clean["model"] == {"path": "org/model", "api_key": HIDDEN}
    assert clean["overrides"] == [f"hub.hf_token={HIDDEN}", "steps=3"]
    assert clean["store"] == f"https://{HIDDEN}@host.example/path"
    assert clean["max_tokens"] == 64


def test_every_planted_key_is_taken_out_of_text(planted):
    assert_clean(redact_text(json.dumps(CONFIG, indent=1)))
    assert_clean(redact_text("\n".join(f"{key}: {value}" for key, value in CONFIG.items())))
    assert_clean(
        redact_text(
            f"api_key: '{PLANTED['yaml value']}'\nTOKEN={PLANTED['command line override']}"
            f" {PLANTED['environment']} {CONFIG['store']} {CONFIG['header']} {CONFIG['netrc']} {CONFIG['hub']}"
        )
    )


def test_what_is_no_secret_is_left_alone():
    text = (
        "granularity: token\npad_token: <pad>\nmax_tokens: 64\ntoken_budget: 4096\nhf_token: null\n"
        "_target_: rlprm.core.normalize.group_mean\npath: s3://bucket/key\n"
        "commit: 5148cfa0a1b2c3d4e5f60718293a4b5c6d7e8f90\n"
    )
    assert redact_text(text, {}) == text
    config = {"granularity": "token", "token": None, "per_token": True, "keys": ["a", "b"], "lr": 1e-6}
    assert redact(config, {}) == config


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "token", "db_password", "AWS_SECRET_ACCESS_KEY", "api-key"]
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["tokens", "max_tokens", "eos_token", "key", "monkey", "secretary", "token_budget"])
def test_names_that_are_none(name):
    assert not is_secret_name(name)


def test_short_environment_values_do_not_eat_words():
    assert redact_text("steps: 3", {"SOME_TOKEN": "s"}) == "steps: 3"


def test_no_planted_key_reaches_any_file_of_a_run(planted, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rlprm", "train", f"hub.token={PLANTED['command line override']}"])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(CONFIG["netrc"] + "\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    run = tmp_path / "run"
    run.mkdir()
    write_run_header(run, "\n".join(f"{key}: {value}" for key, value in CONFIG.items()), {"torch": "2.13.0"}, None)
    wandb = WandB(
        run, project="p", name="n", group=None, job_type="j", tags=["t"], run_id="id1", config=CONFIG, artifact="n"
    )
    trackers = Trackers([MetricsLog(run), TensorBoard(run / "tensorboard"), wandb], RolloutLog(run))
    trackers.log(1, {"actor/lr": 1e-6})
    trackers.close()

    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) >= 6
    found = {
        f"{path.relative_to(run)}: {where}"
        for path in files
        for where, secret in PLANTED.items()
        if secret.encode() in path.read_bytes()
    }
    assert found == set()
    # W&B was really there, and offline.
    (log,) = (run / "wandb").glob("offline-run-*-id1/*.wandb")
    assert b"n-config" in contents(log)  # the artifact was logged


def test_no_key_of_the_shipped_configuration_looks_like_a_secret():
    """A setting that is hidden in config.yaml could be neither resumed from nor exported."""
    from rlprm.paths import conf_dir, recipes_dir
    from tests.contract.options import leaves, read

    files = sorted([*conf_dir().rglob("*.yaml"), *recipes_dir().rglob("*.yaml")])
    names = {part for file in files for key, _ in leaves(read(file) or {}) for part in key.split(".")}
    assert len(names) > 100
    assert not sorted(name for name in names if is_secret_name(name))
