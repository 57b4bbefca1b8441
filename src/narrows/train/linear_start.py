"""Where training of a SpecFormer begins: the best linear forecast, in closed form.

The states a drafter reads already tell, by a linear map, much of the states to come. Fitting that
map takes one pass over the examples, where gradient descent takes hundreds of updates to find it.
An extension; the paper starts from random weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from narrows.draft.specformer import SpecFormer
from narrows.errors import InputError
from narrows.model.flat import FlatModel

RIDGE = 1e-3
"""Of the mean square of each feature, added to it."""
LEAST_GAIN = 0.05
"""Of the mean gain of the target's last norm, below which dividing by a gain would only amplify
noise."""


@torch.no_grad()
def start_linear(
    module: SpecFormer, target: FlatModel, texts: Iterable[tuple[Tensor, Tensor, int]]
) -> None:
    """Set ``module`` to the least-squares forecast of the target's last states, through its
    bottleneck of one hidden vector; attention and MLP add nothing at first.

    Args:
        module: with a positional layer; changed in place.
        target: whose norm the slots go through.
        texts: hidden states ``[T, taps, hidden]``, token ids ``[T]`` and where the answer starts.

    Raises InputError without an answer longer than the slots.
    """
    assert module.spread is not None
    size, slots = module.config.hidden_size, module.config.slots
    rows, square, cross = 0, torch.zeros(()), torch.zeros(())
    for taps, ids, start in texts:
        # Slot i names token t + 2 + i, which the state at t + 1 + i makes.
        coming = taps[start:].float()[:, -1]
        if len(coming) < slots:
            continue
        coming = coming.unfold(0, slots, 1).transpose(1, 2).flatten(1)
        places = slice(start - 1, start - 1 + len(coming))
        read = [module.fuse_norm(taps[places].float()).flatten(1)]
        if module.anchor is not None:
            assert module.token_norm is not None
            newest = target.embed(ids[start : start + len(coming)]).float()
            read.append(module.token_norm(newest))
        features = torch.cat(read, 1)
        rows = rows + len(features)
        square = square + features.T @ features
        cross = cross + features.T @ coming
    if not rows:
        raise InputError("no answer is long enough to start from; give more or longer ones")
    sizes = (square.diagonal() / rows).sqrt()
    square.diagonal().mul_(1 + RIDGE)
    forecast = torch.linalg.solve(square, cross)
    # The bottleneck keeps the directions in which forecasts differ most.
    spread = torch.linalg.eigh(forecast.T @ square @ forecast)[1][:, -size:]
    narrow = spread.T @ forecast.T
    # Every feature and every number in the bottleneck gets mean square 1: a few numbers of hidden
    # states are far larger than the rest, and one learning rate could not suit them all.
    wide = module.fuse.in_features
    powers = ((narrow[:, :wide] @ square[:wide, :wide] * narrow[:, :wide]).sum(1) / rows).sqrt()
    narrow, spread = narrow * sizes / powers[:, None], spread * powers
    module.fuse_norm.weight.div_(sizes[:wide].view(module.fuse_norm.weight.shape))
    module.fuse.weight.copy_(narrow[:, :wide])
    if module.anchor is not None:
        assert module.token_norm is not None
        module.token_norm.weight.div_(sizes[wide:])
        module.anchor.weight.copy_(narrow[:, wide:])
    # The target's norm multiplies by its gains again.
    gains = target.final_norm(torch.ones(1, size, device=spread.device))[0].float()
    least = LEAST_GAIN * gains.abs().mean()
    gains = torch.where(gains.abs() < least, least, gains)
    module.spread.weight.copy_(spread / gains.repeat(slots)[:, None])
    module.spread.bias.zero_()
    for layer in (module.context.out, module.between.out, module.down, module.after):
        if layer is not None:
            layer.weight.zero_()
