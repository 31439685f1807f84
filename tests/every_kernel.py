"""Every family of kernels once, forward and backward, on small matrices: to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.every_kernel [float32] [5x5] [70x64] ...

Named may be dtypes, and sizes: of matrices, or lines x features of attention; where none is named of the two, all are run.
``--tool racecheck`` is for what threads share by instructions of our own (``kernels/registers/shared.py``): sizes 5 to 7.
Without PyTorch's cache every tensor is an allocation of its own, and an access beyond its end is seen.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

import fastdsm

SQUARE = (1, 3, 4, 5, 6, 7, 8, 16, 64, 100)
SIZES = (*((n, n) for n in SQUARE), (3, 4), (7, 9), (33, 40), (130, 200), (300, 257))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def project(n: int, m: int, dtype: torch.dtype) -> None:
    """Sweeps with a mask and per-matrix temperatures, sigma2 with and beside them, its bounds, Newton, a temperature."""
    logits = torch.randn(5, n, m, device=DEVICE, dtype=dtype, requires_grad=True)
    temperature = torch.rand(5, device=DEVICE).add(0.5).requires_grad_()
    mask = torch.rand(5, n, m, device=DEVICE) < 0.9
    mask[..., 0], mask[:, 0] = True, True
    fastdsm.sinkhorn(logits, n_iters=5).square().sum().backward()
    fastdsm.sinkhorn(logits, n_iters=5, temperature=temperature, mask=mask, tol=1e-3, first="row").square().sum().backward()
    found = fastdsm.sinkhorn_sigma2(logits, n_iters=5, temperature=temperature)
    (found.plan.square().sum() + found.sigma2.sum()).backward()
    fastdsm.sigma2(found.plan.detach().requires_grad_()).sum().backward()
    fastdsm.sigma2_bounds(found.plan.detach())
    fastdsm.sinkhorn(logits, solver="newton", temperature=temperature).square().sum().backward()
    fastdsm.temperature_for_sigma2(logits.detach(), 0.5)


def attend(lines: int, features: int, dtype: torch.dtype) -> None:
    """Sinkhorn attention plain, with padding and dropout, with a bias; sigma2 of its plan."""
    query, key, value = (torch.randn(2, 2, lines, features, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3))
    fastdsm.sinkhorn_attention(query, key, value).sum().backward()
    padding = torch.zeros(2, lines, device=DEVICE, dtype=torch.bool)
    padding[0, lines // 2 + 1 :] = True
    fastdsm.sinkhorn_attention(query, key, value, dropout_p=0.1, key_padding_mask=padding).sum().backward()
    bias = torch.randn(lines, lines, device=DEVICE, dtype=dtype, requires_grad=True)
    fastdsm.sinkhorn_attention(query, key, value, bias, first="row").sum().backward()
    fastdsm.sinkhorn_attention_sigma2(query, key)[0].sum().backward()


PIECES = {
    **{f"{lines}x{features}": partial(attend, lines, features) for lines, features in ((1, 16), (70, 64), (300, 40))},
    **{f"{n}x{m}": partial(project, n, m) for n, m in SIZES},
}


def main() -> None:
    """Run them all, or those that are named."""
    named = sys.argv[1:]
    if unknown := set(named) - {*DTYPES, *PIECES}:
        sys.exit(f"expected names among {', '.join([*DTYPES, *PIECES])}, got {', '.join(sorted(unknown))}")
    for dtype in [x for x in DTYPES if x in named] or DTYPES:
        for name in [x for x in PIECES if x in named] or PIECES:
            PIECES[name](DTYPES[dtype])
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(f"{dtype}: {PIECES[name].func.__name__} {name}", flush=True)


if __name__ == "__main__":
    main()
