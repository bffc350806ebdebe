"""Hypothesis strategies for the energy loss: structures (what is compiled) and data (drawn from a seed)."""

from hypothesis import strategies as st

from tests.kernels.problems import STRUCTURES, Problem

ALPHAS = (1.0, 2.0, 0.5, 1.3)


@st.composite
def problems(draw, magnitudes=(1.0, 1e-3, 300.0)) -> Problem:
    """Any structure: for the interpreter, which compiles nothing."""
    rows = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    return Problem(
        rows=rows,
        n=draw(st.sampled_from((2, 2, 3, 4, 5))),
        m=draw(st.sampled_from((1, 1, 2, 3))),
        features=draw(st.sampled_from((1, 1, 2, 3, 8, 16, 17, 40))),
        sample_dim=draw(st.integers(-len(rows) - 2, -2)),
        strided=draw(st.booleans()),
        alpha=draw(st.sampled_from((*ALPHAS, 0.7, 1.9))),
        tau=draw(st.sampled_from((1.0, 0.99, 0.5))),
        eps=draw(st.sampled_from((0.0, 0.0, 0.1))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        mask=draw(st.sampled_from(("none", "none", "some", "broadcast", "number", "nothing"))),
        weights=draw(st.booleans()),
        feature_weights=draw(st.booleans()),
        coincident=draw(st.booleans()),
        magnitude=draw(st.sampled_from(magnitudes)),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def gpu_problems(draw, magnitudes=(1.0, 1e-3, 300.0)) -> Problem:
    """One of ``STRUCTURES`` with any data."""
    rows, n, m, features, sample_dim, strided, alpha, eps, reduction, mask, weights, fw = draw(
        st.sampled_from(STRUCTURES)
    )
    # The number of a general alpha is no structure: it is an argument of the kernel.
    alpha = alpha if alpha in (1.0, 2.0) else draw(st.floats(0.3, 1.95))
    tau, coincident = draw(st.floats(0.1, 1.0)), draw(st.booleans())
    magnitude, seed = draw(st.sampled_from(magnitudes)), draw(st.integers(0, 2**31))
    return Problem(
        rows, n, m, features, sample_dim, strided, alpha, tau, eps, reduction, mask, weights, fw, coincident,
        magnitude, seed,
    )  # fmt: skip
