"""A user's own function or class, named in the configuration as ``package.module:function`` or ``:Class``."""

import importlib
import sys
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_spin.errors import ConfigError

Kind: TypeAlias = Literal["function", "Class"]
"""What a name stands for; messages say ``package.module:function`` or ``package.module:Class``."""


def is_name(text: str) -> bool:
    """Whether ``text`` has the form of ``package.module:function``."""
    module, _, attribute = text.partition(":")
    return bool(module) and bool(attribute)


def load_named(name: str, *, key: str, kind: Kind) -> Any:
    """Imports the function or class that ``name`` refers to; the current directory is searched first.

    Args:
        name: the value of ``key``, in the form of ``package.module:function``.
        key: the config key that holds it, for the messages.
        kind: what it stands for, for the messages; the type of what is found is not checked.

    Raises:
        ConfigError: ``name`` has another form, its module cannot be imported, or has no such attribute.
    """
    if not is_name(name):
        raise ConfigError(
            f"{key}={name!r} is not package.module:{kind}: name a {kind.lower()} of a module that Python can import"
        )
    module, attribute = name.split(":", maxsplit=1)
    # Such a module usually lies beside the user's configuration, not in an installed package.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"{key}={name!r} cannot be imported ({error}): run from its directory, or set PYTHONPATH"
        ) from error
    except AttributeError:
        raise ConfigError(f"{key}={name!r}: module {module} has no {attribute}") from None
    finally:
        sys.path.pop(0)
