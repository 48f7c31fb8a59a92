"""A configuration from YAML and `key=value`, checked whole before the first file opens; and the other way round."""

import copy
import difflib
import sys
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fastbeit.config.pretrain import Config
from fastbeit.config.sections import Section
from fastbeit.errors import DONE, ConfigError
from fastbeit.files import write_whole

MAX_YAML_BYTES = 1 << 20  # a config is a page; what is larger is a mistake or an attack on the parser


S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: list[str]) -> Config:
    """Read a YAML file of at most 1 MB with the keys of `Config`, and lay overrides over it; see `configure`."""
    return configure(Config, overrides, _read_yaml(Path(path)))


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
        overrides: each `key.subkey=value`, the value in YAML: `optim.lr=1e-3`, `data.image_size=[224, 224]`.

    Raises:
        ConfigError: one line for each thing wrong, with the nearest known name for an unknown key.
    """
    values = {} if values is None else values
    for item in overrides:
        key, found, text = item.partition("=")
        if not found:
            raise ConfigError(f"wanted key=value, for example seed=1; got '{item}'")
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: '{parent}' is a value, not a section")
        section[leaf] = _parse_yaml(text, f"value of {key}") if text else ""
    try:
        return model.model_validate(_translate(values, model))
    except ValidationError as err:
        raise ConfigError("\n".join(_explain(problem, model) for problem in err.errors())) from None


def _translate(values: dict[str, Any], model: type[Section]) -> dict[str, Any]:
    """The same values under today's keys; what was renamed is said.

    Raises:
        ConfigError: a key is there under both names.
    """
    said = []
    for old, new in model.renamed.items():
        *parents, leaf = old.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section or isinstance(section[leaf], dict):
            continue
        *parents, name = new.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{old} is called {new} now, and '{parent}' is a value, not a section")
        if name in place:
            raise ConfigError(f"{old} is called {new} now, and both are set; leave out {old}")
        place[name] = section.pop(leaf)
        said.append(f"{old} is called {new} now")
    if said:
        print("; ".join(said), file=sys.stderr)
    return values


def save_config(config: Section, path: Path) -> None:
    """Write the resolved configuration, so that the run can be read and repeated from it alone."""
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _explain(problem: Any, model: type[Section]) -> str:
    """One line for one pydantic error."""
    path = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    if problem["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], model)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{'.'.join([*path[:-1], near[0]])}'?" if near else f"known here: {', '.join(known)}"
        return f"unknown key '{'.'.join(path)}'; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return ": ".join(filter(None, [".".join(path), message]))
    return f"{'.'.join(path)}: {message[0].lower()}{message[1:]}; got {problem['input']!r}"


def _fields_at(path: list[str], model: Any) -> list[str]:
    for name in path:
        field = model.model_fields.get(name)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys (the last would win in silence) and without aliases (they can explode)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(
                f"line {self.peek_event().start_mark.line + 1}: YAML aliases (*name) are not read; write it out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key '{key_node.value}' stands twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except ConfigError as err:
        raise ConfigError(f"{source}: {err}") from None
    except yaml.YAMLError as err:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(err).split())}") from None
    # YAML 1.1 reads 1e-3, without a dot, as text
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no config file '{path}'; the ones that come with fastbeit are in configs/")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"'{path}' has {path.stat().st_size} bytes; a config has at most {MAX_YAML_BYTES}")
    values = _parse_yaml(path.read_text(), f"'{path}'")
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' wants sections and keys as in configs/; got {type(values).__name__}")
    return values


def explain_config(args: list[str]) -> int:
    """Every field with its default, or with the value that CONFIG gives it."""
    print(
        "fastbeit pretrain CONFIG [key=value ...]\n\nThe keys, for example optim.lr=1e-3 data.image_size=[224,224]:\n"
    )
    default = load_config(args[0], overrides_of(args[1:])) if args else configure(Config, [])
    return explain_fields("fastbeit pretrain CONFIG", default)


def explain_fields(command: str, default: Any) -> int:
    import tyro

    fields = tyro.conf.FlagConversionOff[type(default)]
    tyro.cli(fields, args=["--help"], prog=command, default=default, use_underscores=True)
    return DONE


def overrides_of(args: list[str]) -> list[str]:
    """`key=value` as it is; `--key=value` and `--key value` as the same."""
    found, rest = [], list(args)
    while rest:
        arg = rest.pop(0)
        key = arg.removeprefix("--")
        if arg.startswith("--") and "=" not in arg and rest:
            key = f"{key}={rest.pop(0)}"
        found.append(key)
    return found
