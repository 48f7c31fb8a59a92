"""A configuration from YAML and `key=value`, checked whole before the first file opens; and the other way round."""

import copy
import difflib
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fastbeit.config.explain import explain, known_keys
from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.sections import Section
from fastbeit.config.text import NULLS, Word, parse, read_text, typed
from fastbeit.errors import DONE, ConfigError
from fastbeit.files import write_whole

S = TypeVar("S", bound=Section)
JOBS: dict[type[Section], str] = {Config: "pretrain", FinetuneConfig: "finetune"}
# what else a user may give in place of a config, by its suffix, and where it goes
NO_CONFIGS = {
    "an index; it goes into data.index={}": (".idx",),
    "of images; it goes into data.index={}": (
        *(".tar", ".zip", ".parquet", ".jpg", ".jpeg", ".png", ".txt", ".tsv", ".csv"),
    ),
    "of weights; make a tokenizer with `fastbeit tokenizer import {} -o DIR`, and set tokenizer.path=DIR": (
        *(".safetensors", ".pkl", ".pth", ".pt", ".bin"),
    ),
}


def load_config(path: str | Path, overrides: list[str], model: type[S] = Config) -> S:
    """Read a YAML file of at most 1 MB with the keys of a job, and lay overrides over it; see `configure`.

    Args:
        path: the file, or the name of one that comes with fastbeit, such as beit_base_in1k.
    """
    file = _config_file(str(path), model)
    values = _read_yaml(file)
    _refuse_another_job(values, file, model)
    return configure(model, overrides, values)


def _refuse_another_job(values: dict[str, Any], file: Path, model: type[Section]) -> None:
    """
    Raises:
        ConfigError: it has sections that only another job has.
    """
    if model not in JOBS:
        return
    given = {*values, *(f"{name}.{key}" for name, one in values.items() if isinstance(one, dict) for key in one)}
    for other, verb in JOBS.items():
        alien = sorted(given & (dict(known_keys(other)).keys() - dict(known_keys(model)).keys()))
        # of a section that only the other has, its name says enough
        alien = [key for key in alien if "." not in key or key.partition(".")[0] not in alien]
        if alien:
            raise ConfigError(
                f"'{file}' is a config of `fastbeit {verb}` ({', '.join(alien)}), not of `fastbeit {JOBS[model]}`; "
                f"{_names(shipped_configs(model))}"
            )


def as_saved(model: type[S], values: dict[str, Any]) -> S:
    """What `save_config` wrote, in this version or an earlier one: keys that are new since have their defaults, or
    what was done before there was the key."""
    return configure(model, [], _with_earlier(model, copy.deepcopy(values)))


def saved_pipeline(model: type[S], path: Path) -> str | None:
    """`data.pipeline` alone of what `save_config` wrote, whatever is wrong with the rest; None: it is not there."""
    try:
        data = _with_earlier(model, read_saved(path)).get("data")
    except (ConfigError, OSError, ValueError, RecursionError):
        return None
    return data.get("pipeline") if isinstance(data, dict) else None


def read_saved(path: Path) -> dict[str, Any]:
    """The values of a file of `save_config`.

    Raises:
        ConfigError, OSError, ValueError, RecursionError: it is not there, or damaged.
    """
    return _read_yaml(path)


def _with_earlier(model: type[S], values: dict[str, Any]) -> dict[str, Any]:
    """The same, changed in place: keys that are new since have what was done before there was the key."""
    for key, value in model.earlier.items():
        section, _, leaf = key.partition(".")
        place = values.setdefault(section, {})
        if isinstance(place, dict):
            place.setdefault(leaf, value)
    return values


def configure(model: type[S], overrides: list[str], values: dict[str, Any] | None = None) -> S:
    """Lay `key=value` overrides over nested values and check the whole.

    Args:
        overrides: each `key.subkey=value`: `optim.lr=1e-3`, `data.image_size=[224, 224]`. The value is what was typed:
            no comments, and numbers only where a key wants them.

    Raises:
        ConfigError: one line for each thing wrong, with the nearest known name for an unknown key.
    """
    values = {} if values is None else values
    wrong = _lay_over(values, overrides, model) + _translate(values, model)
    values = typed(values, model)
    assert isinstance(values, dict)
    config, complaints = _checked(values, model)
    if wrong or complaints or config is None:
        raise ConfigError("\n".join(dict.fromkeys([*wrong, *complaints])))
    return config


def _lay_over(values: dict[str, Any], overrides: list[str], model: type[Section]) -> list[str]:
    """Put overrides into nested values; a line for each that cannot be."""
    wrong, keys = [], dict(known_keys(model))
    for item in overrides:
        key, found, text = item.partition("=")
        if not found or not key:
            wrong.append(f"wanted key=value, for example seed=1; got '{item}'")
            continue
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            if isinstance(section.get(parent), Word) and section[parent] in NULLS:
                section[parent] = {}
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                wrong.append(f"{key}: '{parent}' is a value, not a section")
                break
        else:
            try:
                section[leaf] = _typed_value(key, text, keys[key].annotation if key in keys else None)
            except ConfigError as err:
                wrong.append(str(err))
    return wrong


def _typed_value(key: str, text: str, kind: Any) -> Any:
    """What was typed after `key=`; YAML where it has brackets or quotes, and the key takes more than text."""
    is_quoted = len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]
    if is_quoted or (kind is not str and text.lstrip()[:1] in ("[", "{")):
        return parse(text, f"value of {key}")
    return Word(text)


def _checked(values: dict[str, Any], model: type[S]) -> tuple[S | None, list[str]]:
    """The configuration, and what is wrong: unknown keys do not hide what is wrong with the others."""
    try:
        return model.model_validate(values), []
    except ValidationError as err:
        complaints = explain(err, model)
        unknown = [list(map(str, one["loc"])) for one in err.errors() if one["type"] == "extra_forbidden"]
    for *parents, leaf in unknown:
        section = values
        for parent in parents:
            section = section[parent]
        section.pop(leaf)
    if unknown:
        complaints += _checked(values, model)[1]
    return None, complaints


def _translate(values: dict[str, Any], model: type[Section]) -> list[str]:
    """Put values under today's keys, and say what was renamed; a line for each key that cannot be."""
    said, wrong = [], []
    for old, new in model.renamed.items():
        *parents, leaf = old.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section or isinstance(section[leaf], dict):
            continue
        value = section.pop(leaf)
        parent, _, name = new.rpartition(".")
        if parent and isinstance(values.get(parent), Word) and values[parent] in NULLS:
            values[parent] = {}
        place = values.setdefault(parent, {}) if parent else values
        if not isinstance(place, dict):
            wrong.append(f"{old} is called {new} now, and '{parent}' is a value, not a section")
        elif name in place:
            wrong.append(f"{old} is called {new} now, and both are set; leave out {old}")
        else:
            place[name] = value
            said.append(f"{old} is called {new} now")
    if said:
        print("; ".join(said), file=sys.stderr)
    return wrong


def save_config(config: Section, path: Path) -> None:
    """Write the resolved configuration, so that the run can be read and repeated from it alone."""
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def shipped_configs(model: type[Section] = Config) -> dict[str, Path]:
    """A job's configs that come with fastbeit, by name: in the package when it is installed, beside it in a clone."""
    package = Path(__file__).parent.parent
    folders = [folder / "configs" for folder in (package, package.parent)]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0]) / model.folder
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _config_file(given: str, model: type[Section]) -> Path:
    """
    Raises:
        ConfigError: there is no such file, or it is something else; the message says what.
    """
    path, shipped = Path(os.path.expanduser(given)), shipped_configs(model)
    try:
        if path.is_file() and path.suffix in (".yaml", ".yml", ""):
            return path
        if given.removesuffix(".yaml") in shipped:
            return shipped[given.removesuffix(".yaml")]
        if path.is_dir():
            hint = (
                f"; this one is a run's: '{path / 'config.yaml'}'"
                if (path / "config.yaml").is_file()
                else f"; a folder of images goes into data.index={given}"
            )
            raise ConfigError(f"'{given}' is a directory, and a config is a YAML file{hint}")
        for what, suffixes in NO_CONFIGS.items():
            if path.suffix.lower() in suffixes:
                raise ConfigError(f"'{given}' is no config, but {what.format(given)}; {_names(shipped)}")
        if path.is_file():
            return path
    except OSError as err:
        raise ConfigError(f"'{given}' cannot be read: {err.strerror}") from None
    for other, verb in JOBS.items():
        if path.stem in shipped_configs(other):
            raise ConfigError(f"'{given}' is a config of `fastbeit {verb}`, not of this verb; {_names(shipped)}")
    near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"no config file '{given}'{meant}; {_names(shipped)}")


def _names(shipped: dict[str, Path]) -> str:
    return f"those that come with fastbeit go by their names: {', '.join(shipped)}"


def _read_yaml(path: Path) -> dict[str, Any]:
    values = parse(read_text(path), f"'{path}'")
    if not isinstance(values, dict):
        what = "nothing" if values in NULLS else type(values).__name__.lower()
        raise ConfigError(f"'{path}' wants sections and keys as in configs/; got {what}")
    return values


def explain_config(verb: str, names: list[str], overrides: list[str], model: type[Section] = Config) -> int:
    """Every field with its default, or with the value that CONFIG gives it."""
    print(f"fastbeit {verb} CONFIG [key=value ...]\n\nThe keys, for example optim.lr=1e-3 data.image_size=[224,224]:\n")
    default = load_config(names[0], overrides, model) if names else configure(model, overrides)
    return explain_fields(f"fastbeit {verb} CONFIG", default)


def explain_fields(command: str, default: Any) -> int:
    import tyro

    fields = tyro.conf.FlagConversionOff[type(default)]
    tyro.cli(fields, args=["--help"], prog=command, default=default, use_underscores=True)
    return DONE
