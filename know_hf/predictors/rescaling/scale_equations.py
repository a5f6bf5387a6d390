"""Linear equations between exponents, solved as they come.

Every tensor of a model gets an exponent e: it is multiplied by f**e. What a function does to its inputs gives linear
equations between exponents without a constant term, so the exponents that keep the outputs form a linear space.
"""

from fractions import Fraction

Form = dict[int, Fraction]  # coefficient of each variable


class ScaleEquations:
    """A system of homogeneous linear equations in variables that are numbered in the order of their creation.

    Each equation is solved for its latest variable. What is left free are the earliest variables: the weights of
    earlier layers are free, and later layers make up for them.
    """

    def __init__(self) -> None:
        self._solved: dict[int, Form] = {}
        self._count = 0

    def variable(self) -> Form:
        """Create a variable."""
        self._count += 1
        return {self._count - 1: Fraction(1)}

    def reduced(self, form: Form) -> Form:
        """Express a form in the free variables."""
        result = {variable: coefficient for variable, coefficient in form.items() if coefficient}
        while eliminated := result.keys() & self._solved.keys():
            variable = max(eliminated)
            result = add(result, self._solved[variable], result.pop(variable))
        return result

    def require_zero(self, form: Form) -> None:
        """Add the equation `form = 0`."""
        form = self.reduced(form)
        if form:
            latest = max(form)
            coefficient = form.pop(latest)
            self._solved[latest] = add({}, form, -1 / coefficient)

    def require_equal(self, one: Form, other: Form) -> None:
        """Add the equation `one = other`."""
        self.require_zero(add(one, other, Fraction(-1)))


def add(one: Form, other: Form, factor: Fraction | int = 1) -> Form:
    """Return `one + factor * other`."""
    total = dict(one)
    for variable, coefficient in other.items():
        total[variable] = total.get(variable, Fraction(0)) + factor * coefficient
    return {variable: coefficient for variable, coefficient in total.items() if coefficient}
