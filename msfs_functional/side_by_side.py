"""Many tensors side by side in memory, which one kernel can read or write as if they were one.

    lead = 0   | a a a | b b | c c c c |            one tensor (P,), of which a, b, c are parts

    lead = 1   | a a a | b b | c c c c |            member 0 of an ensemble
               | a a a | b b | c c c c |            member 1: one tensor (N, P)

An ensemble of small models is hundreds of tensors; a kernel for each costs more than what it does.
Its parameters, moments and gradients lie this way, so that casts, norm and update are one each.
Every tensor stays an entry of its dict, with its own shape, and may come from elsewhere: `joined`
looks where tensors are and gives None for those that lie apart.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flat(x: Tensor, lead: int) -> bool:
    """Whether x is contiguous in all but its first `lead` dims."""
    if not lead or 0 in x.shape[:lead]:
        return x.is_contiguous()
    return x[(0,) * lead].is_contiguous()


def address(x: Tensor) -> int | None:
    """Where a plain tensor's storage is; None for a subclass, a tracer, or a wrapper of one."""
    plain = type(x) in (Tensor, nn.Parameter) and not x.is_meta
    if not plain or torch._C._functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore
        return None
    return x.untyped_storage().data_ptr()


def joined(tensors: Sequence[Tensor], lead: int) -> Tensor | None:
    """The tensors in their order as one, (*x.shape[:lead], columns), in their own memory.

    None for tensors of several dtypes, subclasses, and such as do not lie side by side.
    """
    first, where = tensors[0], address(tensors[0])
    columns, outer = 0, first.stride()[:lead]
    for x in tensors:
        beside = (
            where is not None
            and address(x) == where
            and x.dtype == first.dtype
            and x.shape[:lead] == first.shape[:lead]
            and x.stride()[:lead] == outer
            and x.storage_offset() == first.storage_offset() + columns
            and flat(x, lead)
        )
        if not beside:
            return None
        columns += x.shape[lead:].numel()
    shape = (*first.shape[:lead], columns)
    return first.detach().as_strided(shape, (*outer, 1), first.storage_offset())


def memory_order(tensors: Sequence[Tensor], lead: int) -> list[int] | None:
    """The order in which several tensors lie side by side; None for such as lie apart."""
    places = [address(x) for x in tensors[:2]]
    if len(tensors) < 2 or None in places or places[0] != places[1]:
        return None
    order = sorted(range(len(tensors)), key=lambda i: tensors[i].storage_offset())
    return None if joined([tensors[i] for i in order], lead) is None else order


def parts(whole: Tensor, like: Sequence[Tensor], lead: int) -> list[Tensor]:
    """Views of `whole` in the shapes of `like`: the inverse of `joined`."""
    pieces = whole.split([x.shape[lead:].numel() for x in like], -1)
    return [piece.view(x.shape) for piece, x in zip(pieces, like, strict=True)]


def lay(tensors: Sequence[Tensor], lead: int) -> list[Tensor]:
    """Copies of tensors of one dtype that lie side by side."""
    whole = torch.cat([x.reshape(*x.shape[:lead], -1) for x in tensors], -1)
    return parts(whole, tensors, lead)
