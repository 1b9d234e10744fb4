"""Do the run file and the model fit together? Every mismatch, in one message, before anything starts."""

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.errors import ConfigError
from meshweave.layout import placements
from meshweave.model.blueprint import blueprint_of
from meshweave.model.experts import expert_faults, routers
from meshweave.model.families import PROVEN, tensor_plans
from meshweave.model.frozen import frozen_names, lost_texts
from meshweave.model.masks import layer_sizes
from meshweave.model.modules import ModelGraph, graph_of, module_config
from meshweave.model.slicing import sequence_faults
from meshweave.model.stages import stage_cuts
from meshweave.model.weights import check_weights

logger = logging.getLogger(__name__)

_DIVIDED_BY_TP = ("num_attention_heads", "num_key_value_heads", "num_heads", "intermediate_size")


def check_model(run: RunConfig, config: PreTrainedConfig) -> None:
    """Checks the run's modules and sizes against the model's config.

    Raises:
        ConfigError: a module is missing or unknown, `tp` does not divide what it must, or `frozen` names no parameter or all.
        LayoutError: the sizes of a module are inconsistent, the model cannot be cut into modules or these into their stages,
            or a module has no tensor-parallel plan.
    """
    where = placements(run)
    graph = graph_of(blueprint_of(config, torch.float32))
    parts = {name: module_config(config, name) for name in graph.children}
    wrong = [
        f"modules.{name}: a {config.model_type} model has no such module; it has {', '.join(parts)}"
        for name in run.modules
        if name not in parts
    ]
    wrong += [f"modules.{name}: missing; give this module of the model ranks" for name in parts if name not in run.modules]
    for name, part in parts.items():
        tp = where[name].layout.tp if name in where else 1
        if tp == 1:
            continue
        tensor_plans(graph, name)
        for key in _DIVIDED_BY_TP:
            sizes = layer_sizes(part, key) if name == LANGUAGE else (getattr(part, key, None),)
            wrong += [
                f"modules.{name}.tp={tp}: does not divide {key}={size} of {part.model_type}; use a divisor of it"
                for size in sizes
                if isinstance(size, int) and size % tp
            ]
        wrong += [
            f"modules.{name}.tp={tp}: {key}={value} of {part.model_type}: dropout over tp is not built; set it to 0"
            for key, value in part.to_dict().items()
            if key.endswith(("dropout", "_pdrop")) and value
        ]
    wrong += [fault for name in run.modules if name in parts for fault in expert_faults(run, graph, name, where[name].layout)]
    if not routers(graph):
        kind = config.get_text_config().model_type
        wrong += [
            f"train.{key}={getattr(run.train, key)}: a {kind} model has no experts whose load it could keep even; take it out"
            for key in ("router_aux_loss", "router_aux_scope")
            if getattr(run.train, key) not in (None, 0, "lane")
        ]
    wrong += _rotary_faults(graph)
    wrong += sequence_faults(run, graph)
    wrong += _frozen_faults(run, graph)
    if wrong:
        raise ConfigError("\n".join(["the run file does not fit the model:", *(f"  {line}" for line in dict.fromkeys(wrong))]))
    stage_cuts(run, graph)
    if config.model_type not in PROVEN:
        logger.warning(
            "%s models take the generic path, which no test covers; `meshweave verify --shrink` shows whether it holds",
            config.model_type,
        )


def check_executable(run: RunConfig, config: PreTrainedConfig) -> None:
    """Refuses a run folder that cannot be, and weights that are missing or do not fit.

    Raises:
        ConfigError: the run folder cannot be created.
        CheckpointError: the model folder's safetensors do not hold the model.
    """
    try:
        run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output={str(run.output)!r}: cannot be created ({error.strerror}); choose a folder that can"
        ) from error
    if run.weights == "pretrained":
        check_weights(blueprint_of(config, torch.float32), run.model)


def _rotary_faults(graph: ModelGraph) -> list[str]:
    """Sections of M-RoPE, from the config or of the class alone, that do not share out half of a head."""
    faults = []
    for module in graph.model.modules():
        sections = getattr(module, "mrope_section", None)
        if sections is None:
            continue
        config: Any = module.config
        try:
            type(module)(config)(torch.zeros(1, 1, 1), torch.zeros(3, 1, 1, dtype=torch.int64))
        except Exception as error:  # whatever the stock class raises
            named = "" if "mrope_section" in config.rope_parameters else ", which its class takes as config.json does not say"
            faults.append(
                f"model: rope_parameters.mrope_section={list(sections)} of {config.model_type}{named}: heads cannot be shared so "
                f"({error}); give three numbers that make up half of a head"
            )
    return faults


def _frozen_faults(run: RunConfig, graph: ModelGraph) -> list[str]:
    names = {name: list(graph.parameters(name)) for name in run.modules if name in graph.children}
    faults = [
        f"modules.{name}.frozen: no parameter's name contains {text!r}; names look like {found[0]}"
        for name, found in names.items()
        for text in lost_texts(run.modules[name], found)
    ]
    if all(len(frozen_names(run.modules[name], found)) == len(found) for name, found in names.items()):
        faults.append("modules: `frozen` leaves nothing to train; unfreeze a module or some of its parameters")
    return faults
