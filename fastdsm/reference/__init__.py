"""The oracle: log-domain Sinkhorn, its attention and sigma2 in plain PyTorch, differentiated by autograd through every sweep.

Nothing here is fast. It is what the kernels and the PyTorch path are measured against: in float64 it is the truth, in
float32 it is the usual log-domain loop whose error the others must not exceed twice. Any dtype and device; float16 and
bfloat16 compute in float32. Symbols as in the README: S = logits / temperature, P = exp(S + f 1^T + 1 g^T).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops.marginals import lines_taking_part, marginals, valid_entries
from ..results import AttentionInfo, SinkhornInfo, SinkhornSpectrum, default_tol


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """log sum exp along ``dim``; 0 where every entry is -inf, so that an excluded line keeps a finite potential."""
    top = x.detach().amax(dim, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = (x - top).exp().sum(dim)
    return torch.where(total == 0, 0.0, total.where(total != 0, 1.0).log() + top.squeeze(dim))


def sinkhorn(
    logits: Tensor,
    *,
    n_iters: int = 20,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    tol: float | None = None,
    f0: Tensor | None = None,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    solver: str = "sinkhorn",
    grad: str | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """Sinkhorn projection as :func:`fastdsm.sinkhorn` defines it, one line of mathematics per line of code.

    ``solver="newton"`` is :func:`fixed_point`, which takes as many steps as it needs; ``grad="implicit"`` has its gradient.
    """
    col_marginal = _of_one_total(logits, row_marginal, col_marginal, mask)
    problem: dict[str, Any] = {"temperature": temperature, "first": first, "mask": mask}
    problem |= {"row_marginal": row_marginal, "col_marginal": col_marginal}
    if solver == "newton":
        return fixed_point(logits, tol=tol, return_info=return_info, **problem)
    if grad == "implicit":
        with torch.no_grad():
            plan, info = sinkhorn(logits, n_iters=n_iters, tol=tol, f0=f0, return_info=True, **problem)
        assert isinstance(info, SinkhornInfo)
        slopes = near_fixed_point(logits, info.f, info.g, **problem)
        plan, f, g = (x + (slope - slope.detach()) for x, slope in zip((plan, info.f, info.g), slopes, strict=True))
        return (plan, info._replace(f=f, g=g)) if return_info else plan
    plan, info = swept(logits, n_iters, tol, f0, **problem)
    return (plan, info) if return_info else plan


def swept(
    logits: Tensor,
    n_iters: int,
    tol: float | None = None,
    f0: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, SinkhornInfo]:
    """The sweeps to marginals as they are, which of two that are given may have totals of their own."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    valid = valid_entries(mask, logits, row_marginal, col_marginal) & (logits != -torch.inf)
    r, c = marginals(valid, row_marginal, col_marginal, dtype)
    tau = temperature[..., None, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    scaled = (logits.masked_fill(~valid, 0.0).to(dtype) / tau).masked_fill(~valid, -torch.inf)
    log_r, log_c = r.where(r != 0, 1.0).log(), c.where(c != 0, 1.0).log()

    def row_step(g: Tensor) -> Tensor:
        return torch.where(r != 0, log_r - _log_sum_exp(scaled + g.unsqueeze(-2), -1), 0.0)

    def col_step(f: Tensor) -> Tensor:
        return torch.where(c != 0, log_c - _log_sum_exp(scaled + f.unsqueeze(-1), -2), 0.0)

    def plan_of(f: Tensor, g: Tensor) -> Tensor:
        return (scaled + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()

    def residual_of(f: Tensor, g: Tensor) -> Tensor:
        dim, target = (-2, c) if first == "col" else (-1, r)
        error = plan_of(f, g).sum(dim) / target.where(target != 0, 1.0) - 1.0
        return torch.where(target != 0, error.abs(), 0.0).detach().amax(-1)

    start = (
        torch.zeros_like(r if first == "col" else c)
        if f0 is None or n_iters == 0
        else f0.to(dtype).expand_as(r if first == "col" else c)
    )
    start = torch.where((r if first == "col" else c) != 0, start, 0.0)
    f, g = (start, torch.zeros_like(c)) if first == "col" else (torch.zeros_like(r), start)
    if n_iters == 0:
        f, g = (row_step(g), g) if first == "col" else (f, col_step(f))
    sweeps = torch.zeros(logits.shape[:-2], dtype=torch.int32, device=logits.device)
    active = torch.ones_like(sweeps, dtype=torch.bool)
    for _ in range(n_iters):
        if first == "col":
            new_g = col_step(f)
            new_f = row_step(new_g)
        else:
            new_f = row_step(g)
            new_g = col_step(new_f)
        f, g = torch.where(active.unsqueeze(-1), new_f, f), torch.where(active.unsqueeze(-1), new_g, g)
        sweeps = sweeps + active
        if tol is not None:
            active = active & ~(residual_of(f, g) <= tol)
    poisoned = (valid & ~(logits < torch.inf)).flatten(-2).any(-1)[..., None, None]
    plan = plan_of(f, g).masked_fill(poisoned, torch.nan).to(logits.dtype)
    residual = residual_of(f, g).masked_fill(poisoned[..., 0, 0], torch.nan)
    converged = residual <= (default_tol(dtype) if tol is None else tol)
    return plan, SinkhornInfo(residual, converged, sweeps, f, g)


def _of_one_total(logits: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The columns' marginal scaled to the rows' total, where both are given."""
    if row is None or col is None:
        return col
    valid = valid_entries(mask, logits, row, col) & (logits != -torch.inf)
    total, own = ((x * y).sum(-1, keepdim=True) for x, y in ((row, valid.any(-1)), (col, valid.any(-2))))
    return col * torch.where(own > 0, total / own.where(own > 0, 1.0), 1.0)


def log_sinkhorn(logits: Tensor, *, temperature: float | Tensor = 1.0, **options: Any) -> Tensor:
    """log P of :func:`sinkhorn`'s plan, S + f + g, -inf where excluded; options as there."""
    row, col, mask = (options.get(name) for name in ("row_marginal", "col_marginal", "mask"))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    valid = valid_entries(mask, logits, row, col) & (logits != -torch.inf)
    _, info = sinkhorn(logits, temperature=temperature, return_info=True, **options)
    tau = temperature[..., None, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    S = logits.masked_fill(~valid, 0.0).to(dtype) / tau
    return (S + info.f.unsqueeze(-1) + info.g.unsqueeze(-2)).masked_fill(~valid, -torch.inf).to(logits.dtype)


_NEWTON_STEPS = 500
_GROUND, _RIDGE = 4.0, 16.0  # units of rounding: of a column sum, and per column of a Laplacian of unit diagonal
_SOFT = 2 / 3  # the chord method's ridge is this power of rounding: between parts all but cut off steps stay small


class _Equations:
    """P^T 1 = c in the column potential, the rows exact: what the sweeps converge to; for first="row" transposed."""

    def __init__(
        self,
        logits: Tensor,
        temperature: float | Tensor,
        first: str,
        row_marginal: Tensor | None,
        col_marginal: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        valid = valid_entries(mask, logits, row_marginal, col_marginal) & (logits != -torch.inf)
        self.poisoned = (valid & ~(logits < torch.inf)).flatten(-2).any(-1)
        r, c = marginals(valid, row_marginal, col_marginal, dtype)
        tau = temperature[..., None, None].to(dtype) if isinstance(temperature, Tensor) else temperature
        tame = logits.masked_fill(~valid | self.poisoned[..., None, None], 0.0)
        scaled = (tame.to(dtype) / tau).masked_fill(~valid, -torch.inf)
        self.S, self.r, self.c = (scaled, r, c) if first == "col" else (scaled.mT, c, r)
        total = self.c.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        self.aim = self.c * (self.r.sum(-1, keepdim=True) / total)

    def row_potential(self, g: Tensor) -> Tensor:
        log_r = self.r.where(self.r != 0, 1.0).log()
        return torch.where(self.r != 0, log_r - _log_sum_exp(self.S + g.unsqueeze(-2), -1), 0.0)

    def plan(self, g: Tensor) -> Tensor:
        return (self.S + self.row_potential(g).unsqueeze(-1) + g.unsqueeze(-2)).exp()

    def newton_step(self, g: Tensor) -> Tensor:
        """t d, d of least norm with (diag(P^T 1) - P^T diag(1/r) P) d = c - P^T 1; the matrix is a Laplacian.

        t = log(1 + s) / s, s the spread of d, for which the dual h must fall: along d its third derivative is at most s times
        its second (generalised self-concordance, Sun and Tran-Dinh 2019). Near the solution t is 1.
        """
        P = self.plan(g)
        d = (self.inverse(P, _RIDGE * g.shape[-1] * torch.finfo(g.dtype).eps) @ (self.aim - P.sum(-2)).unsqueeze(-1)).squeeze(
            -1
        )
        valid = self.c != 0
        d = torch.where(valid, d - d.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1), 0.0)
        spread = (d.amax(-1, keepdim=True) - d.amin(-1, keepdim=True)).clamp(min=torch.finfo(d.dtype).tiny)
        return d * (spread.log1p() / spread)

    def inverse(self, P: Tensor, ridge: float) -> Tensor:
        """An inverse of the Laplacian diag(P^T 1) - P^T diag(1/r) P on what sums to zero, by Cholesky factors.

        Scaled to a unit diagonal, the null vector's eigenvalue made 1. The ridge, rounding's size at least, keeps the factors
        real where zeros cut the columns into parts: within each the plan takes no notice of what a constant moves.
        """
        inverse_r = torch.where(self.r != 0, 1.0 / self.r.where(self.r != 0, 1.0), 0.0)
        weights = P.mT @ (inverse_r.unsqueeze(-1) * P)
        weights = weights - torch.diag_embed(weights.diagonal(dim1=-2, dim2=-1))
        info = torch.finfo(P.dtype)
        degree = weights.sum(-1) + _GROUND * info.eps * self.c
        scale = torch.where(degree > info.tiny**0.8, degree, torch.inf).rsqrt()
        q = (degree / degree.sum(-1, keepdim=True).clamp(min=info.tiny)).sqrt()
        diagonal = torch.full_like(degree, 1.0 + ridge)
        scales = scale.unsqueeze(-1) * scale.unsqueeze(-2)
        factor, _ = torch.linalg.cholesky_ex(torch.diag_embed(diagonal) - scales * weights + q.unsqueeze(-1) * q.unsqueeze(-2))
        return scales * torch.cholesky_inverse(factor)

    def residual(self, g: Tensor) -> Tensor:
        error = self.plan(g).sum(-2) / self.c.where(self.c != 0, 1.0) - 1.0
        return torch.where(self.c != 0, error.abs(), 0.0).amax(-1)


def fixed_point(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    tol: float | None = None,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """The projection that the sweeps converge to, by Newton's method on their dual, with its exact gradient.

    ``sweeps`` counts steps, the first column step included. Stops at ``tol``, default as for solver="newton", or after 500.
    Gradients: :func:`near_fixed_point`.
    """
    problem = (temperature, first, row_marginal, col_marginal, mask)
    with torch.no_grad():
        at = _Equations(logits, *problem)
        tol = default_tol(at.S.dtype) if tol is None else tol
        g = torch.where(at.c != 0, at.c.where(at.c != 0, 1.0).log() - _log_sum_exp(at.S, -2), 0.0)
        steps = torch.ones(logits.shape[:-2], dtype=torch.int32, device=logits.device)
        for _ in range(1, _NEWTON_STEPS):
            active = ~(at.residual(g) <= tol)
            if not bool(active.any()):
                break
            g = torch.where(active.unsqueeze(-1), g + at.newton_step(g), g)
            steps = steps + active
        f, residual = at.row_potential(g), at.residual(g).masked_fill(at.poisoned, torch.nan)
    f, g = (f, g) if first == "col" else (g, f)
    plan, f, g = near_fixed_point(logits, f, g, *problem)
    return (plan, SinkhornInfo(residual, residual <= tol, steps, f, g)) if return_info else plan


def near_fixed_point(
    logits: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plan and the potentials of the fixed point near f, g, as autograd sees them.

    One Newton step first, which no derivative sees, where it lowers the residual. Then the column sums that the plan has there
    are taken for those aimed at, so that three steps of the chord method, with the Laplacian as it is, move nothing. With
    logits or marginals the fixed point moves by some e, and such a step takes an error O(e^k) to O(e^(k+1)): derivatives up to
    the third are exact. At a plan that has not converged they are those of the projection to the marginals that it has:
    finite, as no inverse is differentiated. The potentials' values are those given; their derivative is the one of least norm.
    """
    at = _Equations(logits, temperature, first, row_marginal, col_marginal, mask)
    given = (g if first == "col" else f).detach().to(at.S.dtype)
    with torch.no_grad():
        start = torch.where(given.isfinite() & ~at.poisoned.unsqueeze(-1), given, 0.0)
        nearer = start + at.newton_step(start)
        start = torch.where((at.residual(nearer) < at.residual(start)).unsqueeze(-1), nearer, start)
        inverse = at.inverse(at.plan(start), torch.finfo(start.dtype).eps ** _SOFT)
    reached, potential = at.plan(start).sum(-2), start
    aim = at.aim + (reached - at.aim).detach()
    for _ in range(3):
        potential = potential + (inverse @ (aim - at.plan(potential).sum(-2)).unsqueeze(-1)).squeeze(-1)
    plan = at.plan(potential).masked_fill(at.poisoned[..., None, None], torch.nan).to(logits.dtype)
    of_rows = at.row_potential(potential)
    rows, cols = (x != 0 for x in (at.r, at.c))
    shift = (of_rows.where(rows, 0.0).sum(-1) - potential.where(cols, 0.0).sum(-1)) / (rows.sum(-1) + cols.sum(-1)).clamp(min=1)
    of_rows, potential = of_rows - shift.unsqueeze(-1), potential + shift.unsqueeze(-1)
    slopes = [torch.where(valid, x - x.detach(), 0.0) for x, valid in ((of_rows, rows), (potential, cols))]
    if first == "row":
        plan, slopes = plan.mT, slopes[::-1]
    f, g = (x.detach() + slope for x, slope in zip((f, g), slopes, strict=True))
    return plan, f, g


def sigma2(
    plan: Tensor,
    *,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Largest singular value of diag(r)^-1/2 P diag(c)^-1/2 with sqrt(r), sqrt(c) projected out, by a full SVD."""
    matrix = deflated_plan(plan, row_marginal, col_marginal, mask)
    broken = ~matrix.isfinite().flatten(-2).all(-1)
    norm = torch.linalg.matrix_norm(matrix.masked_fill(broken[..., None, None], 0.0), ord=2)
    return norm.masked_fill(broken, torch.nan)


def deflated_plan(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> Tensor:
    """:func:`deflated` with the default marginals of what the mask leaves."""
    dtype = torch.promote_types(plan.dtype, torch.float32)
    valid = valid_entries(mask, plan, row, col)
    return deflated(plan.masked_fill(~valid, 0.0).to(dtype), *marginals(valid, row, col, dtype))


def deflated(plan: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """M = (I - q q^T) N (I - p p^T), N = diag(r)^-1/2 P diag(c)^-1/2, q = sqrt(r / total), p = sqrt(c / total).

    ``plan`` (..., n, m), ``r`` (..., n) and ``c`` (..., m) in one dtype; excluded lines have marginal 0 and stay zero.
    """
    root_r, root_c = (torch.where(x != 0, x.where(x != 0, 1.0).sqrt(), 0.0) for x in (r, c))
    inv_r, inv_c = (torch.where(x != 0, 1.0 / x.where(x != 0, 1.0), 0.0) for x in (root_r, root_c))
    q = (root_r / root_r.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)).unsqueeze(-1)
    p = (root_c / root_c.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(c.dtype).tiny)).unsqueeze(-2)
    scaled = inv_r.unsqueeze(-1) * plan * inv_c.unsqueeze(-2)
    scaled = scaled - q * (q * scaled).sum(-2, keepdim=True)
    return scaled - (scaled * p).sum(-1, keepdim=True) * p


def sinkhorn_sigma2(logits: Tensor, **options: object) -> SinkhornSpectrum:
    """:func:`sinkhorn` and :func:`sigma2` of its plan; options as for :func:`sinkhorn`, without ``return_info``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # of the plan before it is rounded
    plan, info = sinkhorn(wide, return_info=True, **options)  # type: ignore[arg-type]
    row, col, mask = (options.get(key) for key in ("row_marginal", "col_marginal", "mask"))
    lines = lines_taking_part(logits, row, col, mask)  # type: ignore[arg-type]
    value = sigma2(plan, row_marginal=row, col_marginal=col, mask=lines)  # type: ignore[arg-type]
    return SinkhornSpectrum(plan.to(logits.dtype), value, info.residual, info.sweeps, info.f, info.g)


def attention_logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """scale query key^T + attn_mask (B, H, N, M), and which entries take part; float32, or float64 for float64."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = _unpadded(query, query_padding_mask).to(dtype), _unpadded(key, key_padding_mask).to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = scale * query @ key.mT
    valid = torch.ones_like(logits, dtype=torch.bool)
    if query_padding_mask is not None:
        valid = valid & ~query_padding_mask[:, None, :, None]
    if key_padding_mask is not None:
        valid = valid & ~key_padding_mask[:, None, None, :]
    if attn_mask is None:
        return logits, valid
    if attn_mask.dtype == torch.bool:
        return logits, valid & attn_mask
    taking_part = ~(attn_mask <= torch.finfo(attn_mask.dtype).min / 2)
    valid = valid & taking_part
    return logits + attn_mask.expand_as(logits).masked_fill(~valid, 0.0).to(dtype), valid


def _unpadded(x: Tensor, padding: Tensor | None) -> Tensor:
    """x (B, H, N, d) with zeros on the padded lines."""
    return x if padding is None else x.masked_fill(padding[:, None, :, None], 0.0)


def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    n_iters: int = 3,
    first: str = "col",
    tol: float | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, AttentionInfo]:
    """Sinkhorn attention as :func:`fastdsm.sinkhorn_attention` defines it, for (B, H, N, d), with every matrix stored."""
    if is_causal:
        raise ValueError("a causal plan does not exist: see fastdsm.sinkhorn_attention")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits, valid = attention_logits(query, key, attn_mask, scale, key_padding_mask, query_padding_mask)
    found = sinkhorn(logits, n_iters=n_iters, temperature=temperature, first=first, tol=tol, mask=valid, return_info=True)
    plan, info = found
    assert isinstance(plan, Tensor)
    value = _unpadded(value, key_padding_mask).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = torch.nn.functional.dropout(plan, dropout_p) @ value.to(plan.dtype)
    return (out.to(value.dtype), AttentionInfo(*info)) if return_info else out.to(value.dtype)


def sinkhorn_attention_sigma2(query: Tensor, key: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
    """sigma2 (B, H) of the plan of :func:`sinkhorn_attention`; options as there."""
    scale = options.pop("scale", None)
    paddings = (options.pop("key_padding_mask", None), options.pop("query_padding_mask", None))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits, valid = attention_logits(query, key, attn_mask, scale, *paddings)  # type: ignore[arg-type]
    return sinkhorn_sigma2(logits, mask=valid, **options).sigma2
