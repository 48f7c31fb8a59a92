from pathlib import Path

import pytest
import yaml

from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure, load_config, save_config
from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path):
    assert load_config(path, []).optim.batch_size > 0


def test_overrides_lie_over_the_file_and_the_result_reads_back(write, tmp_path):
    path = write("optim: {lr: 1e-3, batch_size: 64}\ndata: {image_size: 96}\n")
    config = load_config(
        path, ["optim.lr=2e-4", "data.image_size=[64, 128]", "masking.num_masked=10", "masking.min_block=4"]
    )
    assert (config.optim.lr, config.optim.batch_size, config.grid) == (2e-4, 64, (4, 8))
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml", []) == config


# what is wrong, and what a user must be told
@pytest.mark.parametrize(
    "override, message",
    [
        ("model.widht=3", "unknown key 'model.widht'; did you mean 'model.width'?"),
        ("mdoel.width=3", "did you mean 'model'?"),
        ("zebra=1", "known here: out, seed"),
        ("model.width=770", "width 770 is not a multiple of num_heads 12; try 780"),
        ("data.image_size=225", "height 225 is not a multiple of model.patch_size 16; try 224"),
        ("data.image_size=[0, 16]", "greater than or equal to 1"),
        ("optim.lr=fast", "optim.lr: input should be a valid number"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.accumulate=0", "optim.accumulate: wanted auto, or a number of at least 1; got 0"),
        ("optim.accumulate=fast", "optim.accumulate: wanted auto, or a number of at least 1; got 'fast'"),
        ("optim.accumulate=3", "batch_size 2048 is not a multiple of accumulate 3"),
        ("optim.epochs=0", "nothing to train"),
        ("masking.num_masked=197", "more than the 196 patches"),
        ("masking.min_block=76", "most masks would be empty"),
        ("mask=none", "set predict=all"),
        ("mask=blokwise", "'blockwise', 'random' or 'none'"),
        ("data.crop_scale=[1, 0.5]", "lower bound first"),
        ("data.crop_scale=[0.5, 2]", "(0, 1]"),
        ("optim", "wanted key=value"),
        ("seed.x=1", "seed"),
    ],
)
def test_a_wrong_value_is_explained_in_one_line(write, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write("{}"), [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


# what a file can hold beside a config: each must end in a message, and nothing may run
@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nseed: 2\n", "stands twice"),
        ("model: {width: 768, width: 384}\n", "stands twice"),
        ("seed:\t1\n\tx: 2", "not YAML"),
        ("", "sections and keys"),
        ("- a\n- b\n", "sections and keys"),
        ("seed: !!python/object/apply:os.system ['touch pwned']\n", "not YAML"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "aliases"),
        ("x: " + "y" * (1 << 20), "bytes"),
    ],
)
def test_a_file_that_is_no_config_is_refused(write, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_config(write(text), [])
    assert not (tmp_path / "pwned").exists()


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no config file 'nowhere.yaml'"):
        load_config("nowhere.yaml", [])


def test_defaults_are_the_papers_recipe_for_base():
    """Table 12, and the authors' code where the paper is silent."""
    config = Config()
    assert (config.grid, config.masking.num_masked, config.masking.min_block) == ((14, 14), 75, 16)
    assert (config.optim.lr, config.optim.min_lr, config.optim.betas) == (1.5e-3, 1e-5, (0.9, 0.999))
    assert (config.optim.batch_size, config.optim.epochs, config.optim.warmup_epochs) == (2048, 800, 10)
    assert (config.optim.clip_grad, config.optim.weight_decay, config.model.drop_path) == (3.0, 0.05, 0.1)
    assert yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))["model"]["layer_scale"] == 0.1


def test_keys_of_an_earlier_version_are_translated_and_said(write, capsys):
    path = write("data: {views: 4}\nlog: {val_views: 2}\n")
    config = load_config(path, ["data.index=a.idx"])
    assert config.data.num_crops == 4 and config.log.val_crops == 2
    said = "data.views is called data.num_crops now; log.val_views is called log.val_crops now\n"
    assert capsys.readouterr().err == said
    flat = configure(TokenizerTrainConfig, ["steps=7", "n_hid=8", "precision=bf16", "image_size=64", "jitter=0.1"])
    nested = ["optim.steps=7", "model.n_hid=8", "engine.precision=bf16", "data.image_size=64", "data.jitter=0.1"]
    assert flat == configure(TokenizerTrainConfig, nested)


@pytest.mark.parametrize("model", [Config, TokenizerTrainConfig])
def test_each_old_key_leads_to_one_that_is_there(model):
    for key in model.renamed.values():
        section, name = key.split(".")
        assert name in model.model_fields[section].annotation.model_fields


def test_an_old_key_beside_its_new_one_is_refused():
    with pytest.raises(ConfigError, match="data.views is called data.num_crops now, and both are set"):
        configure(Config, ["data.views=2", "data.num_crops=2"])
