"""Each guard finds a planted violation and leaves the lawful neighbour alone; one that finds nothing is no guard."""

from __future__ import annotations

import pytest

from tests.architecture import guards


def plant(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rlprm/core/a.py", "import ray\n"),
        ("rlprm/core/a.py", "import numpy\n"),
        ("rlprm/core/a.py", "from rlprm.engine import learner\n"),
        ("rlprm/core/a.py", "def f():\n    import transformers.models\n"),
        ("rlprm/driver.py", "from rlprm import config\n"),
        ("rlprm/driver_async.py", "from rlprm.config import TrainConfig\n"),
        ("rlprm/engine/a.py", "import ray\n"),
        ("rlprm/engine/a.py", "from rlprm.actors.worker import Worker\n"),
        ("rlprm/actors/a.py", "import vllm\n"),
        ("rlprm/actors/a.py", "import omegaconf\n"),
        ("rlprm/actors/a.py", "from rlprm.run.build import build\n"),
        ("rlprm/run/a.py", "from hydra.utils import instantiate\n"),
        ("rlprm/sources/a.py", "from rlprm.cli.main import main\n"),
        ("rlprm/records.py", "from rlprm.batch import pad\n"),
    ],
)
def test_import_against_the_direction_is_found(tmp_path, path, text):
    plant(tmp_path, {path: text})
    assert any(line.startswith(path) for line in guards.imports(tmp_path))


def test_lawful_imports_pass(tmp_path):
    plant(
        tmp_path,
        {
            "rlprm/core/a.py": "import math\nimport torch\nfrom jaxtyping import Float\nimport rlprm.records\n",
            "rlprm/driver.py": "from rlprm.roles import Keep\nfrom rlprm.errors import NoLearningSignal\n",
            "rlprm/engine/a.py": "import vllm\nimport deepspeed\nfrom rlprm.core import kl\n",
            "rlprm/actors/a.py": "import ray\nfrom rlprm.engine import learner\n",
            "rlprm/run/build.py": "import hydra\nfrom rlprm import driver\n",
        },
    )
    assert guards.imports(tmp_path) == []


def test_long_files_are_found(tmp_path):
    plant(
        tmp_path,
        {
            "rlprm/a.py": "x = 1\n" * 400,
            "rlprm/b.py": "x = 1\n" * 399,
            "rlprm/driver.py": "x = 1\n" * 150,
            "tests/test_a.py": "x = 1\n" * 500,
        },
    )
    assert [line.split(":")[0] for line in guards.file_sizes(tmp_path)] == [
        "rlprm/a.py",
        "rlprm/driver.py",
        "tests/test_a.py",
    ]


@pytest.mark.parametrize("text", ["def train(config):\n    pass\n", "x = run.cfg.steps\n", "f(hf_config=1)\n"])
def test_configuration_in_a_driver_is_found(tmp_path, text):
    plant(tmp_path, {"rlprm/driver.py": text, "rlprm/other.py": text})
    (line,) = guards.driver_reads_no_config(tmp_path)
    assert line.startswith("rlprm/driver.py:")


@pytest.mark.parametrize("text", ["y = x[:, 1:]\n", "y = x[:, :-1]\n", "y = x[..., :-1, :]\n", "y = x[:, 1:, None]\n"])
def test_a_shift_outside_alignment_is_found(tmp_path, text):
    plant(tmp_path, {"rlprm/core/loss.py": text, "rlprm/core/alignment.py": text, "rlprm/data/a.py": text})
    (line,) = guards.shifts(tmp_path)
    assert line.startswith("rlprm/core/loss.py:1:")


def test_other_slices_are_no_shift(tmp_path):
    plant(tmp_path, {"rlprm/core/a.py": "a = x[1:]\nb = x[:, 2:]\nc = x[:, :n]\nd = x[:, 0]\ne = x[0, 1:]\n"})
    assert guards.shifts(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "bsz = 1\n",
        "entropy_coef = 1\n",
        "def f(eos_mask): ...\n",
        "x.action_mask\n",
        "f(uid=1)\n",
        "class Episode: ...\n",
    ],
)
def test_a_banned_name_is_found(tmp_path, text):
    plant(tmp_path, {"rlprm/a.py": text})
    assert guards.banned_names(tmp_path)


def test_a_banned_key_is_found_and_ordinary_names_are_not(tmp_path):
    plant(
        tmp_path,
        {"conf/a.yaml": "# weight\nkl_coef: 1\n", "rlprm/a.py": "coefficients = os.getuid()\nfluid = stat.st_uid\n"},
    )
    (line,) = guards.banned_names(tmp_path)
    assert line.startswith("conf/a.yaml:2:")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rlprm/run/build.py", "x = section.get('lr', 1e-6)\n"),
        ("rlprm/run/build.py", "x = getattr(section, 'lr', None)\n"),
        ("rlprm/config.py", "x = keys.pop('lr', 0)\n"),
        ("rlprm/config.py", "class A(BaseModel):\n    lr: float = 1e-6\n"),
        ("rlprm/config.py", "class S(BaseModel): ...\nclass A(S):\n    lr: float = 1e-6\n"),
        ("rlprm/config.py", "class A(BaseModel):\n    lr: float = Field(default=1e-6, ge=0)\n"),
        ("rlprm/config.py", "class A(BaseModel):\n    lr: float = Field(1e-6)\n"),
        ("rlprm/config.py", "class A(BaseModel):\n    tags: Annotated[list, Field(default_factory=list)]\n"),
    ],
)
def test_a_default_outside_conf_is_found(tmp_path, path, text):
    plant(tmp_path, {path: text})
    assert guards.config_defaults(tmp_path)


def test_bounds_and_plain_lookups_are_no_default(tmp_path):
    plant(
        tmp_path,
        {
            "rlprm/config.py": "class A(BaseModel):\n    model_config = ConfigDict(frozen=True)\n"
            "    lr: Annotated[float, Field(gt=0)]\n    n: int = Field(ge=1)\n",
            "rlprm/run/build.py": "x = table.get(key)\ny = table.pop()\n",
        },
    )
    assert guards.config_defaults(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "pickle.load(f)\n",
        "cloudpickle.loads(b)\n",
        "torch.load(p)\n",
        "torch.load(p, weights_only=False)\n",
        "f(trust_remote_code=True)\n",
        "f(trust_remote_code=flag)\n",
        "eval(text)\n",
        "exec(text)\n",
    ],
)
def test_code_that_runs_what_a_file_says_is_found(tmp_path, text):
    plant(tmp_path, {"rlprm/a.py": text})
    assert guards.unsafe_calls(tmp_path)


def test_safe_calls_pass(tmp_path):
    plant(tmp_path, {"rlprm/a.py": "model.eval()\ntorch.load(p, weights_only=True)\nf(trust_remote_code=False)\n"})
    assert guards.unsafe_calls(tmp_path) == []


def test_a_swallowed_exception_is_found(tmp_path):
    swallowed = "try:\n    f()\nexcept Exception:\n    pass\n"
    bare = "try:\n    f()\nexcept:\n    pass\n"
    again = "try:\n    f()\nexcept BaseException:\n    close()\n    raise\n"
    plant(tmp_path, {"rlprm/a.py": swallowed, "rlprm/b.py": bare, "rlprm/c.py": again, "rlprm/actors/d.py": swallowed})
    assert [line.split(":")[0] for line in guards.broad_excepts(tmp_path)] == ["rlprm/a.py", "rlprm/b.py"]


def only_known(name):
    if name not in ("actor/lr", "reward/outcome/mean", "val-core/gsm8k/accuracy/greedy"):
        raise ValueError(name)


def test_an_unlisted_metric_is_found(tmp_path):
    plant(
        tmp_path,
        {
            "rlprm/a.py": "m = {'actor/lr': 1, f'reward/{name}/mean': 2, f'val-core/{s}/accuracy/greedy': 3}\n",
            "rlprm/b.py": "m = {'actor/learning_rate': 1}\n",
            "rlprm/c.py": "m = {f'reward/{name}/average': 1}\n",
            "rlprm/d.py": "path = 'rlprm/core/metrics.py', f'{root}/actor/x', 'text/plain'\n",
        },
    )
    assert [line.split(":")[0] for line in guards.unlisted_metrics(tmp_path, only_known)] == [
        "rlprm/b.py",
        "rlprm/c.py",
    ]


def test_a_key_nobody_reads_is_found(tmp_path):
    plant(
        tmp_path,
        {
            "conf/policy/adamw.yaml": "_target_: rlprm.a.f\n# one\nlr: 1\n# two\nbeta: 2\n# three\nunread: 3\n",
            "conf/train.yaml": "defaults:\n  - policy: adamw\n  - _self_\nstreams:\n  mine:\n    lr: 1\n",
            "rlprm/a.py": "def f(*, beta): ...\nx = section.lr, config.streams\n",
            "rlprm/config.py": "class A(BaseModel):\n    unread: int\n",
        },
    )
    (line,) = guards.unread_keys(tmp_path)
    assert line.startswith("conf/policy/adamw.yaml:7:")


def test_a_readme_that_drifted_from_the_driver_is_found(tmp_path):
    driver = "def train(run):\n    for step in run.steps:\n        learn(step)\n"
    shown = "<!-- rlprm/driver.py -->\n```python\nfor step in run.steps:\n    learn(step)\n```\n"
    plant(tmp_path, {"rlprm/driver.py": driver})
    assert guards.readme_driver(tmp_path) is None
    plant(tmp_path, {"README.md": "# rlprm\n"})
    assert guards.readme_driver(tmp_path) is None
    plant(tmp_path, {"README.md": shown})
    assert guards.readme_driver(tmp_path) == []
    plant(tmp_path, {"README.md": shown.replace("learn(step)", "learn(step, batch)")})
    assert guards.readme_driver(tmp_path)


def test_a_stranger_at_the_top_level_is_found(tmp_path):
    plant(tmp_path, {"setup.py": "", "README.md": "", ".gitignore": "", "rlprm/a.py": ""})
    assert guards.layout(tmp_path) == ["setup.py: not in the agreed layout"]
