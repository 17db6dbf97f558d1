"""What a recipe may do to a gradient in its first step, computed from the gradients of all ranks.

With b(f, x) the `error_bound` of format f, x_w the gradient of rank w (rotated, if the recipe rotates) and W ranks:

    two_shot    e + b(answer, |mean x| + e)  with  e = mean over ranks of b(format, x_w)
    thc         s times twice the widest gap between levels over their top, s the largest |x_w| of the block
    one_bit     S / W + |mean x|, with S the sum over ranks of the block's mean |x_w|

plus float32 rounding of the sums. two_hop is two_shot where all ranks are on one host.
"""

from itertools import pairwise

import torch
from torch.nn.functional import pad

from commq.codecs.bounds import error_bound
from commq.codecs.rotation import rotate
from commq.collectives.levels import THC_TABLES

STOCHASTIC = 1.0 + 2.0**-16


def mean_bound(recipe, name, shape, rows_WN):
    """Bound on |found - mean| as float64 (N,), N padded to whole units; with a rotation, of rotated elements.

    Then only its 2-norm bounds that of the gradient: the transform is orthogonal. rows_WN: float32.
    """
    numel = rows_WN.shape[1]
    fmt, answer = recipe.formats_of(name, shape, numel, 0)
    if fmt.kind == "raw":
        rounding = "nearest" if recipe.format.kind != "raw" else recipe.rounding
        return _two_shot(rows_WN, fmt, answer, rounding)
    rows_WN = pad(rows_WN, (0, -numel % recipe.unit))
    if recipe.rotation is not None:
        signs = recipe.rotation.sign_pattern(seed=recipe.seed, step=0, device=rows_WN.device)
        rows_WN = torch.stack([rotate(row, recipe.rotation, signs) for row in rows_WN])
    if recipe.schedule == "thc":
        levels = THC_TABLES[4].levels
        s_G = rows_WN.abs().amax(dim=0).view(-1, fmt.block).amax(dim=-1)
        widest = 2.0 * max(b - a for a, b in pairwise(levels)) / levels[-1]
        return (STOCHASTIC * widest + 2.0**-21) * s_G.double().repeat_interleave(fmt.block)
    # The mean of a block that ends in padding divides by fewer elements.
    short_N = torch.ones(rows_WN.shape[1], dtype=torch.float64)
    if numel % fmt.block:
        short_N[numel // fmt.block * fmt.block :][: fmt.block] = fmt.block / (numel % fmt.block)
    if recipe.schedule == "one_bit":
        means_G = rows_WN.double().abs().view(len(rows_WN), -1, fmt.block).mean(dim=(0, 2))
        means_N = means_G.repeat_interleave(fmt.block) * short_N
        return (means_N + rows_WN.double().mean(dim=0).abs()) * (1 + 2.0**-21)
    return _two_shot(rows_WN, fmt, answer, recipe.rounding, short_N)


def _two_shot(rows_WN, fmt, answer, rounding, short_N=1.0):
    def bound(x_N, fmt):
        b_N = error_bound(x_N, fmt, rounding=rounding)
        return b_N * short_N if fmt.kind == "sign" else b_N

    sent_N = torch.stack([bound(row, fmt) for row in rows_WN]).mean(dim=0)
    sums_N = 2.0**-21 * rows_WN.double().abs().mean(dim=0)
    most_N = rows_WN.double().mean(dim=0).abs() + sent_N + sums_N
    return sent_N + sums_N + bound((most_N * (1 + 2.0**-22)).float(), answer)
