"""Do the run file and the model fit together? Every mismatch, in one message, before anything starts."""

from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.errors import ConfigError
from meshweave.layout import placements
from meshweave.model.families import tensor_plan
from meshweave.model.modules import VISION

_DIVIDED_BY_TP = ("num_attention_heads", "num_key_value_heads", "num_heads", "intermediate_size")

_NOT_BUILT = {
    "pp": "pipeline parallelism",
    "cp": "context parallelism",
    "ep": "expert parallelism",
    "etp": "tensor parallelism inside experts",
    "replicas": "repeating work on several ranks",
}


def check_model(run: RunConfig, config: PreTrainedConfig) -> None:
    """Checks the run's modules and sizes against the model's config.

    Raises:
        ConfigError: a module is missing or unknown, or `tp` does not divide what it must.
        LayoutError: the sizes of a module are inconsistent.
    """
    placements(run)
    wrong = []
    known = {VISION: getattr(config, "vision_config", None), LANGUAGE: config.get_text_config()}
    for name in run.modules:
        if known.get(name) is None:
            wrong.append(f"modules.{name}: a {config.model_type} model has no such module; it has {', '.join(known)}")
    wrong += [
        f"modules.{name}: missing; give this module of the {config.model_type} model ranks"
        for name in known
        if name not in run.modules
    ]
    for name, module in run.modules.items():
        part = known.get(name)
        if part is None or module.tp == 1:
            continue
        if tensor_plan(part) is None:
            wrong.append(
                f"modules.{name}.tp={module.tp}: there is no tensor-parallel plan for {part.model_type!r} models; set it to 1"
            )
        for key in _DIVIDED_BY_TP:
            size = getattr(part, key, None)
            if isinstance(size, int) and size % module.tp:
                wrong.append(
                    f"modules.{name}.tp={module.tp}: does not divide {key}={size} of {part.model_type}; use a divisor of it"
                )
    if wrong:
        raise ConfigError("\n".join(["the run file does not fit the model:", *(f"  {line}" for line in dict.fromkeys(wrong))]))


def check_executable(run: RunConfig) -> None:
    """Refuses what geometry knows but no executor runs yet, and batches too small for their lanes.

    Raises:
        ConfigError: naming every such key.
    """
    wrong = [
        f"modules.{name}.{axis}={getattr(module, axis)}: {meaning} is not built yet; set it to 1"
        for name, module in run.modules.items()
        for axis, meaning in _NOT_BUILT.items()
        if getattr(module, axis) > 1
    ]
    lanes, train = run.modules[LANGUAGE].dp, run.train
    if train.batch_size < lanes * train.microbatches:
        wrong.append(
            f"train.batch_size={train.batch_size}: fewer samples than language lanes × microbatches "
            f"({lanes} × {train.microbatches}), so some would always be empty; raise it to at least {lanes * train.microbatches}"
        )
    if wrong:
        raise ConfigError("\n".join(["this run cannot start:", *(f"  {line}" for line in wrong)]))
