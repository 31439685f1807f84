"""Changes of what comes in at the doors: masks, padding, totals; and of few matrices, whose sweeps are kept."""

from ..change import Change

_DOOR, _FEW = "tests/api/test_nn_attention.py", "tests/ops/test_few_matrices.py"
_MASKS = "tests/api/test_attention_masks.py"

DOORS = [
    Change(
        "fastdsm/nn/attention.py",
        "return taken_out(of_key), of_key",
        "return None, of_key",
        (f"{_DOOR}::TestPadding",),
        "padded queries of a self-attention take part",
    ),
    Change(
        "fastdsm/nn/attention.py",
        "x = x.masked_fill(taken_out(padding).unsqueeze(-1), 0.0)",
        "x = x * 1.0",
        (f"{_DOOR}::TestPadding",),
        "what lies on padded lines reaches the gradients of the projections",
    ),
    Change(
        "fastdsm/nn/attention_masks.py",
        "expected = (lines, (batch * heads, *lines))",
        "expected = (lines, (batch * heads, *lines), (batch, *lines))",
        (f"{_DOOR}::TestRefused",),
        "a mask of each sentence is taken for one of each head",
    ),
    Change(
        "fastdsm/_ops/masks.py",
        "mask <= least_logit(mask.dtype)",
        "mask == -torch.inf",
        (f"{_MASKS}::test_one_rule_for_minus_infinity",),
        "finfo.min is a logit",
    ),
    Change(
        "fastdsm/_ops/attention_call.py",
        "paddings[k] = unmet if padding is None else padding | unmet",
        "paddings[k] = padding",
        (f"{_MASKS}::test_what_lies_under_a_mask_is_never_used",),
        "NaN on a line that a mask leaves without a partner",
    ),
    Change(
        "fastdsm/pytorch/few.py",
        "tape.insert(0, Part(",
        "tape.append(Part(",
        (f"{_FEW}::test_three_ways_in_one_batch",),
        "matrices on the tape of another way than theirs",
    ),
    Change(
        "fastdsm/pytorch/softmaxes.py",
        "for k in range(len(X) - 1, 0, -2):",
        "for k in range(len(X) - 1, 2, -2):",
        (f"{_FEW}::test_values_and_gradients",),
        "the adjoint of the first sweep but one is left out",
    ),
    Change(
        "fastdsm/pytorch/softmaxes.py",
        "RANGE = 32.0",
        "RANGE = 128.0",
        (f"{_FEW}::test_next_to_no_support",),
        "four times the range of a chain whose every step rounds",
    ),
    Change(
        "fastdsm/_ops/krylov.py",
        "torch.stack(diagonal).abs().amax(0)",
        "torch.stack(diagonal).amax(0)",
        (f"{_MASKS}::test_sigma2_of_uniform_plans",),
        "sigma2 of attention's uniform plans is NaN",
    ),
    Change(
        "fastdsm/pytorch/sweeps.py",
        "total = torch.maximum(chunk.r.sum(line), chunk.c.sum(line))",
        "total = chunk.r.sum(line)",
        ("tests/api/test_arguments.py::test_marginals_whose_totals_logits_part",),
        "factors overflow where a mask leaves one side more mass",
    ),
]
