"""A run's directory knows whose it is, also when an earlier version made it."""

import pytest
import yaml

from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure, save_config
from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.errors import RunError
from fastbeit.train.rundir import claim


def rewrite(path, change) -> None:
    """Change a saved configuration as a nested dict."""
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


def test_a_run_of_an_earlier_version_is_taken_up_and_its_old_keys_are_said(tmp_path, capsys):
    config = configure(Config, ["data.num_crops=3"])
    with claim(tmp_path / "run", config):
        pass

    def as_before(values) -> None:
        values["data"]["views"] = values["data"].pop("num_crops")
        del values["kernels"]["loss"]  # a key that an earlier version did not have

    rewrite(tmp_path / "run/config.yaml", as_before)
    with claim(tmp_path / "run", config):
        pass
    assert "data.views is called data.num_crops now" in capsys.readouterr().err
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
        with claim(tmp_path / "run", config):
            pass


@pytest.mark.parametrize("content", ["tokenizer", "", "- a\n- list\n"], ids=["another job", "empty", "a list"])
def test_a_config_that_does_not_fit_is_refused_by_name(tmp_path, content):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/config.yaml"
    path.write_text(content)
    if content == "tokenizer":
        save_config(configure(TokenizerTrainConfig, []), path)
    with pytest.raises(RunError, match="config.yaml does not fit this one") as caught:
        claim(tmp_path / "run", configure(Config, [])).__enter__()
    assert caught.value.exit_code == 2
