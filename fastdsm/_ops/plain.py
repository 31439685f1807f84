"""Where a call may go past torch's dispatcher: tensors that nothing wraps, in a thread where nobody listens.

Plain is what is plain in a thread of its own, whose modes nobody has set: tensors made there, in and out of inference mode, and
the dispatch keys that such a thread includes. That leaves out subclasses, functorch's and vmap's wrappers, negative and zero
tensors, and dispatch modes, tracing, functionalisation. A torch-function mode, a dual level of forward-mode derivatives, a
compiler at work and a profiler, which is to see the operators, are asked for by name.

What this takes of torch's private calls stands here alone. Where a version of torch lacks one of them no thread is plain, and
every call goes by its operator.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_C: Any = torch._C
_KINDS = (Tensor, nn.Parameter)
_SIMPLE = frozenset((int, str, float, bool, type(None)))
_THREADS: set[int] = set()  # what plain threads include
_TENSORS: set[int] = set()  # keys of plain tensors
_LEARNT: set[str] = set()  # device types whose keys these are


def _learn(device: torch.device) -> None:
    """Make plain tensors on ``device``, in a thread that no mode reaches, and keep what their keys are for all of its type."""

    def look() -> None:
        for mode in (False, True):
            with torch.inference_mode(mode):
                _THREADS.add(_C._dispatch_tls_local_include_set().raw_repr())
                made = torch.empty(0, device=device)
                _TENSORS.update(_C._dispatch_keys(x).raw_repr() for x in (made, nn.Parameter(made, requires_grad=not mode)))

    with ThreadPoolExecutor(1) as alone:
        alone.submit(look).result()
    _LEARNT.add(device.type)


def thread_is_plain() -> bool:
    """Whether an operator's implementation may be called without the operator."""
    return (
        not torch.compiler.is_compiling()
        and _C._dispatch_tls_local_include_set().raw_repr() in _THREADS
        and not _C._is_torch_function_mode_enabled()
        and forward_ad._current_level < 0
        and not _C._autograd._profiler_enabled()
    )


def has_tangents(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a forward-mode derivative may be asked for: inside functorch or a compiler, who wrap tangents, at any level."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling() or _C._are_functorch_transforms_active():
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_plain(x: Tensor) -> bool:
    """Whether nothing wraps a tensor."""
    if type(x) not in _KINDS:
        return False
    keys = _C._dispatch_keys(x).raw_repr()
    if keys not in _TENSORS and x.device.type == "cuda" and "cuda" not in _LEARNT:
        _learn(x.device)
    return keys in _TENSORS


def forms_of(operands: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that a launch may depend on but the pointers: shapes, strides, dtypes, devices, alignments to 16 bytes.

    operands: tensors, None, and numbers, of which the kind alone is taken. None where a tensor is not plain.
    """
    forms: list[Any] = []
    for x in operands:
        if x is None:
            forms.append(None)
        elif type(x) in _KINDS and (_C._dispatch_keys(x).raw_repr() in _TENSORS or is_plain(x)):
            forms += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
        elif type(x) is float or type(x) is int:
            forms.append(type(x))
        else:
            return None
    return tuple(forms)


def key_of(operands: Sequence[Any], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What decides how a call goes: forms of its operands, and options with their types. None: not plain."""
    forms = forms_of(operands) if thread_is_plain() else None
    # True and 1.0 are equal to 1, and are other arguments.
    return None if forms is None else (forms, options, tuple(map(type, options)))


class Kept(dict[Any, Any]):
    """Decisions by key; when there are too many of them, all are made again."""

    LIMIT = 1024
    tables: ClassVar[list[Kept]] = []

    def __init__(self) -> None:
        super().__init__()
        self.tables.append(self)

    @classmethod
    def forget(cls) -> None:
        """Make every decision anew: for who changes how kernels are launched."""
        for table in cls.tables:
            table.clear()

    def keep(self, key: Hashable, decision: Any) -> Any:
        """``decision``, kept."""
        if len(self) >= self.LIMIT:
            self.clear()
        self[key] = decision
        return decision


class KeptCalls:
    """Public calls, whose arguments are looked at once for each form of their tensors and each set of options.

    No dictionary itself: torch.compile, which has nothing kept, would look at all that is in one.

    look: of (tensors, *options), whose errors are the call's; to be called with tensors of that form, and whether they and the
    thread are plain.
    """

    def __init__(self, look: Callable[..., Callable[[tuple[Any, ...], bool], Any]]) -> None:
        self.look = look
        self.kept = Kept()

    def __call__(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
        """The call's results."""
        key = key_of(tensors, options)
        if key is None:
            return self.look(tensors, *options)(tensors, False)
        try:
            call = self.kept.get(key)
        except TypeError:  # an option that nothing can be kept under; what is wrong with it ``look`` says
            call = None
        if call is None:
            call = self.look(tensors, *options)
            if _SIMPLE.issuperset(key[2]):
                self.kept.keep(key, call)
        return call(tensors, True)


try:
    _learn(torch.device("cpu"))
    thread_is_plain()
except AttributeError:  # pragma: no cover - a version of torch that lacks one of the above

    def thread_is_plain() -> bool:
        """Never: this version of torch does not say."""
        return False
