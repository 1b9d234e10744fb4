"""What would the plain single-process Hugging Face model have done? The reference that every layout must equal."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from meshweave.config import RunConfig
from meshweave.data.dataset import Dataset
from meshweave.data.join import join_media
from meshweave.data.processed import ProcessedDataset
from meshweave.model.blueprint import auto_class, blueprint_of, implementations
from meshweave.model.experts import routers
from meshweave.model.frozen import frozen_names
from meshweave.model.modules import graph_of
from meshweave.model.routing import router_coefficient
from meshweave.verification.reference_data import stock_sample
from meshweave.verification.reference_update import ReferenceUpdate

_OF_VIDEOS = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
"""What the stock forward calls the inputs of videos, which a dataset names as those of images."""


@dataclass(frozen=True)
class Expected:
    """What the plain model says of a step."""

    loss: float
    """Per target token."""
    targets: int
    """Target tokens."""
    gradients: Mapping[str, Tensor]
    """Of the whole loss per target token, by full parameter name."""
    router_aux_loss: float = 0.0
    """Load-balancing loss (`model/routing.py`), its coefficient left out."""


def stock_batch(model: PreTrainedModel, dataset: Dataset, samples: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    """What the stock forward of a model takes for some samples, in the model's dtype, and their labels `[samples, longest]`.

    Of data from files all of it is the stock processor's (`reference_data`); random samples are what they are.
    """
    kinds: dict[str, list[Mapping[str, Tensor]]] = {}
    if isinstance(dataset, ProcessedDataset):
        stock = [stock_sample(dataset, sample) for sample in samples]
        texts = [(ids, labels) for ids, labels, _ in stock]
        kinds["image"] = [media for _, _, media in stock if media]
    else:
        texts = [dataset.text(sample) for sample in samples]
        for sample in samples:
            for slot, item in enumerate(dataset.meta(sample).media):
                kinds.setdefault(item.kind, []).append(dataset.media(sample, slot))
    ids = pad_sequence([text for text, _ in texts], batch_first=True)
    labels = pad_sequence([label for _, label in texts], batch_first=True, padding_value=-100)
    inputs = {"input_ids": ids, "attention_mask": pad_sequence([torch.ones_like(text) for text, _ in texts], batch_first=True)}
    for kind, items in kinds.items():
        for key, value in join_media(items).items():
            name = _OF_VIDEOS.get(key, key) if kind == "video" else key
            inputs[name] = value.to(model.dtype) if value.is_floating_point() else value
    # Which tokens are text, images, videos and sounds, for models that ask.
    types = torch.zeros_like(ids, dtype=torch.int32)
    for number, key in enumerate(("image_token_id", "video_token_id", "audio_token_id"), start=1):
        if (token := getattr(model.config, key, None)) is not None:
            types += number * torch.eq(ids, token).int()
    wanted = inspect.signature(type(model.base_model).forward).parameters
    return inputs | {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in wanted}, labels


class Oracle:
    """The stock model, one process, one batch per step, no meshweave code between tokens and gradients.

    State: the model, and what its update remembers; `backward` and `update` advance them.
    """

    def __init__(
        self, run: RunConfig, config: PreTrainedConfig, weights: Mapping[str, Tensor] | None, dtype: torch.dtype
    ) -> None:
        """Starts from `weights` by full parameter name, or from the run's model folder if None."""
        model: PreTrainedModel
        config = copy.deepcopy(config)
        if weights is None:
            model = auto_class(config).from_pretrained(run.model, config=config, dtype=dtype, **implementations(dtype))
        else:
            model = auto_class(config).from_config(config, dtype=dtype, **implementations(dtype))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
        self.model, self.run, self.dtype = model.train(), run, dtype
        for name, parameter in blueprint_of(config, dtype).named_parameters():
            if not parameter.requires_grad:  # what the model's own code freezes, and from_pretrained forgets
                model.get_parameter(name).requires_grad_(False)
        graph = graph_of(model)
        for module, options in run.modules.items():
            parameters = graph.parameters(module)
            for name in frozen_names(options, parameters):
                parameters[name].requires_grad_(False)
        text = config.get_text_config()
        self.coefficient = router_coefficient(run, text)
        self.chosen = getattr(text, "num_experts_per_tok", 0)
        self.logits: list[Tensor] = []
        for router, index in routers(graph).values():
            router.register_forward_hook(lambda module, args, output, index=index: self.logits.append(output[index]))
        self.reference = ReferenceUpdate(run, {name: graph.parameters(name).values() for name in run.modules})
        self.learned = False

    def backward(self, dataset: Dataset, samples: Sequence[int], groups: Sequence[Sequence[int]] = ()) -> Expected:
        """Loss and gradients of one step.

        Args:
            groups: the samples among whose tokens experts shall be loaded evenly, group by group.
        """
        self.learned = False
        if not samples:
            return Expected(0.0, 0, {})
        inputs, labels = stock_batch(self.model, dataset, samples)
        mask = inputs["attention_mask"]
        self.model.zero_grad()
        self.logits.clear()
        logits = self.model(**inputs, use_cache=False).logits
        predicted, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        targets = int((target != -100).sum())
        self.learned = targets > 0
        loss = functional.cross_entropy(predicted, target, ignore_index=-100, reduction="sum")
        # Divided after backward: transformers rounds norms to float32 even in float64, and 1/N before would shift that rounding.
        aux = loss.new_zeros(())
        if self.logits and groups:
            rows = {sample: row for row, sample in enumerate(samples)}
            aux = torch.stack(
                [self._balance([rows[sample] for sample in group], mask, labels) for group in groups if group]
            ).sum()
        whole = loss + self.coefficient * aux if self.coefficient else loss
        if whole.requires_grad:  # it does not where nothing but a frozen language model made it
            whole.backward()
        gradients = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.div_(max(1, targets)).clone()
        return Expected(loss.item() / max(1, targets), targets, gradients, aux.item() / max(1, targets))

    def _balance(self, rows: list[int], mask: Tensor, labels: Tensor) -> Tensor:
        """Target tokens of some rows of the batch, times the load-balancing loss of their tokens."""
        tokens = mask[rows].bool()
        losses = []
        for logits in self.logits:
            probabilities = logits.view(*mask.shape, -1)[rows][tokens].softmax(-1)
            experts = probabilities.shape[-1]
            choices = functional.one_hot(probabilities.topk(self.chosen).indices, experts).to(probabilities.dtype)
            losses.append(experts * (choices.mean((0, 1)) * probabilities.mean(0)).sum())
        return (labels[rows][:, 1:] != -100).sum() * torch.stack(losses).mean()

    def update(self) -> None:
        """Clips and takes one step with the gradients of the last `backward`; none where it had no target."""
        self.reference.update(self.learned)

    def parameters(self) -> dict[str, Tensor]:
        """Current value of every parameter by full name; tied parameters once."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
