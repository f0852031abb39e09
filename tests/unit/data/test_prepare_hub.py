"""The hub is asked for a commit first; off, out of reach or without the repository it says how to do without."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from rlprm.data import prepare_hub as hub
from rlprm.errors import DataError


@pytest.fixture
def switched_on(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


def model(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_a_hub_that_is_switched_off_says_what_to_do(monkeypatch, kind):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set; unset it, or run `hf download a/b.* --from DIR"):
        hub.commit(kind, "a/b", None, 1.0)


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_a_hub_out_of_reach_says_what_to_do(switched_on, kind):
    with pytest.raises(DataError, match=r"did not answer within 1 s .* and a/b is not here; run `hf download a/b"):
        hub.commit(kind, "a/b", None, 1.0)


def test_what_the_hub_has_not_is_named(switched_on, monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    def missing(self, name, **asked):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", missing)
    with pytest.raises(DataError, match=r"the hub has no dataset 'a/b' at revision 'main' .*HF_TOKEN"):
        hub.commit("dataset", "a/b", None, 1.0)


def test_records_are_read_at_the_commit_that_was_found(monkeypatch):
    asked = {}

    def loaded(name, config_name, **wanted):
        asked.update(wanted, name=name)
        return datasets.Dataset.from_list([{"q": "1?", "chat": [{"content": "c"}], "wide": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    found = list(hub.hub_records("a/b", None, "train", "c0ffee", ["q", "chat.0.content"]))
    assert found == [("a/b[train][0]", {"q": "1?", "chat": [{"content": "c"}]})]
    assert asked == {"name": "a/b", "split": "train", "revision": "c0ffee"}


def test_a_split_that_is_not_there_is_named(monkeypatch):
    def unknown(name, config_name, **wanted):
        raise ValueError('Unknown split "tran"')

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match=r"a/b\[tran\] at c0ffee cannot be loaded: Unknown split"):
        list(hub.hub_records("a/b", None, "tran", "c0ffee", ["q"]))


def test_a_fetched_model_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    names = ["config.json", "tokenizer.json"]

    def fetched(name, *, revision, local_dir, allow_patterns):
        assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in allow_patterns)
        for each in names:
            Path(local_dir).mkdir(exist_ok=True)
            (Path(local_dir) / each).write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    with pytest.raises(DataError, match="it has no weights as safetensors"):
        hub.fetch_model("a/b", "c0ffee", tmp_path / "models/b")
    assert not (tmp_path / "models/b").exists()
    names.append("model.safetensors")
    hub.fetch_model("a/b", "c0ffee", tmp_path / "models/b")
    assert hub.incomplete(tmp_path / "models/b") is None


def test_a_copied_model_leaves_pickled_weights_behind(tmp_path):
    source = model(tmp_path / "from/a/b", "config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin")
    assert hub.local_model(tmp_path / "from", "a/b", "c") == source
    hub.copy_model("a/b", source, tmp_path / "to/c")
    assert sorted(file.name for file in (tmp_path / "to/c").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json"),
    ]
    with pytest.raises(DataError, match=r"holds nothing of model a/d; expected a folder with config.json"):
        hub.local_model(tmp_path / "from", "a/d", "e")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tokenizer.json"], "no config.json"),
        (["config.json", "model.safetensors"], "no tokenizer"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "no weights as safetensors"),
    ],
)
def test_an_incomplete_model_says_what_it_lacks(tmp_path, names, said):
    assert said in str(hub.incomplete(model(tmp_path / "m", *names)))


def test_missing_weight_files_are_counted(tmp_path):
    folder = model(tmp_path / "m", "config.json", "tokenizer.json", "a-1.safetensors")
    index = {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors", "z": "a-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hub.incomplete(folder) == "1 of 2 weight files are missing, first a-2.safetensors"
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "cannot be read" in str(hub.incomplete(folder))
