"""The operators of ``exported`` in ONNX. What is indented under ``graph`` is one step, the body of a ``Scan``.

onnxscript reads the source of these functions; names without a definition in them are inputs of the operator.
"""

# mypy: disable-error-code="no-untyped-def,arg-type"

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op


@script(default_opset=op)
def steps(now, value, A, enter, leave, state) -> tuple[FLOAT, FLOAT]:
    """Return y and the last state, real."""

    @graph()
    def body(h, now_t, value_t, enter_t, leave_t):
        next_h = op.Exp(now_t * A) * h + value_t * enter_t
        y_t = op.MatMul(leave_t, next_h)
        return next_h, y_t

    last, y = op.Scan(state, now, value, enter, leave, body=body, num_scan_inputs=4)
    return y, last


@script(default_opset=op)
def complex_steps(now, value, A, A_i, enter, enter_i, leave, leave_i, state, state_i) -> tuple[FLOAT, FLOAT, FLOAT]:
    """Return y and the parts of the last state."""

    @graph()
    def body(h, h_i, now_t, value_t, enter_t, enter_ti, leave_t, leave_ti):
        size = op.Exp(now_t * A)
        kept = size * op.Cos(now_t * A_i)
        kept_i = size * op.Sin(now_t * A_i)
        next_h = kept * h - kept_i * h_i + value_t * enter_t
        next_i = kept * h_i + kept_i * h + value_t * enter_ti
        half = op.MatMul(leave_t, next_h) - op.MatMul(leave_ti, next_i)
        y_t = half + half
        return next_h, next_i, y_t

    last, last_i, y = op.Scan(state, state_i, now, value, enter, enter_i, leave, leave_i, body=body, num_scan_inputs=6)
    return y, last, last_i


@script(default_opset=op)
def plane_steps(
    now_above, x_above, enter_above, share_above, now_beside, x_beside, enter_beside, share_beside, leave,
    A_above, A_beside, state,
) -> FLOAT:  # fmt: skip
    """Return y of a plane, whose steps are antidiagonals."""

    @graph()
    def body(h, now_a, x_a, enter_a, share_a, now_b, x_b, enter_b, share_b, leave_k):
        above = op.Pad(h, op.Constant(value_ints=[0, 1, 0, 0, 0, -1, 0, 0]))
        kept_above = share_a * op.Exp(now_a * A_above) * above
        kept_beside = share_b * op.Exp(now_b * A_beside) * h
        next_h = kept_above + kept_beside + x_a * enter_a + x_b * enter_b
        y_k = op.MatMul(leave_k, next_h)
        return next_h, y_k

    _, y = op.Scan(
        state, now_above, x_above, enter_above, share_above, now_beside, x_beside, enter_beside, share_beside, leave,
        body=body, num_scan_inputs=9,
    )  # fmt: skip
    return y
