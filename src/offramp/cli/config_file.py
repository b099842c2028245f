"""``--config FILE``: a command's flags from a TOML or JSON file.

Keys are the flags' names (``loss-weights`` or ``loss_weights``); a flag on the command line wins
over the file. The values are read as the flags' are.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cyclopts
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict

from offramp.errors import ConfigError
from offramp.files import replacing
from offramp.reading import JSON_BYTES, parse_json, parsing, read_bytes
from offramp.schema import shown

NOT_IN_A_FILE = {"config", "resume"}


def read_config_file(
    app: cyclopts.App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    """Add what the file of ``--config``, if there is one, says to the command's arguments."""
    named = arguments.get("--config", None)
    if named is None or not named.tokens:
        return
    path = Path(named.tokens[0].value)
    settings = _settings(path)
    known = {
        name.removeprefix("--") for argument in arguments for name in argument.names
    } - NOT_IN_A_FILE
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(
            f"{path}: expected keys that are flags of offramp {' '.join(commands)}, "
            f"got {', '.join(unknown)}"
        )
    from_file = Dict(settings, use_commands_as_keys=False, source=str(path))
    from_file(app, commands, arguments)


def write_config_file(path: Path, flags: Mapping[str, object]) -> None:
    """A TOML file that ``--config`` reads, whole or not at all."""
    lines = [
        f"{flag} = {json.dumps(value, ensure_ascii=False)}" for flag, value in flags.items()
    ]  # TOML as well
    with replacing(path) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(path: Path) -> dict[str, Any]:
    """{flag: value}; lists as one word between commas, as a flag has them."""
    data = read_bytes(path, at_most=JSON_BYTES)
    with parsing(path, "TOML, or JSON in a .json file"):
        text = data.decode("utf-8")
        content = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, got {shown(content)}")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        flag = key.replace("_", "-")
        if flag in settings:
            raise ConfigError(f"{path}: expected {flag} once, got it twice")
        if isinstance(value, dict):
            raise ConfigError(f"{path}: expected a value for {key}, got a table")
        if value is not None:
            settings[flag] = ",".join(map(str, value)) if isinstance(value, list) else value
    return settings
