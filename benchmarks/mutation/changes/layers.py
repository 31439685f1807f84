"""Changes in the mHC layer: its PyTorch path, its modules, its kernels, its judge."""

from ..change import Change

_API = "tests/api/test_mhc.py"
_VARIANTS = f"{_API}::test_variants_against_the_oracle"
_RESULTS = "tests/api/test_mhc_results.py"
_PRE, _POST = "tests/kernels/test_mhc_pre.py", "tests/kernels/test_mhc_post.py"

LAYERS = [
    Change(
        "fastdsm/pytorch/mhc/sweeps.py",
        "D.addcmul_(tape[half - 1], sums[side], value=-1.0)",
        "D.addcmul_(tape[half - 1], sums[side], value=-0.99)",
        (f"{_VARIANTS}[4-deepseek]",),
        "the adjoint of a half sweep",
    ),
    Change(
        "fastdsm/pytorch/mhc/sweeps.py",
        "D *= softmax / first",
        "D *= 1.0",
        (f"{_API}::TestInPyTorch", _API),
        "eps in the softmax, in the gradient",
    ),
    Change(
        "fastdsm/pytorch/mhc/sweeps.py",
        "return int((side == 0) != columns_first)",
        "return int(side == 0)",
        (f"{_VARIANTS}[4-deepseek]", f"{_API}::TestInPyTorch", "tests/api/test_nn.py"),
        "columns first taken for rows first",
    ),
    Change(
        "fastdsm/pytorch/mhc/mixes.py",
        "factor = (dz * raw).sum(1, keepdim=True).mul_(q * q).div_(-width)",
        "factor = (dz * raw).sum(1, keepdim=True).mul_(q * q).div_(width)",
        (f"{_VARIANTS}[4-deepseek]",),
        "the sign of the norm's gradient",
    ),
    Change(
        "fastdsm/pytorch/mhc/mixes.py",
        "return Mixes(pre, post, plan if mixing.transposed else plan.mT.contiguous())",
        "return Mixes(pre, post, plan)",
        (f"{_VARIANTS}[4-paper]",),
        "the mix of streams, transposed",
    ),
    Change(
        "fastdsm/pytorch/mhc/mixes.py",
        "post = z[:, n : 2 * n].sigmoid().mul_(mixing.post_mult)",
        "post = z[:, n : 2 * n].sigmoid()",
        (f"{_VARIANTS}[4-deepseek]",),
        "half of what a branch writes",
    ),
    Change(
        "fastdsm/pytorch/mhc/layer.py",
        "grad = of_sums @ fn if add is None else",
        "grad = of_sums @ fn if True else",
        (f"{_API}::TestHyperConnection",),
        "the gradient of streams that go on is lost",
    ),
    Change(
        "fastdsm/_ops/mhc_calls.py",
        "mhc_pre_backward(*of_pre, d_mixed, sums, mixed, *inputs[4:])",
        "mhc_pre_backward(*of_pre, None, sums, mixed, *inputs[4:])",
        (f"{_API}::test_post_with_the_next_pre",),
        "the gradient of new streams themselves, in post with the next pre",
    ),
    Change(
        "fastdsm/mhc/layer.py",
        "given = oracle.pre_of(flat, layer.scale, layer.base, n, layer.mixing)",
        "given = oracle.pre_of(flat, layer.scale, layer.base, n, layer.mixing._replace(pre_eps=1e-3))",
        (f"{_API}::test_post_with_the_next_pre",),
        "eps of the shifted pre",
    ),
    Change(
        "fastdsm/nn/hyper_connections.py",
        "for number in range(max(i for i in self._made if i <= last), last):",
        "for number in range(max(i for i in self._made if i < last), last - 1):",
        ("tests/api/test_hyper_connections.py",),
        "streams made again one layer short",
    ),
    Change(
        "fastdsm/diagnostics/streams.py",
        "mixes @ product",
        "product @ mixes",
        ("tests/diagnostics/test_monitor.py::test_streams_of_connections",),
        "the product over depth in the wrong order",
    ),
    Change(
        "kernels/mhc/mixes.py",
        "dF = [options.eps * value for value in products(past_p, a)]",
        "dF = [0.0 * options.eps * value for value in products(past_p, a)]",
        (_PRE,),
        "eps in the adjoint of a row step",
    ),
    Change(
        "kernels/mhc/mixes.py",
        "value = tl.where(options.floor > 0, log2(exp2(value) + options.floor), value)",
        "value = tl.where(options.floor > 0, log2(exp2(value) + 0.0 * options.floor), value)",
        (_PRE,),
        "eps of the softmax, on the kernels",
    ),
    Change(
        "kernels/mhc/exact.py",
        "for _ in tl.static_range(3):",
        "for _ in tl.static_range(2):",
        (_PRE, _POST),
        "fn in two pieces of bfloat16",
    ),
    Change(
        "kernels/mhc/collapse.py",
        "[options.post_mult * value for value in post]",
        "[value for value in post]",
        (_PRE,),
        "half of what a branch writes, on the kernels",
    ),
    Change(
        "kernels/mhc/spectrum.py",
        "ahead = (h > 0.0) | ((h == 0.0) & (column < partner)[None, :])",
        "ahead = h > 0.0",
        (_PRE,),
        "columns of one norm turned by angles of one sign",
    ),
    Change(
        "kernels/mhc/spectrum.py",
        "ROUNDS: tl.constexpr = 8 if L > 8 else 7 if L > 4 else 5",
        "ROUNDS: tl.constexpr = 4",
        (_PRE,),
        "Jacobi's rounds of 4 lines for 16",
    ),
    Change(
        "kernels/mhc/spectrum.py",
        "means = rows[:, :, None] + columns[:, None, :] - (total / count)[:, None, None]",
        "means = rows[:, :, None]",
        (_PRE,),
        "sigma2 of the mix without the means of columns taken off",
    ),
    Change(
        "fastdsm/mhc/buffers.py",
        "any(_overlap(out, x) for x in tensors)",
        "any(out is x for x in tensors)",
        (_RESULTS,),
        "a buffer that lies over the streams it is made of",
    ),
]
