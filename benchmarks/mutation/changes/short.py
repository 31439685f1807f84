"""Changes in attention of heads that fit on chip: its sweeps, its adjoint, its launches and what is prepared of them."""

from ..change import Change

_SHORT = "tests/kernels/test_attention_short.py"

SHORT = [
    Change(
        "kernels/attention/short.py",
        "return tl.where(s != 0, c * reciprocal(s), 1.0)",
        "return c * reciprocal(s + 2.0**-126)",
        (f"{_SHORT}::test_options",),
        "a factor of 2^126 on streams without an entry",
    ),
    Change(
        "kernels/attention/short.py",
        "of_line = tl.where(n_streams > 0, tl.where(line_is_key != 0, 1.0 / ratio, 1.0), 0.0)",
        "of_line = tl.where(n_streams > 0, 1.0, 0.0)",
        (f"{_SHORT}::test_sweeps",),
        "keys that are lines have a query's mass",
    ),
    Change(
        "kernels/attention/short_backward.py",
        "return u, tl.where(t == start + 1, 1.0,",
        "return u, tl.where(t == start, 1.0,",
        (f"{_SHORT}::test_sweeps",),
        "the factor before a segment's second sweep",
    ),
    Change(
        "kernels/attention/short_backward.py",
        "dg = (dg - v * stream_sums(K, a)) * (v / c)",
        "dg = dg * (v / c)",
        (f"{_SHORT}::test_sweeps",),
        "the adjoint of a step of lines does not reach the streams",
    ),
    Change(
        "kernels/attention/short_backward.py",
        "        if t < start:\n            start -= period\n",
        "        if t < 0:\n            start -= period\n",
        (f"{_SHORT}::test_sweeps", f"{_SHORT}::test_logits_of_any_size"),
        "all segments have the K of the last",
    ),
    Change(
        "kernels/attention/launch_short.py",
        "of_keys[name].copy_(x.unflatten(1, (G, -1)).sum(2))",
        "of_keys[name].copy_(x.unflatten(1, (G, -1))[:, :, 0])",
        (f"{_SHORT}::test_query_heads_that_share_a_key_head",),
        "of query heads that share a key head one gradient",
    ),
    Change(
        "fastdsm/_ops/attention_runs.py",
        "return packed and whole",
        "return packed",
        (f"{_SHORT}::test_a_call_that_is_known_takes_what_it_is_given",),
        "prepared launches read the copies of the first call",
    ),
    Change(
        "kernels/common/prepared.py",
        "fields[field] = tensors[at]",
        "fields[field] = tensors[0]",
        (f"{_SHORT}::test_a_call_that_is_known_takes_what_it_is_given",),
        "every pointer in a tuple is that of the first operand",
    ),
]
