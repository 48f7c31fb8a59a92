"""What is wrong with a configuration, in words for whoever typed it: a line for each thing."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from fastbeit.config.sections import Section

# pydantic's types of errors that values of a `Section` can have; `test_config.py` looks for others
WORDS = {
    "int_type": "wanted a whole number",
    "int_parsing": "wanted a whole number",
    "int_parsing_size": "wanted a whole number",
    "int_from_float": "wanted a whole number",
    "float_type": "wanted a number",
    "float_parsing": "wanted a number",
    "finite_number": "wanted a finite number",
    "bool_type": "wanted true or false",
    "bool_parsing": "wanted true or false",
    "string_type": "wanted text",
    "string_pattern_mismatch": "wanted text of the form {pattern}",
    "dict_type": "wanted keys with values",
    "literal_error": "wanted {expected}",
    "greater_than_equal": "wanted at least {ge}",
    "greater_than": "wanted more than {gt}",
    "less_than_equal": "wanted at most {le}",
    "less_than": "wanted less than {lt}",
    "multiple_of": "wanted a multiple of {multiple_of}",
    "json_invalid": "wanted JSON",
}
SHOWN = 80  # characters of a value


def explain(err: ValidationError, model: type[Section]) -> list[str]:
    """A line for each thing that is wrong."""
    return list(dict.fromkeys(line for problem in err.errors() for line in _lines(problem, model)))


def known_keys(model: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and field of each key, a section's after it."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from known_keys(kind, f"{prefix}{name}.")


def _lines(problem: Any, model: type[Section]) -> Iterator[str]:
    names = [part for part in problem["loc"] if isinstance(part, str) and not part.startswith("function-")]
    key, kind, value = ".".join(names) or "the whole", problem["type"], problem["input"]
    fields = dict(known_keys(model))
    if kind == "extra_forbidden":
        yield f"unknown key '{key}'; {_hint(names, model)}"
    elif kind == "value_error":
        for line in problem["msg"].removeprefix("Value error, ").splitlines():
            yield f"{key}: {line}" if names else line
    elif kind in ("model_type", "model_attributes_type"):
        one = next((name for name in fields if name.startswith(f"{key}.")), "key")
        yield f"{key} is a section, whose keys are set one by one, as {one}=...; got {shown(value)}"
    elif kind == "missing" and isinstance(problem["loc"][-1], str):
        yield f"{key} is not there"
    elif kind in ("tuple_type", "too_long", "missing"):
        example = list(fields[key].default)
        yield f"{key}: wanted {len(example)} numbers, for example {example}; got {shown(value)}"
    elif isinstance(value, dict) and kind != "dict_type":
        yield f"{key} is a value, not a section; got {shown(value)}"
    elif value is None:
        yield f"{key} has no value: write one, or leave the key out"
    else:
        wanted = WORDS[kind].format(**problem.get("ctx", {})) if kind in WORDS else problem["msg"]
        yield f"{key}: {wanted}; got {shown(value)}"


def shown(value: Any) -> str:
    """A value as it was read, on one line that is not too long."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN:
        return "a number of very many digits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _hint(names: list[str], model: type[Section]) -> str:
    """Which key may have been meant."""
    keys = dict(known_keys(model))
    key, leaf = ".".join(names), names[-1]
    if key in keys:
        section, _, name = key.rpartition(".")
        return f"in a file it stands below its section: '{section}:', and indented '{name}: ...'"
    siblings = [name for name in keys if name.rpartition(".")[0] == ".".join(names[:-1])]
    leaves = {name: name.rpartition(".")[2] for name in keys}
    found = (
        [name for name, last in leaves.items() if last == leaf]
        or _near(leaf, {name: leaves[name] for name in siblings})
        or [name for name, last in leaves.items() if set(leaf.split("_")) < set(last.split("_"))]
        or _near(leaf, leaves)
        or _described_by(leaf, keys)
    )
    if found:
        return "did you mean " + " or ".join(f"'{name}'" for name in found) + "?"
    return f"known here: {', '.join([leaves[name] for name in siblings] or model.model_fields)}"


def _near(leaf: str, leaves: dict[str, str]) -> list[str]:
    """Keys whose last part is the one nearest to `leaf`."""
    near = difflib.get_close_matches(leaf, leaves.values(), n=1, cutoff=0.6)
    return [key for key, name in leaves.items() if name in near]


def _described_by(leaf: str, keys: dict[str, Any]) -> list[str]:
    """The key whose description has each word of `leaf`, `learning_rate` for example, and few others."""
    words = set(re.findall(r"[a-z]+", leaf.lower()))
    told = {key: set(re.findall(r"[a-z]+", (field.description or "").lower())) for key, field in keys.items()}
    found = [key for key, text in told.items() if words and words <= text]
    return sorted(found, key=lambda key: len(told[key]))[:1]
