"""What processor does a model folder have? Its tokenizer, chat template and image processor, put together part by part.

transformers' own loader wants every part that a processor can have, also those for videos and sounds, which need torchvision or
other packages. What is read here is text and pictures: the other parts are left out, with torchvision and without it alike.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError
from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from meshweave.errors import ConfigError, cause

_NAMES_THE_CLASS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_READ: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
_FILES = {"tokenizer": "tokenizer.json, tokenizer_config.json", "image_processor": "preprocessor_config.json"}
Made = TypeVar("Made")


def load_processor(folder: Path) -> Any:
    """The processor of a model folder, as the hub publishes them, without parts for videos and sounds.

    Image processors are transformers' PIL ones, whether torchvision is there or not. A template is looked for where transformers
    looks (processor_config.json, chat_template.json, chat_template.jinja, the first that has one), then in tokenizer_config.json.
    Where preprocessor_config.json has `min_pixels` or `max_pixels` beside a `size`, the stock class takes the pixels.

    Raises:
        ConfigError: a part is missing or cannot be read, or it has no chat template, image token or fast tokenizer.
    """
    stock = _processor_class(folder)
    parts = {}
    for name in stock.get_attributes():
        if name in _READ:
            # The PIL image processors: torchvision is not a dependency.
            options = {"backend": "pil"} if name == "image_processor" else {}
            # Else transformers asks on the terminal whether code of the folder may run.
            load = partial(_READ[name].from_pretrained, folder, trust_remote_code=False, **options)
            parts[name] = _read(folder, _FILES[name], load)
        else:
            parts[name] = None
    settings, _ = _read(folder, "processor_config.json or the chat template", lambda: stock.get_processor_dict(folder))
    processor = _read(
        folder,
        "processor_config.json",
        lambda: _without_parts(stock).from_args_and_dict(list(parts.values()), settings),
    )
    processor.chat_template = _template(folder, processor)
    _require(folder, processor)
    return processor


def _processor_class(folder: Path) -> type[ProcessorMixin]:
    named = (read_json(folder / file).get("processor_class") for file in _NAMES_THE_CLASS)
    name = next((name for name in named if name), None) or PROCESSOR_MAPPING_NAMES.get(
        read_json(folder / "config.json").get("model_type", "")
    )
    if name is None:
        raise ConfigError(
            f"model: {str(folder)!r} names no processor (`processor_class` in one of {', '.join(_NAMES_THE_CLASS)}), and "
            "transformers knows none for its config.json; copy these files from where the model was published"
        )
    found: type[ProcessorMixin] | None = processor_class_from_name(name)
    if found is None:
        raise ConfigError(f"model: {str(folder)!r} names the processor {name!r}, which this transformers does not know")
    if not issubclass(found, ProcessorMixin):  # a placeholder for what cannot be imported
        return _read(
            folder, f"the class {name}", _pixtral if name == "PixtralProcessor" else lambda: found.from_pretrained(folder)
        )
    return found


def _pixtral() -> type[ProcessorMixin]:
    """Without torchvision: it imports one function from its image processor for torchvision, which the one for PIL has, too."""
    package = "transformers.models.pixtral"
    sys.modules[f"{package}.image_processing_pixtral"] = import_module(f"{package}.image_processing_pil_pixtral")
    try:
        stock: type[ProcessorMixin] = import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[f"{package}.image_processing_pixtral"]
    return stock


def _without_parts(stock: type[ProcessorMixin]) -> Any:
    """The class, of which parts may be None."""

    def check(self: ProcessorMixin, name: str, part: Any) -> Any:
        return None if part is None else stock.check_argument_for_proper_class(self, name, part)

    return type(stock.__name__, (stock,), {"check_argument_for_proper_class": check})


def _template(folder: Path, processor: Any) -> str:
    found = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise ConfigError(
                f"model: {str(folder)!r} has chat templates named {', '.join(sorted(found))}, but none is the default; save the "
                "one to train with as chat_template.jinja"
            )
        found = found["default"]
    if not found:
        raise ConfigError(f"model: {str(folder)!r} has no chat template; save a chat_template.jinja there")
    try:
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "?"}]}], chat_template=found)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"model: the chat template of {str(folder)!r} is broken at line {error.lineno}: {error.message}"
        ) from error
    except Exception:  # this conversation it may well refuse
        pass
    return str(found)


def _require(folder: Path, processor: Any) -> None:
    if getattr(processor, "image_token", None) is None or getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            f"model: {type(processor).__name__} of {str(folder)!r} marks no images; records are read for models that take some"
        )
    if not getattr(processor.tokenizer, "is_fast", False):
        raise ConfigError(
            f"model: {type(processor.tokenizer).__name__} of {str(folder)!r} is not a fast tokenizer, so the tokens of answers "
            "cannot be located; save a tokenizer.json there"
        )


def read_json(file: Path) -> dict[str, Any]:
    """An object in a file of a model folder; {} where there is none. Raises ConfigError if it is no object."""
    if not file.is_file():
        return {}
    content = _read(file.parent, file.name, lambda: json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise ConfigError(f"model: {file} holds no JSON object; copy it from where the model was published")
    return content


def _read(folder: Path, files: str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except Exception as error:  # whatever a library raises of a folder is about the folder
        raise ConfigError(
            f"model: {str(folder)!r}: transformers cannot read {files} ({cause(error)}); copy the files from "
            "where the model was published"
        ) from error
