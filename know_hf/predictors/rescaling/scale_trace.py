"""Follow the scale of every activation through one forward pass.

A model is run once on a small batch. Each operation that PyTorch dispatches (aten) maps the exponents of its inputs to
that of its output and may restrict them: a sum needs equal exponents, a matrix product adds them, ReLU keeps any, a
softmax admits none but 0. Nothing depends on the architecture, its names or its modules, and every control flow works.
Operations without a rule admit no scale: at worst a symmetry is not listed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .fused_projections import FusedProjections, TensorParts
from .scale_equations import Form, ScaleEquations, add

Rule = Callable[..., Form | list[Form]]
LARGEST_EPSILON = 1e-3  # a smaller summand counts as the epsilon of a normalisation

# operations f with f(s x) = s f(x) for s > 0; several inputs need the same scale. So are all views.
_HOMOGENEOUS = (
    "relu leaky_relu neg abs mean sum amax amin max min maximum minimum median std linalg_vector_norm norm cumsum"
    " cat stack clone _to_copy copy lift_fresh _unsafe_view reshape index index_select index_add index_put index_copy"
    " gather scatter_add slice_scatter select_scatter masked_scatter repeat repeat_interleave roll flip topk sort tril"
    " triu max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d"
    " _adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_linear1d"
    " upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa im2col col2im"
    " pixel_shuffle reflection_pad1d reflection_pad2d replication_pad2d"
).split()
_ZEROS = "zeros zeros_like new_zeros empty empty_like new_empty empty_strided new_empty_strided".split()
_POWERS = {"rsqrt": Fraction(-1, 2), "sqrt": Fraction(1, 2), "reciprocal": Fraction(-1), "var": Fraction(2)}


class ScaleTrace(TorchDispatchMode):
    """Collects the scale equations of the operations that run in its context.

    `names` has the name of every tensor that may be scaled, by identity (`id`). `forms` gets the exponent of every
    tensor that was used, by name, in the order of use, and `epsilons` the exponents of what an epsilon was added to:
    exact only where they are 0.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.equations = ScaleEquations()
        self.forms: dict[str, Form] = {}
        self.epsilons: list[Form] = []
        self._names = names
        self._fused = FusedProjections(self.equations, names)
        self._of_tensor: Any = WeakTensorKeyDictionary()
        self._rules: dict[str, Rule] = {
            **dict.fromkeys(_HOMOGENEOUS, self._same),
            **dict.fromkeys(_ZEROS, lambda *_, **__: self.equations.variable()),
            **dict.fromkeys(("add", "sub", "rsub"), self._with_constants),
            **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), self._comparison),
            "where": partial(self._with_constants, first=1),
            "scatter": partial(self._with_constants, first=3),
            **dict.fromkeys(("clamp", "clamp_min", "threshold", "masked_fill", "constant_pad_nd"), self._first_only),
            **dict.fromkeys(("mul", "mm", "bmm", "mv", "dot"), self._product),
            **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), self._sum_of_product),
            **dict.fromkeys(("convolution", "mkldnn_convolution"), self._convolution),
            **dict.fromkeys(("full", "full_like", "new_full"), self._full),
            **{name: partial(self._power, power=power) for name, power in _POWERS.items()},
            **dict.fromkeys(("argmax", "argmin", "argsort", "isnan", "isinf"), lambda *_, **__: {}),
            "div": self._quotient,
            "embedding": lambda _, weight, *__, **___: self.form(weight),
            "pow": self._to_the_power,
            "var_mean": lambda _, x, *__, **___: [add({}, self.form(x), 2), self.form(x)],
            "_prelu_kernel": self._prelu,
        }
        self._families: dict[str, Rule] = {
            "batch_norm": self._batch_norm,
            **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), self._norm),
            "scaled_dot_product": self._attention,
        }

    def form(self, tensor: torch.Tensor) -> Form:
        """Return the exponent of a tensor; 0 of constants."""
        if (name := self._names.get(id(tensor))) is not None:
            if name not in self.forms:
                self.forms[name] = self.equations.variable()
            return self.forms[name]
        return self._of_tensor.get(tensor, {})

    def require_unscaled(self, value: Any) -> None:
        """Require exponent 0 of all floating-point tensors in nested lists and dicts."""
        for tensor in floating_tensors(value):
            self.equations.require_zero(self.form(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        schema = func._schema  # noqa: SLF001 - has no public name
        rule = self._rule(func, name.rstrip("_") if schema.is_mutable else name)
        if rule is None:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
            rule = self._unscaled
        before = [(tensor, self.form(tensor)) for tensor in _written(schema, args)]
        output = func(*args, **kwargs)
        forms = rule(output, *args, **kwargs)
        first = self.form(args[0]) if args and isinstance(args[0], torch.Tensor) else {}
        forms = self._fused.watch(func, args, kwargs, output, self.forms, first) or forms
        outputs = list(floating_tensors(output))
        for tensor, form in zip(outputs, forms if isinstance(forms, list) else [forms] * len(outputs), strict=False):
            for written, old in before:
                if written is tensor:  # views of it may exist: its scale must not change
                    self.equations.require_equal(old, form)
            self._of_tensor[tensor] = form
        return output

    def parts(self) -> dict[str, TensorParts]:
        """Return the tensors of which parts scale apart, by name; to be called after the last operation."""
        return self._fused.parts(self.forms)

    def _rule(self, func: Any, name: str) -> Rule | None:
        if func.is_view:
            return self._same
        parts = (rule for part, rule in self._families.items() if part in name and "backward" not in name)
        return self._rules.get(name) or next(parts, None)

    def _same(self, output: Any, *args: Any, **kwargs: Any) -> Form:
        """All inputs have one scale, which is that of the output."""
        tensors = [tensor for tensor in floating_tensors((args, kwargs)) if tensor.numel()]
        result = self.form(tensors[0]) if tensors else {}
        for tensor in tensors[1:]:
            self.equations.require_equal(self.form(tensor), result)
        if not floating_tensors(output):  # cast to integers
            self.equations.require_zero(result)
        return result

    def _with_constants(self, output: Any, *args: Any, first: int = 0, **kwargs: Any) -> Form:
        """As [`_same`]; arguments from `first` on may be numbers."""
        result = self._same(output, *args)
        self._constants(result, [value for value in args[first:] if not isinstance(value, torch.Tensor)])
        return result

    def _comparison(self, output: Any, x: torch.Tensor, y: Any) -> Form:
        other = self.form(y) if isinstance(y, torch.Tensor) else {}
        if isinstance(y, torch.Tensor) or y:  # any scale keeps the sign
            self.equations.require_equal(self.form(x), other)
        return {}

    def _first_only(self, output: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Form:
        """The other inputs are numbers, or masks and shapes, which are not floating-point numbers."""
        self._constants(self.form(x), [*args, *kwargs.values()])
        return self.form(x)

    def _constants(self, form: Form, values: Sequence[Any]) -> None:
        """Constants beside a tensor admit no scale, unless they are 0, infinite or an epsilon."""
        for value in values:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = float(value) if value.numel() == 1 and not self.form(value) else math.nan
            if not isinstance(value, int | float) or not value or math.isinf(value):
                continue
            if 0 < abs(value) <= LARGEST_EPSILON:
                self.epsilons.append(form)
            else:
                self.equations.require_zero(form)

    def _product(self, output: Any, *args: Any, **kwargs: Any) -> Form:
        total: Form = {}
        for tensor in floating_tensors(args[:2]):
            total = add(total, self.form(tensor))
        return total

    def _unscaled(self, output: Any, *args: Any, **kwargs: Any) -> Form:
        self.require_unscaled((args, kwargs))
        return {}

    def _norm(self, output: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> list[Form]:
        """LayerNorm, GroupNorm, RMSNorm: any scale of the input; that of scale and shift goes on."""
        self.epsilons.append(self.form(x))
        affine = list(floating_tensors((args, kwargs)))
        return [self._same(output, *affine), {}, {}]

    def _batch_norm(
        self,
        output: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor | None,
        variance: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> list[Form]:
        scale = self.form(x)
        self.epsilons.append(scale)
        affine = self._same(output, *floating_tensors((weight, bias)))
        if mean is not None and variance is not None:
            self.equations.require_equal(self.form(mean), scale)
            self.equations.require_equal(self.form(variance), add({}, scale, 2))
        return [affine, {}, {}, {}]

    def _attention(self, output: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> list[Form]:
        self.equations.require_zero(add(self.form(query), self.form(key)))
        self.require_unscaled((args, kwargs))
        return [self.form(value), {}, {}, {}]

    def _quotient(self, output: Any, x: Any, y: Any, *_: Any, **kwargs: Any) -> Form:
        if kwargs.get("rounding_mode") is not None:
            return self._unscaled(output, x, y)
        above = self.form(x) if isinstance(x, torch.Tensor) else {}
        return add(above, self.form(y), -1) if isinstance(y, torch.Tensor) else above

    def _power(self, output: Any, x: torch.Tensor, *_: Any, power: Fraction, **__: Any) -> Form:
        return add({}, self.form(x), power)

    def _to_the_power(self, output: Any, x: Any, exponent: Any) -> Form:
        if isinstance(exponent, torch.Tensor) or not isinstance(x, torch.Tensor):
            return self._unscaled(output, x, exponent)
        return self._power(output, x, power=Fraction(exponent))

    def _sum_of_product(self, output: Any, bias: Any, x: Any, y: Any, **kwargs: Any) -> Form:
        result = self._product(output, x, y)
        if kwargs.get("beta", 1):
            self.equations.require_equal(self.form(bias), result)
        return result

    def _convolution(self, output: Any, x: Any, weight: Any, bias: Any = None, *_: Any, **__: Any) -> Form:
        return self._product(output, x, weight) if bias is None else self._sum_of_product(output, bias, x, weight)

    def _prelu(self, output: Any, x: torch.Tensor, slope: torch.Tensor) -> Form:
        self.equations.require_zero(self.form(slope))
        return self.form(x)

    def _full(self, output: Any, shape: Any, value: Any, *_: Any, **__: Any) -> Form:
        return {} if value else self.equations.variable()


def floating_tensors(value: Any) -> list[torch.Tensor]:
    """List the floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in floating_tensors(item)] if isinstance(value, tuple | list) else []


def _written(schema: Any, args: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors that an operation changes in place."""
    arguments = zip(schema.arguments, args, strict=False)
    return [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
