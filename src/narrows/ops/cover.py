"""Few vectors that stand for many: who is like whom, and the greedy cover of that graph.

SpindleKV's construction (arXiv 2507.06517, equations 8 to 13): of all vectors that are left, the
one with most neighbours left becomes an entry and stands for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ops.native import library

ROWS = 1024
"""Rows of a graph made at once."""


def likeness_graph(x: Tensor, threshold: float) -> Tensor:
    """Which vectors of ``x`` float32 ``[n, dim]`` have a cosine above ``threshold``, bool
    ``[n, n]``. Every vector is like itself; one of no length is like no other; and a threshold of
    1 is never passed, whatever rounding makes of equal vectors. The kernel and plain products round
    cosines differently."""
    if threshold >= 1:
        return torch.eye(len(x), dtype=torch.bool, device=x.device)
    unit = torch.nn.functional.normalize(x.float(), dim=-1).contiguous()
    graph = torch.empty((len(x), len(x)), dtype=torch.bool, device=x.device)
    native = library()
    if native is not None and x.device.type == "cpu" and len(x):
        room = torch.empty(native.likeness_room(*unit.shape))
        native.likeness(
            *(unit.data_ptr(), *unit.shape, threshold, room.data_ptr()),
            *(graph.data_ptr(), torch.get_num_threads()),
        )
        return graph
    for a in range(0, len(x), ROWS):
        torch.gt(unit[a : a + ROWS] @ unit.T, threshold, out=graph[a : a + ROWS])
    graph &= graph.T.clone()  # a product need not round alike on both sides of the diagonal
    return graph.fill_diagonal_(True)


def nearest(x: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of each vector of ``x`` float32 ``[n, dim]`` the greatest cosine with one of ``others``
    ``[m, dim]``, float32 ``[n]``, and which one that is, int64 ``[n]``."""
    x, others = (torch.nn.functional.normalize(y.float(), dim=-1) for y in (x, others))
    native = library()
    if native is None or x.device.type != "cpu":
        best, index = (x @ others.T).max(-1)
        return best, index
    best, index = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    room = torch.empty(native.likeness_room(*others.shape))
    x, others = x.contiguous(), others.contiguous()
    native.nearest(
        *(x.data_ptr(), len(x), others.data_ptr(), *others.shape, room.data_ptr()),
        *(best.data_ptr(), index.data_ptr(), torch.get_num_threads()),
    )
    return best, index


def greedy_cover(graph: Tensor, weights: Tensor | None = None, covered: bool = False) -> Tensor:
    """The vector that stands for each, int64 ``[n]``; entries stand for themselves.

    Args:
        graph: see ``likeness_graph``; symmetric.
        weights: int ``[n]``, how many equal vectors each one is; None for one each.
        covered: a vector that another one stands for may become an entry, too, and stand for
            others (greedy set cover). The paper's rule is False.

    Among equals the earliest is taken. The kernel and ``greedy_cover_torch`` agree exactly.
    """
    n, native, device = len(graph), library(), graph.device
    graph, weights = graph.cpu(), None if weights is None else weights.cpu()
    if native is None or not n:
        return greedy_cover_torch(graph, weights, covered).to(device)
    weight = torch.ones(n, dtype=torch.int32) if weights is None else weights.to(torch.int32)
    bits, weight = graph.contiguous(), weight.contiguous()
    degree, owner = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
    alive = torch.empty(n, dtype=torch.uint8)
    native.greedy_cover(
        *(bits.data_ptr(), n, weight.data_ptr(), covered),
        *(degree.data_ptr(), alive.data_ptr(), owner.data_ptr(), torch.get_num_threads()),
    )
    return owner.to(device)


def greedy_cover_torch(
    graph: Tensor, weights: Tensor | None = None, covered: bool = False
) -> Tensor:
    """The definition of ``greedy_cover``: degrees counted anew for every entry."""
    n = len(graph)
    weight = torch.ones(n, dtype=torch.int64) if weights is None else weights.to(torch.int64)
    alive = torch.ones(n, dtype=torch.bool)
    owner = torch.zeros(n, dtype=torch.int64)
    while bool(alive.any()):
        degree = (graph & alive[:, None]).to(torch.int64).mul(weight[:, None]).sum(0)
        if not covered:
            degree[~alive] = 0
        best = int(degree.argmax())
        members = graph[best] & alive
        owner[members] = best
        alive &= ~members
    return owner
