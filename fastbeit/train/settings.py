"""Which settings a run hangs on, which may change between its parts, and what has changed."""

from typing import Any

from fastbeit.config.sections import Section

# what may differ between the parts of one run: who runs it, what it says and how long it goes on, not what it learns
# from; docs/distributed.md gives the reasons
FREE_SECTIONS = ("out", "init", "engine", "kernels", "log", "probe", "profile")
FREE_FIELDS = {
    "data": ("index", "val_index", "tokens", "num_workers"),
    "optim": ("accumulate", "steps", "epochs"),
    "tokenizer": ("path",),
}
Changes = dict[str, tuple[Any, Any]]  # dotted key: value before, and now


def changes(old: Section, new: Section) -> Changes:
    return compared(flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json")))


def fixed(found: Changes) -> Changes:
    """Those of what decides what a run computes."""
    return {key: values for key, values in found.items() if not _is_free(key)}


def compared(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    """Of keys that are in both."""
    return {key: (old[key], value) for key, value in new.items() if key in old and old[key] != value}


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key; sections hold no sections."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def in_words(found: Changes) -> str:
    return "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in found.items())


def _is_free(key: str) -> bool:
    section, _, field = key.partition(".")
    return section in FREE_SECTIONS or field in FREE_FIELDS.get(section, ())
