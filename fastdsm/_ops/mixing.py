"""What an mHC layer computes of its mixes, ``fastdsm.mhc``: the options that decide their values."""

from __future__ import annotations

from typing import NamedTuple

MOST_STREAMS = 16


class Mixing(NamedTuple):
    """mixes (D,) of a token, D = n (n + 2): n of pre, n of post, n x n of the mix of streams, row by row; or n of pre alone.

        q    = rsqrt(mean(vec X ^2) + norm_eps),   mixes = q fn vec X
        pre  = sigmoid(scale_0 mixes + base) + pre_eps
        post = post_mult sigmoid(scale_1 mixes + base)
        H    = ``n_iters`` sweeps of scale_2 mixes + base, the columns first or the rows

    n_iters >= 1 where sinkhorn_eps > 0. With ``floored`` sweeps begin from softmax of the first side + eps, which is then
    divided by the sums of the other + eps, and n_iters - 1 times both sides so; without it from the exponentials relative to
    the largest of the first side, and every side is divided by sums + eps. Without eps the sweeps are ``fastdsm.sinkhorn``'s,
    n_iters >= 0. What is passed on is comb[old, new], H where ``transposed``, else H^T, so that
    X'_new = post_new F + sum_old comb[old, new] X_old is right for all. ``spectrum`` asks for more
    of comb, and changes nothing.
    """

    n_iters: int = 20
    columns_first: bool = False
    sinkhorn_eps: float = 1e-6
    floored: bool = True
    pre_eps: float = 1e-6
    post_mult: float = 2.0
    norm_eps: float = 1e-6
    transposed: bool = True
    spectrum: bool = False
