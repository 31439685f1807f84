"""Hugging Face transformers: Sinkhorn attention as an ``attn_implementation``.

    from fastdsm.integrations import transformers as sinkhorn
    sinkhorn.register()
    model = AutoModel.from_pretrained(name, attn_implementation="fastdsm_sinkhorn")
    print(sinkhorn.report(model))

transformers keeps two registries under one name, of attention functions and of the masks that they are given; a name that is
in the first alone gets no mask, and padding would be attended to. Written for transformers 5.24 (5.20 or newer).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import arguments
from ..attention import sinkhorn_attention
from .lines import check_queries, masked
from .modules import attention_modules, mentions
from .report import Entry, Report

try:
    import transformers as hf
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        f"fastdsm.integrations.transformers needs transformers 5.20 or newer: pip install 'transformers>=5.20' ({error})"
    ) from error

# Keyword arguments which models hand down to every attention and which do not change it.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "labels", "num_items_in_batch",
        "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "token_type_ids", "use_cache",
    }
)  # fmt: skip
# Parameters of a forward that do not bring the lines of another sequence.
_NO_LINES = re.compile("mask|position|past|cache|output_|rotary|freq|bias|seqlen|_idx|height|width|deterministic|scaling|layer")


@dataclass(frozen=True, eq=False)
class _Attention:
    """What is registered: transformers' attention interface, (B, H, N, d) to (B, N, H, e) and, on request, the plan."""

    name: str
    options: dict[str, Any]
    causal: str
    ignore: frozenset[str]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        sliding_window: int | None = None,
        output_attentions: bool | None = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kind = type(module).__name__
        self._check_others(module, others)
        if is_causal is None:
            is_causal = _is_causal(module)
        if is_causal:
            if self.causal == "error":
                raise ValueError(
                    f"{kind} is causal, and a lower-triangular doubly-stochastic matrix is the identity: it has no plan for "
                    f'attn_implementation="{self.name}"; register(..., causal="own") leaves such modules their softmax'
                )
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, True, position_bias,
                sliding_window=sliding_window, output_attentions=output_attentions, **others,
            )  # fmt: skip
        N, M, n_iters = query.shape[2], key.shape[2], self.options["n_iters"]
        check_queries(N, M, n_iters, kind, "generation token by token, for one, is for another attn_implementation")
        if attention_mask is None and sliding_window is not None and sliding_window + 1 < M:
            raise ValueError(f"{kind} has a sliding window of {sliding_window} over {M} keys and no mask that holds it")
        mask, padding = masked(attention_mask, position_bias)
        if n_iters == 0 or N != M or padding is None or not _is_self_attention(module):
            padding = None
        if query.shape[0] == 1 < key.shape[0]:  # learned queries, one set for the batch
            query = query.expand(key.shape[0], -1, -1, -1)
        width = value.shape[-1]
        if output_attentions:  # the plan is what attention makes of the identity; beside the values, dropped out as they are
            identity = torch.eye(M, dtype=value.dtype, device=value.device)
            value = torch.cat([value, identity.expand(*value.shape[:2], M, M)], -1)
        out = sinkhorn_attention(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
            query_padding_mask=padding, **self.options,
        )  # fmt: skip
        plan = out[..., width:] if output_attentions else None
        return out[..., :width].transpose(1, 2).contiguous(), plan

    def _check_others(self, module: nn.Module, others: dict[str, Any]) -> None:
        """Nothing is swallowed that might change the result."""
        kind = type(module).__name__
        for name, x in others.items():
            if x is not None and name not in _WITHOUT_EFFECT and name not in self.ignore:
                raise ValueError(
                    f'{kind} calls its attention with {name}, which attn_implementation="{self.name}" does not know; '
                    f'if it does not change attention, register(..., ignore=["{name}"]) passes over it'
                )
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f'{kind} has attention sinks, keys that no query stands beside: "{self.name}" has no plan for it')


def register(
    name: str = "fastdsm_sinkhorn",
    n_iters: int = 3,
    temperature: float = 1.0,
    first: str = "col",
    causal: str = "error",
    *,
    tol: float | None = None,
    backend: str = "auto",
    ignore: Iterable[str] = (),
) -> None:
    """Make ``attn_implementation=name`` Sinkhorn attention, in all of transformers; again under a name, it replaces the first.

    Then ``from_pretrained(..., attn_implementation=name)`` or ``model.set_attn_implementation(name)``. The name is not saved in
    config.json: a saved model loads with softmax unless it is given again. Swapping the plans of a trained model changes what
    it computes. :func:`report` tells which modules of a model take part.

    Args:
        name: not one of transformers' own, without "flash", "sdpa", "flex_attention", "paged|" and "/", which mean something
            there. Several names may be registered, with other options each.
        n_iters, temperature, first, tol, backend: as for :func:`fastdsm.sinkhorn_attention`; n_iters=0 is softmax, on one side.
        causal: what a module does that attends causally (by the argument is_causal, or else its attribute): "error", or "own",
            it keeps transformers' sdpa attention, as a decoder beside an encoder should.
        ignore: names of further keyword arguments which models hand to their attention and which may be passed over.

    What a plan is of:
        - Padding of keys is padding of queries in self-attention, so that a padded batch is its sentences one by one: a key
          that the mask takes from every query and head takes its query out, too, and its output is 0. A mask with 4 dimensions
          is read in the same way. Floating masks take out at -9000 and below, whatever their dtype.
        - In cross attention every query is of the plan, as masks do not tell which are padding: padded queries, unlike padded
          keys, move the others. So do queries of later positions in a decoder; one query alone is an error.
        - ``output_attentions=True`` in the call gives the plans (O(N M) memory); causal modules have none.
        - Key and value heads may be fewer than the query's; dropout is of the plan; gradients are
          :func:`fastdsm.sinkhorn_attention`'s, in position biases and floating masks as well.

    Raises:
        TypeError, ValueError: arguments out of range. In a model's forward: causal modules under causal="error"; keyword
            arguments that are not known (softcap, s_aux, indices, cu_seq_lens_q, ...) and not None; attention sinks; a sliding
            window without a mask; a module whose class does not tell whether it is causal, or, where it is given padding
            and as many keys as queries, whether these are one sequence: the message names the attribute to set.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a string that is not empty, got {name!r}")
    before = hf.AttentionInterface._global_mapping.get(name)
    if name == "eager" or (before is not None and not isinstance(before, _Attention)):
        raise ValueError(f"name must not be that of another attention, got {name!r}")
    for part in ("flash", "sdpa", "flex_attention", "paged|", "/"):
        if part in name:
            raise ValueError(f"name must not contain {part!r}, by which transformers knows another attention, got {name!r}")
    arguments.check_choice(causal, "causal", ("error", "own"))
    arguments.check_choice(first, "first", ("col", "row"))
    arguments.check_temperature(temperature)
    arguments.check_tol(tol)
    options = {"n_iters": arguments.count_of(n_iters, "n_iters"), "temperature": float(temperature), "first": first}
    attention = _Attention(name, {**options, "tol": tol, "backend": backend}, causal, frozenset(ignore))
    hf.AttentionInterface.register(name, attention)
    hf.AttentionMaskInterface.register(name, _mask)


def report(model: nn.Module) -> Report:
    """Which attention modules of a model are Sinkhorn's by its ``attn_implementation``, as far as classes and attributes tell.

    ``left`` are those that are causal or do not say so, whose configuration names another implementation, and those which ask
    for none: MPNet's and DeBERTa's, on which setting it has no effect, and nn.MultiheadAttention, which
    :func:`fastdsm.integrations.convert` may replace. An argument is_causal is not seen: CLIP's text model passes one.
    """
    found = Report()
    for path, module in attention_modules(model):
        attention = _implementation(module)
        if not mentions(type(module), "ALL_ATTENTION_FUNCTIONS"):
            why = "does not ask for an attention implementation"
        elif not isinstance(attention, _Attention):
            why = f"attn_implementation is {attention!r}"
        elif getattr(module, "is_causal", None) is None:
            why = "does not say whether it is causal, will be an error"
        elif module.is_causal:
            why = "causal, keeps its own" if attention.causal == "own" else "causal, will be an error"
        else:
            found.changed.append(Entry(path, type(module).__name__, f'attends by "{attention.name}"'))
            continue
        found.left.append(Entry(path, type(module).__name__, why))
    return found


def _implementation(module: nn.Module) -> Any:
    """What a module's configuration asks for: what is registered here, or the name of another."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    attention = hf.AttentionInterface._global_mapping.get(name)
    return attention if isinstance(attention, _Attention) else name


def _mask(*args: Any, allow_is_causal_skip: bool = True, **options: Any) -> Tensor | None:
    """True where an entry takes part, (B, 1, N, M), or None where all do; a causal one is always written out."""
    mask: Tensor | None = sdpa_mask(*args, allow_is_causal_skip=False, **options)
    return mask


def _is_causal(module: nn.Module) -> bool:
    causal = getattr(module, "is_causal", None)
    if causal is None:
        kind = type(module).__name__
        raise ValueError(
            f"{kind} does not say whether it is causal, which sdpa takes for yes and eager attention for no; where it is not: "
            f"{kind}.is_causal = False"
        )
    return bool(causal)


def _is_self_attention(module: nn.Module) -> bool:
    """Whether queries and keys are one sequence: by the module's word, its class's name, or as no other sequence comes in."""
    kind = type(module).__name__
    cross = getattr(module, "is_cross_attention", None)
    if isinstance(cross, bool):
        return not cross
    if "Cross" in kind or "EncDec" in kind:
        return False
    if _one_sequence(type(module)):
        return True
    decoder = getattr(module, "is_decoder", None)
    if isinstance(decoder, bool):  # BART's and T5's kin: attention of a decoder that is not causal looks at the encoder
        return not decoder
    if "SelfAttention" in kind:
        return True
    raise ValueError(
        f"{kind} can attend to its own sequence or to another, and with padding and as many keys as queries the two plans "
        "differ; say which by an attribute of the module: is_cross_attention = True or False"
    )


@torch.compiler.assume_constant_result  # Dynamo traces what is under functools.cache, and warns of it
def _one_sequence(kind: type[nn.Module]) -> bool:
    """Whether a class's forward takes the lines of one sequence alone."""
    known: Any = kind
    return _takes_one(known)


@functools.cache
def _takes_one(kind: Any) -> bool:
    named = list(inspect.signature(kind.forward).parameters.values())[2:]
    return all(_NO_LINES.search(x.name) for x in named if x.kind is not inspect.Parameter.VAR_KEYWORD)
