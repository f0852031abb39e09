from __future__ import annotations

import pytest
import yaml

from rlprm.cli.main import main

TINY = ("recipe=chain_arithmetic_cpu", "steps=2")


def ablate(tmp_path, *words):
    return main(["ablate", *TINY, f"output_dir={tmp_path}", *words])


def test_a_dry_run_lists_cells_runs_and_rollouts(tmp_path, capsys):
    words = ("normalizer=raw,return_range", "seeds=[3,7]", "--cell", "rloo: method=outcome_rloo", "--baseline", "rloo")
    assert ablate(tmp_path, *words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "3 cells, all with: recipe=chain_arithmetic_cpu steps=2" in said
    assert "raw           normalizer@streams.process.normalizer=raw\n" in said
    assert "rloo          method=outcome_rloo (baseline)" in said
    assert f"6 runs in {tmp_path}/ablation, 0 finished, 6 to run" in said
    assert "return_range, seed 7" in said
    assert f"about {6 * 2 * 32 * 8} rollouts" in said
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_every_wrong_cell_is_named_before_anything_starts(tmp_path, capsys):
    words = ("normalizer=raw,retrun_range", "--cell", "x: stepz=3", "--cell", "y: policy.mini_batches=0", "seeds=1")
    assert ablate(tmp_path, *words) == 1
    said = capsys.readouterr().err
    assert "cell 'retrun_range': normalizer=retrun_range: there is no such option" in said
    assert "nearest is 'return_range'" in said
    assert "cell 'x': stepz: there is no such key" in said
    assert "cell 'y': policy.mini_batches: found 0" in said
    assert "cell 'raw'" not in said
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_in_every_cell_is_said_once(tmp_path, capsys):
    assert ablate(tmp_path, "normalizer=raw,batch_mean", "seedz=2") == 1
    said = capsys.readouterr().err
    assert said.count("seedz") == 1
    assert "every cell: seedz: there is no such key" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("normalizer=raw,prime_as_written", "--cell", "same: gate=open"), "cells 'prime_as_written' and 'same' are the same"),
        (("normalizer=raw,batch_mean", "--baseline", "rew"), "there is no cell 'rew'"),
        (("normalizer=raw,batch_mean", "--parallel", "0"), "--parallel is 0"),
        (("normalizer=raw,batch_mean", "seeds=0"), "seeds"),
        (("normalizer=raw,batch_mean", "seeds=[1,1]"), "names a seed twice"),
        (("normalizer=raw,batch_mean", "level=high"), "level"),
        (("normalizer=raw,batch_mean", "collapse.entropyy=1"), "collapse.entropyy"),
        (("normalizer=raw,batch_mean", "stream=proces"), "every cell"),
        (("output_dir=/a,/b",), "different values of output_dir"),
        (("model.path=/nowhere", "normalizer=raw,batch_mean"), "model.path '/nowhere' is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, words, said):
    assert ablate(tmp_path, "seeds=1", *words) == 1
    assert said in capsys.readouterr().err


def test_a_changed_configuration_is_refused_with_its_key(tmp_path, capsys):
    words = ("--cell", "raw: normalizer=raw", "seeds=1")
    folder = tmp_path / "ablation" / "raw" / "seed0"
    # the run of an earlier call, as `write_run_header` leaves it
    from rlprm.cli.ablate import configuration
    from rlprm.run.folder import write_run_header

    before = configuration([*TINY, "normalizer@streams.process.normalizer=raw"], "raw", 0, tmp_path / "ablation", None)
    folder.mkdir(parents=True)
    write_run_header(folder, before.yaml(), {}, None)
    assert ablate(tmp_path, *words, "temperature=0.5", "--dry-run") == 1
    said = capsys.readouterr().err
    assert f"{folder} was started with temperature = 1.0 and now has 0.5" in said
    assert "--ignore KEY" in said
    assert ablate(tmp_path, *words, "temperature=0.5", "--ignore", "temperature", "--dry-run") == 0
    # where it logs, and what it saves, touches no number
    assert ablate(tmp_path, *words, "tracker=wandb", "checkpoint.every=1", "--dry-run") == 0


def test_runs_lie_in_the_ablations_folder_and_group(tmp_path, capsys):
    assert ablate(tmp_path, "normalizer=raw,batch_mean", "name=sizes", "seeds=1", "--cfg") == 0
    said = capsys.readouterr().out
    assert f"output_dir = '{tmp_path}/sizes'" in said
    assert "name = 'raw'" in said
    assert "tracker.group = 'sizes'" in said


def test_cells_may_come_from_a_file(tmp_path, capsys):
    file = tmp_path / "cells.yaml"
    file.write_text(yaml.safe_dump({"oracle": ["method=oracle"], "rloo": ["method=outcome_rloo"]}))
    assert ablate(tmp_path / "out", "--cells", str(file), "--dry-run", "seeds=1") == 0
    assert "oracle  method=oracle (baseline)" in capsys.readouterr().out


def test_help_shows_syntax_examples_and_keys(capsys):
    assert main(["ablate", "--help"]) == 0
    said = capsys.readouterr().out
    for part in ("normalizer=glob(*,exclude=raw)", "--cells FILE", "seeds: 5", "share_of_best", "rlprm ablate recipe="):
        assert part in said
