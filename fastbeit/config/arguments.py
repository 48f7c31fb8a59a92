"""The arguments of a verb that takes a configuration: CONFIG, settings and the verb's own options, in any order."""

import argparse
import re

from fastbeit.errors import ConfigError

SETTING = re.compile(r"[A-Za-z_][\w.]*=")


def parse(parser: argparse.ArgumentParser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the parser makes of its own options and of names, and the settings as `key=value`.

    A setting is `key=value`, `--key=value` or `--key value`, where the parser has no option of that name.
    """
    values = {name: action.nargs for action in parser._actions for name in action.option_strings}
    settings, own, rest = [], [], list(args)
    while rest:
        arg = rest.pop(0)
        name = arg.partition("=")[0]
        if name in values:
            own.append(arg)
            if arg == name and values[name] is None and rest:
                own.append(rest.pop(0))
        elif arg.startswith("--") and arg != "--":
            is_alone = "=" not in arg and rest and not rest[0].startswith("--")
            settings.append(f"{arg[2:]}={rest.pop(0)}" if is_alone else arg[2:])
        elif SETTING.match(arg):
            settings.append(arg)
        else:
            own.append(arg)
    return parser.parse_args(own), settings


def one_config(names: list[str], shipped: list[str], verb: str = "pretrain") -> str:
    """
    Args:
        names: arguments that are no setting and no option.
        shipped: configs that come with fastbeit.
        verb: whose configs they are.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if not names:
        raise ConfigError(
            f"CONFIG is wanted: a YAML file, or one that comes with fastbeit ({', '.join(shipped)}); "
            f"`fastbeit {verb} --help` lists its keys"
        )
    if len(names) > 1:
        first, *others = names
        raise ConfigError(
            f"one CONFIG is wanted, and then settings as key=value: '{first}' is taken for CONFIG, and no setting is "
            + ", ".join(f"'{name}'" for name in others)
        )
    return names[0]
