"""Text to nested values: the part of YAML that a configuration needs.

Mappings, lists, and words that mean what was typed: as in YAML 1.2 there are no octal numbers, no base 60 and no dates.
Whether `0100` is a number or a name the type of its key decides, in `typed`.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from fastbeit.config.sections import Section
from fastbeit.errors import ConfigError

MAX_BYTES = 1 << 20  # a config is a page; what is larger is a mistake or an attack on the parser
MAX_DEPTH = 8
MAX_DIGITS = 400  # more than any float has; Python refuses to read integers of thousands
STRING = "tag:yaml.org,2002:str"
NULLS = ("", "~", "null", "Null", "NULL")
BOOLS = {
    word: value for name, value in (("true", True), ("false", False)) for word in (name, name.title(), name.upper())
}
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Word(str):
    """Text without quotes."""


class _Composer(yaml.SafeLoader):
    """No word has a type yet; no aliases, which can explode; no depth that would exhaust the stack."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"line {line}: YAML aliases (*name) are not read; write it out")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"line {line}: nested more than {MAX_DEPTH} deep; a config has sections and keys")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_text(path: Path) -> str:
    """
    Raises:
        ConfigError: too large, not UTF-8, or it cannot be read.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise ConfigError(f"'{path}' has {num_bytes} bytes; a config has at most {MAX_BYTES}")
        raw = path.read_bytes()
    except OSError as err:
        raise ConfigError(f"'{path}' cannot be read: {err.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = raw.count(b"\n", 0, err.start) + 1
        what = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte 0x{raw[err.start]:02x})"
        raise ConfigError(f"'{path}' line {line}: the text is {what}; save it as UTF-8") from None


def parse(text: str, source: str) -> Any:
    """Dicts, lists, `str` where there were quotes, and `Word`.

    Raises:
        ConfigError: not YAML, or more of it than a configuration needs; begins with `source`.
    """
    try:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return Word() if node is None else _value(node)
    except ConfigError as err:
        raise ConfigError(f"{source}: {err}") from None
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{source}: {place}not YAML: {err.problem or err.context}") from None
    except yaml.YAMLError as err:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(err).split())}") from None
    except (ValueError, OverflowError) as err:
        # PyYAML lets through what Python says of an escape beyond Unicode
        raise ConfigError(f"{source}: not YAML: {err}") from None


def _value(node: yaml.Node) -> Any:
    line = f"line {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag == STRING:
        return node.value if node.style else Word(node.value)
    raise ConfigError(f"{line}: not YAML that is read here: a tag, {node.tag}; leave it out")


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{line}: a key is a word; got a {key_node.id}")
        if key_node.value in found:
            raise ConfigError(f"{line}: key '{key_node.value}' stands twice")
        found[key_node.value] = _value(value_node)
    return found


def typed(value: Any, kind: Any) -> Any:
    """The same values with each `Word` as what it means for a key of that kind: a section, str, or anything else."""
    is_section = isinstance(kind, type) and issubclass(kind, Section)
    if is_section and isinstance(value, Word) and value in NULLS:
        return {}  # all its keys are commented out
    if isinstance(value, dict):
        fields = kind.model_fields if is_section else {}
        return {key: typed(one, fields[key].annotation if key in fields else None) for key, one in value.items()}
    if isinstance(value, list):
        return [typed(one, None) for one in value]
    if not isinstance(value, Word):
        return value
    if kind is str:
        return "" if value in NULLS and value != "~" else str(value)
    return _scalar(value)


def _scalar(word: Word) -> Any:
    if word in NULLS:
        return None
    if word in BOOLS:
        return BOOLS[word]
    if len(word) <= MAX_DIGITS:
        if INTEGER.fullmatch(word):
            return int(word.replace("_", ""))
        if FLOAT.fullmatch(word):
            return float(word.replace("_", ""))
        if SPECIAL.fullmatch(word):
            return float(word.replace(".", ""))
    return str(word)
