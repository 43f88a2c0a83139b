"""YAML configuration read once into a validated model; a refusal names the file, the key and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sspformer.contract.errors import Code, Refused

_MAX_BYTES = 1 << 20
_Model = TypeVar("_Model", bound=BaseModel)


def load_settings(path: Path, model: type[_Model]) -> _Model:
    """Read a YAML file into a pydantic model.

    Raises:
        Refused: E-CONFIG naming file, line and key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise Refused(
            Code.CONFIG, f"{path} cannot be read ({error.strerror}).", "Run `init` first, or check the folder's name."
        ) from None
    except UnicodeDecodeError:
        raise _refused(path, 1, "the file", "is not UTF-8 text") from None
    if len(data) > _MAX_BYTES:
        raise _refused(path, 1, "the file", f"is larger than {_MAX_BYTES} bytes")
    root = _compose(path, text)
    try:
        return model.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        first = error.errors()[0]
        line, key = _locate(root, first["loc"])
        raise _refused(path, line, f"key '{key}'" if key else "the file", _reason(first)) from None
    except (yaml.YAMLError, ValueError, TypeError):  # well formed, but no plain value: a Python object, a bad date
        raise _refused(path, 1, "the file", "holds a value that is not plain YAML") from None


def _compose(path: Path, text: str) -> yaml.Node | None:
    try:
        # Anchors have no place in settings: they make a few bytes stand for millions, or for themselves.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _refused(
                    path, getattr(event.start_mark, "line", 0) + 1, f"'*{event.anchor}'", "is an alias; write it out"
                )
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise _refused(path, 1, "the text", "is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refused(path, line, "the text", f"is not YAML ({error.problem})") from None
    except yaml.YAMLError:
        raise _refused(path, 1, "the text", "is not YAML") from None
    if not isinstance(root, yaml.MappingNode):
        raise _refused(path, 1, "the file", "holds no keys")
    _refuse_repeats(path, root)
    return root


def _refuse_repeats(path: Path, node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(path, key.start_mark.line + 1, "a key", "is not a plain word")
            if key.value in seen:
                raise _refused(path, key.start_mark.line + 1, f"key '{key.value}'", "is given twice")
            seen.add(str(key.value))
            _refuse_repeats(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeats(path, value)


def _locate(root: yaml.Node | None, loc: tuple[int | str, ...]) -> tuple[int, str]:
    """Follow an error's location as far as the text goes: the line of the deepest key that is there."""
    node, line = root, 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line, ".".join(str(part) for part in loc)


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not known"
    if error["type"] == "missing":
        return "is missing"
    message = str(error["msg"])
    return "is refused: " + message.removeprefix("Value error, ")


def _refused(path: Path, line: int, key: str, reason: str) -> Refused:
    return Refused(Code.CONFIG, f"{path}, line {line}: {key} {reason}.", "Correct that line and run the command again.")
