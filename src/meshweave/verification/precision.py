"""How is float64 kept float64? transformers' norms and routers compute in float32, whatever the model's dtype."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class _KeepFloat64(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.to, torch.Tensor.float) and args[0].dtype == torch.float64:
            # float() names no dtype; to() may name others beside it.
            given = (*args[1:], *(kwargs or {}).values()) or (torch.float32,)
            if torch.float32 in given:
                return args[0]
        if func is functional.softmax and kwargs and kwargs.get("dtype") is torch.float32 and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": None}
        if func in _PRODUCTS and {arg.dtype for arg in args} == {torch.float32, torch.float64}:
            # What was lowered on purpose meets what was made in float32.
            args = [arg.double() for arg in args]
        return func(*args, **(kwargs or {}))


def full_precision(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside it, a float64 model's `x.to(torch.float32)`, `x.float()` and their like do nothing; no effect on other dtypes.

    A comparison at 1e-9 needs it on both sides: differences of 1e-16 would now and then round to different float32 numbers.
    """
    return _KeepFloat64() if dtype == torch.float64 else nullcontext()
