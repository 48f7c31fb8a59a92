"""A run's directory knows whose it is, also when an earlier version made it."""

import contextlib

import pytest
import yaml

from fastbeit.config.pretrain import Config
from fastbeit.config.read import as_saved, configure, read_saved, save_config
from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.errors import RunError
from fastbeit.train.rundir import claim, hold, keep_config

CONFIG = configure(Config, [])
# what a kill or a full disk between truncate and write leaves, what a power cut does, and what nobody writes
UNREADABLE = [b"", b"\0" * 100, b"\xff\xfe\x00s", b"- a\n- list\n", b"[" * 500, b"seed: 'a\n"]


def begin(out, config) -> None:
    """What a training does of its directory before its first step."""
    with claim(out, config):
        keep_config(out, config)


def rewrite(path, change) -> None:
    """Change a saved configuration as a nested dict."""
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


def test_a_run_of_an_earlier_version_is_taken_up_and_its_old_keys_are_said(tmp_path, capsys):
    config = configure(Config, ["data.num_crops=3"])
    begin(tmp_path / "run", config)

    def as_before(values) -> None:
        values["data"]["views"] = values["data"].pop("num_crops")
        del values["kernels"]["loss"]  # a key that an earlier version did not have

    rewrite(tmp_path / "run/config.yaml", as_before)
    with claim(tmp_path / "run", config):
        pass
    assert "data.views is called data.num_crops now" in capsys.readouterr().err
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)
    other = configure(Config, ["data.num_crops=4", "seed=1"])
    with pytest.raises(RunError, match=r"another run: seed was 0, now 1; data\.num_crops was 3, now 4") as caught:
        claim(tmp_path / "run", other).__enter__()
    assert caught.value.exit_code == 2


def test_what_a_run_does_not_hang_on_may_change(tmp_path):
    changes = [
        "data.num_workers=7",
        "optim.accumulate=4",
        "engine.checkpoint_blocks=true",
        "engine.name=single",
        "log.every=3",
        "out=elsewhere",
    ]
    for config in configure(Config, []), configure(Config, changes):
        begin(tmp_path / "run", config)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["optim"]["accumulate"] == 4


def test_another_jobs_config_is_refused_by_name(tmp_path):
    (tmp_path / "run").mkdir()
    save_config(configure(TokenizerTrainConfig, []), tmp_path / "run/config.yaml")
    with pytest.raises(RunError, match="config.yaml does not fit this one") as caught:
        claim(tmp_path / "run", CONFIG).__enter__()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", UNREADABLE, ids=len)
def test_a_config_that_cannot_be_read_does_not_stop_a_resume(tmp_path, content, capsys):
    path = tmp_path / "run/config.yaml"
    begin(path.parent, CONFIG)
    path.write_bytes(content)
    begin(path.parent, CONFIG)
    assert "config.yaml' cannot be read (" in capsys.readouterr().err
    assert as_saved(Config, read_saved(path)) == CONFIG


@pytest.mark.parametrize("content", [None, *UNREADABLE])
def test_a_folder_of_something_else_is_no_run(tmp_path, content):
    path = tmp_path / "config.yaml"
    (tmp_path / "letter.txt").write_text("dear")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match="holds no fastbeit run, but letter.txt") as caught:
        claim(tmp_path, CONFIG).__enter__()
    assert caught.value.exit_code == 2
    assert {one.name for one in tmp_path.iterdir()} == {"letter.txt", *(["config.yaml"] if path.exists() else [])}


def test_settings_may_be_corrected_until_there_is_a_checkpoint(tmp_path):
    begin(tmp_path / "run", CONFIG)
    corrected = configure(Config, ["optim.batch_size=8"])
    begin(tmp_path / "run", corrected)
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)
    with pytest.raises(RunError, match=r"another run: optim\.batch_size was 8, now 2048"):
        claim(tmp_path / "run", CONFIG).__enter__()
    # a missing file is no more than an unreadable one
    (tmp_path / "run/config.yaml").unlink()
    begin(tmp_path / "run", corrected)


@pytest.mark.parametrize("there", [(), ("run",), ("run", "run/log.jsonl")], ids=len)
def test_a_refused_start_leaves_no_trace(tmp_path, there):
    """Neither does one whose directory is held by another."""
    for name in there:
        (tmp_path / name).touch() if "." in name else (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError), claim(tmp_path / "run", CONFIG):
        assert (tmp_path / "run/.lock").exists()
        with pytest.raises(RunError, match="in use by another run"), hold(tmp_path / "run", "out"):
            pass
        assert (tmp_path / "run/.lock").exists()
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_is_free_again_after_an_error_and_after_success(tmp_path):
    for error in (KeyError, None, None):
        with contextlib.suppress(KeyError), hold(tmp_path / "run", "out"):
            if error:
                raise error
