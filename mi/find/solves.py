"""Rules for linear solves: A⁻¹ b is a product if A and b both depend on data."""

from mi.find.interpreter import Interpreter
from mi.find.motifs import Contraction
from mi.find.records import Equation
from mi.find.trace import Trace
from mi.find.values import Value, add_degrees, blend, unbound_degrees


def solve_triangular(trace: Trace, equation: Equation) -> Value:
    """Return A⁻¹ B for a triangular A."""
    matrix, target = equation.inputs
    inverse = matrix._replace(degrees=unbound_degrees([matrix]), linear=())
    value = blend(equation.inputs, equation.shape)._replace(degrees=add_degrees(inverse, target))
    if not (matrix.streams and target.streams):
        return trace.identify(value)
    num_axes = len(equation.shape)
    batch = tuple(range(num_axes - 2))
    contraction = Contraction((num_axes - 1,), (num_axes - 2,), batch, batch)
    return trace.record_product(equation._replace(inputs=[inverse, target]), value, contraction)


def solve_by_function(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Return A⁻¹ b for a custom_linear_solve, which is one product whatever its solver does."""
    lengths = equation.params['const_lengths']
    inputs = equation.inputs
    consts, targets = inputs[: lengths.matvec], inputs[sum(lengths) :]
    start = lengths.matvec + lengths.vecmat
    solver_consts = inputs[start : start + lengths.solve]

    # The FLOPs are those of the solver.
    scope = equation.enter()
    start_flops = interpreter.flops
    solver_scope = scope._replace(is_recording=False)
    interpreter.run(equation.params['jaxprs'].solve, [*solver_consts, *targets], solver_scope)
    flops = (interpreter.flops - start_flops) // (scope.times or 1)

    # The product.
    matrix = interpreter.identify(blend(consts, consts[0].shape)) if consts else None
    outputs = []
    for target in targets:
        if matrix is None or not matrix.streams:
            outputs.append(interpreter.identify(target._replace(linear=(), squash='')))
            continue
        value = blend([matrix, target], target.shape)
        value = value._replace(degrees=add_degrees(matrix, target))
        if not target.streams:
            outputs.append(interpreter.identify(value))
            continue
        product = equation._replace(inputs=[matrix, target], shapes=[target.shape])
        axes = Contraction((0,), (0,), (), ())
        value = interpreter.record_product(product, value, axes)
        for index in value.products:
            interpreter.products[index].flops = flops
        outputs.append(value)
    return outputs
