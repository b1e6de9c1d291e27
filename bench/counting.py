"""Count what a computation asks of a device, on tensors without contents: the same on every machine, every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Callable

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_HOST_READS = {"_local_scalar_dense", "_linalg_check_errors"}
_NO_KERNEL = {*_HOST_READS, "_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty"}


class Counter(TorchDispatchMode):
    """Counts what passes through aten while it is active.

    Args:
        device: where it counts; None counts on all of them.
    Attributes:
        flop: floating-point operations, two per multiply-accumulate, by the formulas of `torch.utils.flop_counter`.
        kernels: operations that compute or copy; views and allocations are none.
        bytes: of the tensors that these read and write.
        host_reads: of one number of a tensor, by Python or by torch, for which a GPU has to be waited for.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.flop = self.kernels = self.bytes = self.host_reads = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - of torch, as all here
        _types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call the operation, and count it."""
        options = dict(kwargs or {})
        result = func(*args, **options)
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, options, result)) if isinstance(leaf, torch.Tensor)]
        if self._device is not None and all(tensor.device != self._device for tensor in tensors):
            return result
        self.host_reads += name in _HOST_READS
        if func.is_view or name in _NO_KERNEL:
            return result
        self.kernels += 1
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        flop: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if flop is not None:
            self.flop += flop(*args, **options, out_val=result)
        return result


class FusedAttention(TorchFunctionMode):
    """Has attention computed by one kernel, as on a GPU; tensors without contents would take the long way."""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - of torch, as all here
        _types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call the function, or the kernel in its place."""
        options = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention and options.pop("attn_mask", None) is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **options)[0]
        return func(*args, **dict(kwargs or {}))


@contextmanager
def counting(device: torch.device | None = None) -> Iterator[Counter]:
    """Count what the block does on meta tensors, and on others unless one device alone counts."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(FusedAttention())
        yield stack.enter_context(Counter(device))
