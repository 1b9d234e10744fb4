"""How does a run file, with overrides, become a `RunConfig`?"""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from meshweave.config.elastic import alternatives, fitting
from meshweave.config.messages import describe, unknown_module
from meshweave.config.run import RunConfig
from meshweave.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = (), ranks: int | None = None) -> RunConfig:
    """Reads a run file and applies overrides of the form `modules.vision.dp=2`.

    Paths in the run file are relative to the current folder. Of several `layouts` it takes the one that fits so many `ranks`, and
    checks all of them; where their number is not known, the first.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override is malformed, or any key or value is wrong;
            one message lists them all.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such run file (looked in {Path.cwd()})") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a run file is a mapping with keys such as model, modules and train; got {type(tree).__name__}"
        )
    for override in overrides:
        _apply_override(tree, override)
    found = []
    for number, alternative in enumerate(alternatives(tree, str(path))):
        found.append(parse_config(alternative, where=f"{path}, layouts[{number - 1}]" if number else str(path)))
    return fitting(found, ranks)


def parse_config(tree: dict[str, Any], where: str = "run configuration") -> RunConfig:
    """Checks a mapping as read from a run file.

    Raises:
        ConfigError: any key or value is wrong; one message lists them all.
    """
    modules = tree.get("modules")
    named = modules if isinstance(modules, dict) else {}
    unknown = {str(name): message for name in named if (message := unknown_module(str(name))) is not None}
    lines = [f"modules.{name}: {message}" for name, message in unknown.items()]
    try:
        run = RunConfig.model_validate(tree)
    except ValidationError as error:
        details: list[dict[str, Any]] = [dict(detail) for detail in error.errors()]
        # Of a module that is none, its keys are no further errors.
        lines += [describe(detail) for detail in details if not _within(detail["loc"], unknown)]
    if lines:
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines))
    return run


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as modules.vision.dp=2")
    *parents, last = key.strip().split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is {child!r}, which has no keys inside")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value: {error}") from error


def _within(location: Sequence[Any], modules: Container[str]) -> bool:
    return len(location) > 1 and location[0] == "modules" and str(location[1]) in modules
