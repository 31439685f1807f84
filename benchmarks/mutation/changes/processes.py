"""Changes in what runs over several processes."""

from ..change import Change

_ROWS, _CONTEXT = "tests/distributed/test_rows.py", "tests/distributed/test_context_parallel.py"
_SHARDS, _SEQUENCE = "tests/distributed/test_shards.py", "tests/distributed/test_sequence_parallel.py"

PROCESSES = [
    Change(
        "fastdsm/distributed/gradient.py",
        'factor = divided(reduced(dg, "sum", group), c)',
        "factor = divided(dg, c)",
        (_ROWS,),
        "the adjoint of columns of this process's rows alone",
    ),
    Change(
        "fastdsm/distributed/rows.py",
        'top = reduced(top, "max", problem.group)',
        'top = reduced(0.0 * top, "max", problem.group)',
        (f"{_ROWS}::test_extremes",),
        "no common maximum before the first sums",
    ),
    Change(
        "fastdsm/distributed/attention.py",
        "half_steps, False, backend, (rank, size),",
        "half_steps, False, backend, (0, 1),",
        (_CONTEXT,),
        "ranks that drop the same entries of their different heads",
    ),
    Change(
        "fastdsm/distributed/converged.py",
        "return divided(of_rows - image, problem.r), beta",
        "return divided(of_rows, problem.r), beta",
        (_ROWS,),
        "alpha of the implicit gradient without beta's part",
    ),
    Change(
        "fastdsm/distributed/gathered.py",
        'if over == "rows":\n            out.copy_(self._of.sum(out))',
        'if over == "":\n            out.copy_(self._of.sum(out))',
        (_CONTEXT,),
        "sums over queries of this process alone in the adjoint",
    ),
    Change(
        "fastdsm/_ops/streamed/gradient.py",
        "1 in (problem.queries, problem.key.shape[2])",
        "1 in (problem.query.shape[2], problem.key.shape[2])",
        (_CONTEXT,),
        "one query a process taken for one query in all: no gradient",
    ),
    Change(
        "fastdsm/_ops/shards.py",
        "gradients.append(wanted[-1] if apart or not isinstance(placement, Shard) else Partial())",
        "gradients.append(wanted[-1])",
        (_SHARDS,),
        "a replicated argument keeps a process's share of its gradient",
    ),
    Change(
        "fastdsm/_ops/sharded.py",
        "summed = [module.Partial() if apart else module.Replicate()]",
        "summed = [module.Replicate()]",
        (_SEQUENCE,),
        "mHC's parameters keep a process's share of their gradients",
    ),
    Change(
        "fastdsm/_ops/sharded.py",
        'getattr(module, "_replaced_functions", ())',
        "()",
        (_CONTEXT,),
        "torch's context_parallel goes unseen",
    ),
]
