"""Changes in the attention of other packages' models: masks, padding, what is refused, what is kept."""

from ..change import Change

_TESTS = "tests/integrations"
_MODELS, _PITFALLS = f"{_TESTS}/test_transformers.py", f"{_TESTS}/test_transformers_pitfalls.py"
_CONVERT, _TIMM = f"{_TESTS}/test_convert.py", f"{_TESTS}/test_timm.py"
_HF, _LINES = "fastdsm/integrations/transformers.py", "fastdsm/integrations/lines.py"

INTEGRATIONS = [
    Change(
        _HF,
        "hf.AttentionMaskInterface.register(name, _mask)",
        "pass",
        (f"{_MODELS}::test_sweeps",),
        "no mask under the name: padding is attended to",
    ),
    Change(
        _HF,
        "query_padding_mask=padding, **self.options,",
        "**self.options,",
        (f"{_MODELS}::test_sweeps",),
        "padded queries in the plan",
    ),
    Change(
        _HF,
        "or not _is_self_attention(module):",
        "or False:",
        (f"{_PITFALLS}::test_cross_attention", f"{_PITFALLS}::test_cross_attention_of_bert"),
        "padding of an encoder taken for that of a decoder",
    ),
    Change(
        _HF,
        "        return not decoder\n",
        "        return True\n",
        (f"{_PITFALLS}::test_cross_attention",),
        "the same where a flag alone tells",
    ),
    Change(
        _HF,
        'if "Cross" in kind or "EncDec" in kind:',
        "if False:",
        (f"{_PITFALLS}::test_cross_attention_of_bert",),
        "the same where a class's name alone tells",
    ),
    Change(
        _HF,
        "        if is_causal is None:\n            is_causal = _is_causal(module)",
        "        is_causal = _is_causal(module)",
        (f"{_PITFALLS}::test_causal_modules[clip]",),
        "causality by argument goes unseen",
    ),
    Change(
        _HF,
        "if x is not None and name not in _WITHOUT_EFFECT and name not in self.ignore:",
        'if x is not None and name == "softcap":',
        (f"{_PITFALLS}::test_arguments_are_not_swallowed",),
        "arguments that change the result are swallowed",
    ),
    Change(
        _HF,
        "mask, padding = masked(attention_mask, position_bias)",
        "mask, padding = masked(attention_mask)",
        (f"{_MODELS}::test_sweeps[t5-left]", f"{_MODELS}::test_without_sweeps[t5-sdpa]"),
        "position biases are dropped",
    ),
    Change(
        _HF,
        "query, key, value, mask, dropout, scale=scaling,",
        "query, key, value, mask, 0.0, scale=scaling,",
        (f"{_MODELS}::test_dropout",),
        "no dropout of the plan",
    ),
    Change(
        _HF,
        "query, key, value, mask, dropout, scale=scaling,",
        "query, key, value, mask, dropout,",
        (f"{_MODELS}::test_without_sweeps[t5-sdpa]",),
        "a model's own scale is dropped",
    ),
    Change(
        _LINES,
        "_OUT = -9000.0",
        "_OUT = -1e8",
        (f"{_PITFALLS}::test_masks_of_four_dimensions",),
        "a mask of -1e4 is a logit",
    ),
    Change(
        _LINES,
        "_OUT = -9000.0",
        "_OUT = -90.0",
        (f"{_PITFALLS}::test_a_floating_mask_is_also_a_bias", f"{_PITFALLS}::test_swin"),
        "Swin's -100 takes out",
    ),
    Change(
        _LINES,
        "~four.flatten(1, 2).any(1)",
        "~four[:, 0].any(1)",
        (f"{_PITFALLS}::test_one_mask_for_all",),
        "a key that the first head may not see is padding",
    ),
    Change(
        "fastdsm/integrations/timm.py",
        "mask, query_padding_mask=padding,",
        "mask,",
        (f"{_TIMM}::test_padding",),
        "padded queries in timm's plan",
    ),
    Change(
        "fastdsm/integrations/timm.py",
        "    attention.fused_attn = True",
        "    pass",
        (f"{_TIMM}::test_without_fused_attention",),
        "softmax that is written out stays",
    ),
    Change(
        "fastdsm/integrations/convert.py",
        "encoder.use_nested_tensor = False",
        "pass",
        (f"{_CONVERT}::test_encoder_without_sweeps",),
        "nested tensors reach a module that refuses them",
    ),
    Change(
        "fastdsm/integrations/convert.py",
        '"memory": False,',
        '"memory": True,',
        (f"{_CONVERT}::test_cross_attention_of_equal_lengths", f"{_CONVERT}::test_transformer"),
        "padding of a memory taken for that of the decoder",
    ),
    Change(
        "fastdsm/integrations/multihead.py",
        "return made.train(attention.training)",
        "return made",
        (f"{_CONVERT}::test_what_is_kept",),
        "a converted module forgets that it was in evaluation",
    ),
]
