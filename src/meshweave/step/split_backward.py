"""How does a backward come in halves? First the gradient of the input, for which another stage waits; of the weights later."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass
class SplitBackward:
    """One forward, recorded so that its backward can be split.

    A matrix product's two gradients need nothing of one another. The first half runs through the graph for the gradient of the
    input, computes those of other parameters on its way (norms, a matrix used twice), and keeps what reaches each product;
    the second half computes the matrices' gradients from that alone.

    State: the matrix products, and after the first half what reached them.
    """

    outputs: list[tuple[GradientEdge, nn.Parameter]] = field(default_factory=list)
    reached: list[tuple[GradientEdge, nn.Parameter, Tensor]] = field(default_factory=list)

    def recording(self) -> TorchFunctionMode:
        """Inside this context, matrix products with a parameter are recorded."""
        return _Recording(self.outputs)

    def input_gradients(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        parameters: Iterable[nn.Parameter],
    ) -> list[Tensor | None]:
        """The first half: gradients of `inputs`; those of parameters outside matrix products are added to their `grad`."""
        uses = Counter(id(parameter) for _, parameter in self.outputs)
        # From a later use of a matrix, autograd would go on to its earlier ones and count these twice.
        once = [(edge, parameter) for edge, parameter in self.outputs if uses[id(parameter)] == 1]
        others = [parameter for parameter in parameters if parameter.requires_grad and uses[id(parameter)] != 1]
        edges = [edge for edge, _ in once]
        found = torch.autograd.grad(
            outputs,
            [*inputs, *edges, *others],  # type: ignore[arg-type]
            gradients,
            retain_graph=True,
            allow_unused=True,
        )
        first, second = len(inputs), len(inputs) + len(edges)
        self.reached = [
            (edge, parameter, gradient)
            for (edge, parameter), gradient in zip(once, found[first:second], strict=True)
            if gradient is not None
        ]
        for parameter, gradient in zip(others, found[second:], strict=True):
            _accumulate(parameter, gradient)
        return list(found[:first])

    def weight_gradients(self) -> None:
        """The second half: adds the gradients of the matrices to their `grad`."""
        for edge, parameter, reached in self.reached:
            (gradient,) = torch.autograd.grad([edge], [parameter], [reached])  # type: ignore[list-item]
            _accumulate(parameter, gradient)
        self.outputs.clear()
        self.reached.clear()


class _Recording(TorchFunctionMode):
    def __init__(self, found: list[tuple[GradientEdge, nn.Parameter]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) > 1 and output.requires_grad:
            weight = args[1]
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                self.found.append((get_gradient_edge(output), weight))
        return output


def _accumulate(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient.detach()
    else:
        parameter.grad.add_(gradient)
