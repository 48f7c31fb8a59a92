import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from benchmarks.memory import main
from fastbeit.config.explain import WORDS, explain, known_keys
from fastbeit.config.finetune import AugmentConfig, FinetuneConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.read import as_saved, configure, load_config, read_saved, save_config
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


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("finetune/*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_fine_tuning_is_valid_and_says_what_to_expect(path, capsys):
    assert load_config(path.stem, [], FinetuneConfig) == load_config(path, [], FinetuneConfig)
    text = path.read_text()
    assert "# Expected: " in text and f"-m fastbeit finetune {path.stem}\n#          out=runs/{path.stem} " in text
    (command,) = (line for line in text.splitlines() if "benchmarks.memory" in line)
    assert main(command.partition("benchmarks.memory ")[2].replace("--ranks 1", "--ranks 8").split()) == 0
    assert capsys.readouterr().out in text


SIZES = {"beit_tiny": (192, 3), "beit_small": (384, 6), "beit_few_images": (192, 3), "beit_base_in1k": (768, 12)}


@pytest.mark.parametrize("name", [*SIZES, "beit_tiny_p8", "beit_small_p8"])
def test_a_config_of_a_size_is_what_its_name_says(name):
    """Its header's command starts it, and its masks hide 40 % in blocks of the paper's share."""
    path = CONFIGS / f"{name}.yaml"
    config, is_p8 = load_config(path, []), name.endswith("_p8")
    width, num_heads = SIZES[name.removesuffix("_p8")]
    model = config.model
    assert (model.width, model.num_heads, model.mlp_width, model.depth) == (width, num_heads, 4 * width, 12)
    assert config.grid == ((28, 28) if is_p8 else (14, 14))
    assert config.num_masked / config.num_patches == pytest.approx(0.4, abs=0.02)
    assert config.masking.min_block_of(config.num_patches) / config.num_masked == pytest.approx(16 / 75, abs=0.01)
    comments = " ".join(line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    command = re.search(rf"pretrain (configs/{name}\.yaml (?:[a-z._]+=\S+ ?)+)", comments)
    assert command and load_config(path, command[1].rstrip("; ").split()[1:]).out
    for card in ("24 GB", "40 GB", "80 GB", "Expected", "Hardware"):
        assert card in comments


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
        ("zebra=1", "known here: out, init, seed"),
        ("model.width=770", "width 770 is not a multiple of num_heads 12; try 780"),
        ("data.image_size=225", "height and width 225 is not a multiple of model.patch_size 16; try 224"),
        ("data.image_size=[0, 16]", "data.image_size: wanted at least 1; got 0"),
        ("optim.lr=fast", "optim.lr: wanted a number; got 'fast'"),
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
        ("seed.x=1", "seed is a value, not a section; got {'x': 1}"),
        (
            "log.wandb=team/beit",
            "log: wandb wants a project's name, without /; got 'team/beit'",
        ),
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("optim.learning_rate=1", "did you mean 'optim.lr'?"),
        ("learning_rate=1", "did you mean 'optim.lr'?"),
        ("model.image_size=32", "did you mean 'data.image_size'?"),
        ("batch=8", "did you mean 'optim.batch_size'?"),
        ("optim=3", "optim is a section, whose keys are set one by one, as optim.name=...; got 3"),
        ("data.image_size=[1, 2, 3]", "data.image_size: wanted 2 numbers, for example [224, 224]; got [1, 2, 3]"),
        ("data.mean=[0.5]", "data.mean: wanted 3 numbers, for example [0.5, 0.5, 0.5]; got [0.5]"),
        ("data.mean=0.5", "data.mean: wanted 3 numbers, for example [0.5, 0.5, 0.5]; got 0.5"),
        ("optim.lr=", "optim.lr has no value: write one, or leave the key out"),
        ("optim.steps=1.5", "optim.steps: wanted a whole number; got 1.5"),
        ("optim.steps=1:30", "optim.steps: wanted a whole number; got '1:30'"),
        ("optim.steps=" + "9" * 50, "optim.steps: wanted at most 1000000000; got 9999"),
        ("optim.steps=" + "9" * 9999, "optim.steps: wanted a whole number"),
        ("optim.lr=1e999", "optim.lr: wanted a finite number; got inf"),
        ("model.absolute_position=maybe", "model.absolute_position: wanted true or false; got 'maybe'"),
        (
            "optim.name=lion",
            "optim.name: wanted 'adamw', 'apex_adam', 'apex_lamb', 'ds_cpu_adam' or 'muon'; got 'lion'",
        ),
        ("optim.name=ds_cpu_adam", "set engine.device=cpu, or engine.name=deepspeed engine.offload=optimizer"),
        ("mask=random #b", "got 'random #b'"),
        ("masking.ratio=0", "masking.ratio: wanted more than 0"),
        ("masking.num_masked=", "masking: neither num_masked nor ratio is set"),
        ("data.image_size=[[[[[[[[[[1]]]]]]]]]]", "nested more than 8 deep"),
    ],
)
def test_a_wrong_value_is_explained_in_one_line(write, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write("{}"), [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("model", [Config, FinetuneConfig])
@pytest.mark.parametrize(
    "name, message",
    [
        ("muon", "optim.name=muon wants whole matrices, and DeepSpeed ZeRO cuts them into pieces; set engine.name"),
        ("apex_lamb", "optim.name=apex_lamb wants whole matrices"),
        (
            "apex_adam",
            "optim.name=apex_adam has not been tried with DeepSpeed; set engine.name=ddp, or optim.name=adamw",
        ),
        ("ds_cpu_adam", "optim.name=ds_cpu_adam updates weights that lie in the host's memory"),
    ],
)
def test_optimizers_that_do_not_fit_an_engine_are_refused(model, name, message):
    chosen = f"optim.name={name}"
    with pytest.raises(ConfigError, match=message):
        configure(model, [chosen, "engine.name=deepspeed"])
    offloaded = [chosen, "engine.name=deepspeed", "engine.offload=optimizer"]
    if name == "ds_cpu_adam":
        assert configure(model, offloaded) and configure(model, [chosen, "engine.device=cpu"])
    else:
        assert configure(model, [chosen])
        with pytest.raises(ConfigError, match=message):
            configure(model, offloaded)


def test_a_tokenizer_takes_any_optimizer_but_muon():
    optim = configure(TokenizerTrainConfig, ["optim.name=apex_adam"]).optim.whole
    assert (optim.name, optim.weight_decay) == ("apex_adam", 1e-4)
    with pytest.raises(ConfigError, match="optim.name=muon is for the matrices of a transformer's blocks, and a token"):
        configure(TokenizerTrainConfig, ["optim.name=muon"])


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
        ("# all of it is commented out\n", "sections and keys"),
        ("? [a, b]\n: 1\n", "line 1: a key is a word; got a sequence"),
        ("seed: 1\n? {a: b}\n: 1\n", "line 2: a key is a word; got a mapping"),
        ("data: " + "[" * 500, "line 1: nested more than 8 deep"),
        ("data:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 999)), "nested more than 8 deep"),
        ("out: !!timestamp abc\n", "line 1: not YAML that is read here: a tag"),
        ("out: !!int abc\n", "a tag"),
        ('out: "\\UFFFFFFFF"\n', "not YAML"),
        ('out: "a\\0b"\n', "no path has a NUL in it"),
        ('out: "\\ud800"\n', "wanted a path in UTF-8"),
        ("optim.lr: 1\n", "in a file it stands below its section: 'optim:', and indented 'lr: ...'"),
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


@pytest.mark.parametrize(
    "raw, message",
    [
        ("out: caf\xe9".encode("latin-1"), "line 1: the text is not UTF-8 (byte 0xe9); save it as UTF-8"),
        ("seed: 1\nout: r".encode("utf-16"), "line 1: the text is UTF-16; save it as UTF-8"),
        (b"seed: 1\0", "not YAML"),
    ],
    ids=["latin-1", "utf-16", "nul"],
)
def test_another_encoding_is_named(tmp_path, raw, message):
    (tmp_path / "config.yaml").write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml", [])
    assert message in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    (tmp_path / "config.yaml").write_bytes("seed: 3".encode("utf-8-sig"))
    assert load_config(tmp_path / "config.yaml", []).seed == 3


# what is typed, after `out=` and in a file, and what it is
@pytest.mark.parametrize("text", ["0100", "1:30", "1e3", "2024-01-01", "yes", "true", "0x10", "[a", "a: b", "*a"])
def test_a_path_is_what_was_typed(write, text):
    assert configure(Config, [f"out={text}"]).out == text
    if text not in ("[a", "a: b", "*a"):  # which YAML reads otherwise, or not at all
        assert load_config(write(f"out: {text}\n"), []).out == text


@pytest.mark.parametrize("text, value", [("a #b", "a #b"), ("'a #b'", "a #b"), ("", ""), ("null", "")])
def test_a_setting_has_no_comments(text, value):
    assert configure(Config, [f"out={text}"]).out == value


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "0100", 100),
        ("seed", "1_000", 1000),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "2E-4", 2e-4),
        ("optim.lr", ".5", 0.5),
        ("optim.lr", "1", 1.0),
        ("model.absolute_position", "yes", True),
        ("model.absolute_position", "off", False),
        ("model.absolute_position", "True", True),
        ("engine.compile", "on", "on"),
        ("engine.compile", "false", "off"),
        ("mask", "none", "none"),
        ("kernels.loss", "null", None),
        ("data.image_size", "[64, 96]", (64, 96)),
    ],
)
def test_a_value_is_what_its_key_wants(write, key, text, value):
    section, _, leaf = key.rpartition(".")
    in_file = f"{section}:\n  {leaf}: {text}\n" if section else f"{leaf}: {text}\n"
    more = ["predict=all", "masking.ratio=0.4"]
    for config in (configure(Config, [f"{key}={text}", *more]), load_config(write(in_file), more)):
        values = config.model_dump()
        found = values[section][leaf] if section else values[leaf]
        assert (found, type(found)) == (value, type(value))


def test_a_section_that_is_commented_out_has_its_defaults(write):
    path = write("optim:\n  # lr: 1.0\nmodel: null\nseed: 3\n")
    assert load_config(path, []) == Config(seed=3)
    assert load_config(path, ["optim.steps=5"]).optim.steps == 5


NO_PATHS = {"log.wandb"}  # texts that are names


def test_the_home_directory_is_expanded_in_all_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["data.index", "data.tokens", "data.val_index", "engine.deepspeed_config", "init", "out", "probe.index"]
    keys += ["probe.val_index", "tokenizer.path"]
    texts = [key for key, field in known_keys(Config) if field.annotation is str and key not in NO_PATHS]
    assert sorted(texts) == keys, "a key of text that is no path, or a path that is not expanded"
    config = configure(Config, ["engine.name=deepspeed", *(f"{key}=~/x" for key in keys)])
    data = config.data
    found = [
        config.engine.deepspeed_config,
        data.index,
        data.tokens,
        data.val_index,
        config.init,
        config.out,
        config.tokenizer.path,
    ]
    assert {*found, config.probe.index, config.probe.val_index} == {"/home/me/x"}


def test_a_home_of_nobody_is_no_folder():
    with pytest.raises(
        ConfigError, match=r"out: .*there is no user 'nobody-of-this-name'; .* \./~nobody-of-this-name/x"
    ):
        configure(Config, ["out=~nobody-of-this-name/x"])


def test_all_that_is_wrong_is_said_at_once(write):
    path = write("optim: {lrr: 1, batch_size: none}\nmodel: {width: 770}\ndata: {crop_scale: [1, 0.5], flip: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["sed=1", "mask", "masking.num_masked=0"])
    lines = str(caught.value).splitlines()
    begins = "wanted key=value", "unknown key 'optim.lrr'", "optim.batch_size: wanted", "model: width 770", "data.flip"
    assert all(any(line.startswith(begin) for line in lines) for begin in begins), lines
    assert any("'sed'" in line and "'seed'" in line for line in lines) and len(lines) == 7
    with pytest.raises(ConfigError) as caught:
        configure(Config, ["masking.num_masked=200", "mask=blockwise", "objective=pixels", "data.tokens=t", "lrr=1"])
    assert len(str(caught.value).splitlines()) == 3


def test_a_ratio_stands_for_the_count():
    config = configure(Config, ["masking.ratio=0.4"])
    assert (config.num_masked, config.masking.min_block_of(196)) == (78, 17)
    small = configure(Config, ["masking.ratio=0.4", "data.image_size=64"])
    assert (small.num_masked, small.masking.min_block_of(16), small.num_slots) == (6, 1, 6)
    assert configure(Config, ["masking.ratio=0.4", "masking.min_block=5"]).masking.min_block_of(196) == 5
    assert configure(Config, ["masking.num_masked=null", "masking.ratio=0.4"]) == config


def test_a_ratio_beside_the_count_is_refused(write):
    with pytest.raises(ConfigError, match="masking: ratio 0.4 and num_masked 75 are both set"):
        load_config(write("masking: {num_masked: 75}\n"), ["masking.ratio=0.4"])


def test_a_ratio_reads_back(tmp_path):
    config = configure(Config, ["masking.ratio=0.25"])
    save_config(config, tmp_path / "resolved.yaml")
    assert as_saved(Config, read_saved(tmp_path / "resolved.yaml")) == config


# each kind of wrong value for each key; of what a key takes, some are right
WRONG = "x", 1.5, -1, 10**12, 10**400, float("inf"), True, [], [1], ["a", "b"], [1, 2, 3, 4], {"a": 1}, None, [[1]]


@pytest.mark.parametrize("model", [Config, TokenizerTrainConfig, AugmentConfig])
def test_every_error_of_every_key_is_said_in_our_words(model):
    kinds = set()
    for key, _ in known_keys(model):
        for value in WRONG:
            values: Any = value
            for name in reversed(key.split(".")):
                values = {name: values}
            try:
                model.model_validate(values)
            except ValidationError as err:
                kinds |= {problem["type"] for problem in err.errors()}
                for line in explain(err, model):
                    assert not re.search("(?i)input should|tuple|validat|pydantic|instance", line), f"{key}: {line}"
                    assert len(line) < 400
    ours = {"extra_forbidden", "value_error", "model_type", "tuple_type", "too_long", "missing"}
    assert kinds <= ours | WORDS.keys() and len(kinds) > 4


PIECES = (
    *(
        "optim:",
        "model: {",
        "}",
        "[",
        "]",
        "  ",
        "\n",
        "- ",
        ": ",
        "? ",
        "&a ",
        "*a",
        "!!int ",
        "!x ",
        "%YAML 9\n",
        "---\n",
    ),
    *(
        "lr: 1e-3",
        "seed",
        "mask",
        "out: ~",
        "<<",
        "'",
        '"',
        "\\U",
        "\\x0",
        "0100",
        "1:30",
        "9" * 500,
        ".nan",
        "null",
        "|",
    ),
    *(
        "2024-13-45",
        "\t",
        "\0",
        "\x85",
        "\ufeff",
        "\ud7ff",
        "\xe9",
        "#",
        ",",
        "data.image_size",
        "=",
        "@",
        "data: [[[[[[[[[",
    ),
)
KEYS = "out", "seed", "optim.lr", "data.image_size", "masking.ratio", "optim", "kernels.loss", "zebra", "data.views"


def test_a_wrong_config_is_never_a_traceback(tmp_path):
    """Seeded: texts put together of pieces, bytes changed at random, and the same after `key=`."""
    draw, path, refused = random.Random(0), tmp_path / "config.yaml", 0
    shipped = [file.read_bytes() for file in sorted(CONFIGS.glob("*.yaml"))]
    for number in range(400):
        raw = "".join(draw.choices(PIECES, k=draw.randrange(1, 12))).encode()
        if number % 6 == 0:
            changed = bytearray(draw.choice(shipped))
            for _ in range(draw.randrange(1, 4)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            raw = bytes(changed)
        path.write_bytes(raw)
        setting = f"{draw.choice(KEYS)}={raw.decode(errors='surrogateescape')}"
        for model in (Config, TokenizerTrainConfig):
            for read in (lambda model=model: as_saved(model, read_saved(path)), partial(configure, model, [setting])):
                try:
                    read()
                except ConfigError as err:
                    assert str(err).strip() and err.exit_code == 2
                    refused += 1
    assert refused > 700
