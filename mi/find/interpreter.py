"""An abstract interpreter for jaxprs that records products of values that depend on data.

No array is computed. The interpreter visits equations in order and enters nested jaxprs. It
revisits the body of a loop until its carry stops changing. `mi.find.rules` defines the result of
each equation.
"""

from collections.abc import Callable, Iterable

from jax.extend import core

from mi.find.primitives import get_shape, open_jaxpr
from mi.find.records import Equation, Scope
from mi.find.trace import Trace
from mi.find.values import Value


class Interpreter(Trace):
    """An abstract interpreter for jaxprs.

    Attributes:
      contents: the content of each reference's mutable array, by reference id.
    """

    def __init__(
        self, num_streams: int, interpret: Callable[['Interpreter', Equation], list[Value]]
    ):
        """Initialize the interpreter.

        Args:
          num_streams: number of the function's streams.
          interpret: function that returns the results of an equation. It is always
            `mi.find.rules.interpret`, passed as an argument because that module imports this one.
        """
        super().__init__(num_streams)
        self.contents: dict[int, Value] = {}
        self._interpret = interpret
        self._live_equations: dict[core.Jaxpr, list[core.JaxprEqn]] = {}

    def run(
        self,
        jaxpr: core.ClosedJaxpr | core.Jaxpr,
        args: Iterable[Value],
        scope: Scope,
        consts: Iterable[Value] | None = None,
    ) -> list[Value]:
        """Return the results of a jaxpr, whose constants by default do not depend on data."""
        jaxpr = open_jaxpr(jaxpr)
        if consts is None:
            consts = [self.make_constant(get_shape(var)) for var in jaxpr.constvars]
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: core.Var | core.Literal) -> Value:
            if isinstance(atom, core.Literal):
                shape = get_shape(atom)
                return self.make_constant(shape, is_literal=not shape)
            return env[atom]

        for eqn in self._list_live(jaxpr):
            inputs = [read(atom) for atom in eqn.invars]
            equation = Equation(eqn, inputs, scope, [get_shape(var) for var in eqn.outvars])
            results = self._interpret(self, equation)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _list_live(self, jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
        """List the equations that a result depends on, or that have side effects."""
        if jaxpr not in self._live_equations:
            needed = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
            live = []
            for eqn in reversed(jaxpr.eqns):
                if eqn.effects or not needed.isdisjoint(eqn.outvars):
                    live.append(eqn)
                    needed |= {var for var in eqn.invars if not isinstance(var, core.Literal)}
            self._live_equations[jaxpr] = live[::-1]
        return self._live_equations[jaxpr]
