"""Named parameters as one vector and back, stacked on members and apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learners.core.trajectory import Params


def flatten(params: Params) -> Tensor:
    """Concatenates all entries in the order of their names, → [P]."""
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The inverse of `flatten`: [P] → entries with the shapes and types of `like`."""
    names = sorted(like)
    pieces = torch.split(vector, [like[name].numel() for name in names])
    return {
        name: piece.view_as(like[name]).to(like[name].dtype)
        for name, piece in zip(names, pieces, strict=True)
    }


def flatten_members(params: Params) -> Tensor:
    """Concatenates all entries of each member in the order of their names, → [M, P]."""
    num_members = len(next(iter(params.values())))
    return torch.cat([params[name].reshape(num_members, -1) for name in sorted(params)], 1)


def unflatten_members(matrix: Tensor, like: Params) -> Params:
    """The inverse of `flatten_members`; `like` holds one member's entries, without axis M."""
    names, num_members = sorted(like), len(matrix)
    pieces = torch.split(matrix, [like[name].numel() for name in names], 1)
    return {
        name: piece.view(num_members, *like[name].shape)
        for name, piece in zip(names, pieces, strict=True)
    }


def one_member(params: Params) -> Params:
    """The first member's entries without axis M: what `unflatten_members` takes shapes from."""
    return {name: p[0] for name, p in params.items()}


def first_member(params: Params) -> Params:
    """The first member's entries, axis M kept."""
    return {name: p[:1] for name, p in params.items()}


def expand_members(params: Params, num_members: int) -> Params:
    """Gives every member the same parameters: views with a leading axis M."""
    return {name: p.expand(num_members, *p.shape) for name, p in params.items()}


def leaves(params: Params) -> Params:
    """Detached copies that record gradient."""
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


def detach(params: Params) -> Params:
    """The same values without their graph."""
    return {name: p.detach() for name, p in params.items()}


def gradients(
    outputs: Tensor | Sequence[Tensor],
    params: Params,
    grad_outputs: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Params:
    """∂outputs/∂params as named tensors; zeros where an output does not depend on an entry."""
    grads = torch.autograd.grad(
        outputs,
        list(params.values()),
        grad_outputs,
        create_graph=create_graph,
        retain_graph=retain_graph,
        materialize_grads=True,
    )
    return dict(zip(params, grads, strict=True))


def global_norm(params: Params) -> Tensor:
    """Euclidean norm over all entries."""
    squares = [params[name].detach().square().sum() for name in sorted(params)]
    return torch.stack(squares).sum().sqrt()
