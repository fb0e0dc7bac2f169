"""Compares implementations of one computation with its plain path."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

OK, DIFFERS, NO_PROGRAM, SKIPPED = "ok", "differs", "does not compile", "not checked"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one implementation compares with the plain path.

    Attributes:
      why: the reason in one line, unless the outcome is "ok".
      values, gradients: the largest difference from the plain path in float32, as a
        share of the largest value of the same array; None if a result is not finite.
      tolerance: the most that either may be.
      seconds, plain_seconds: one call with gradients, of the implementation (None if
        it is interpreted) and of the plain path.
      interpreted: Pallas simulates a TPU or GPU.
    """

    name: str
    outcome: str
    why: str = ""
    values: float | None = None
    gradients: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    plain_seconds: float | None = None
    interpreted: bool = False

    @property
    def failed(self) -> bool:
        return self.outcome in (DIFFERS, NO_PROGRAM)


class Implementation(NamedTuple):
    """One way to compute a case: `run(*inputs, weights)`.

    Attributes:
      misfit: why this device or config cannot run it; None if it can.
      interpreted: Pallas simulates a TPU or GPU.
    """

    name: str
    run: Callable[..., Any]
    misfit: str | None = None
    interpreted: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays, the plain path, and the implementations to compare with it.

    Attributes:
      plain: `(*inputs, weights) -> outputs`, an array or a tuple of arrays.
      inputs: arrays `[*m, ...]`, with the leading axes of the two masks.
      real: where outputs count: not at padding.
      altered: one image, or empty slots; no other output may depend on them.
      terms: the most terms that a sum has.
    """

    plain: Callable[..., Any]
    implementations: list[Implementation]
    inputs: tuple[Any, ...]
    weights: Any
    real: Bool[Array, "*m"]
    altered: Bool[Array, "*m"]
    terms: int


def tolerance(dtype: Any, terms: int) -> float:
    """The largest difference that rounding explains, as a share of the largest value.

    A result is rounded to `dtype` at most eight times in a row, by half an epsilon
    each; sums of `terms` are in float32, and their roundings grow as a random walk.
    """
    sums = math.sqrt(terms) * float(jnp.finfo(jnp.float32).eps)
    return 4 * max(float(jnp.finfo(dtype).eps), sums)


def verdicts(case: Case, *, timed: bool) -> list[Verdict]:
    """Compares the implementations of a case with its plain path.

    Never raises an error of a device: if the plain path fails, nothing is checked.
    """
    if all(x.misfit for x in case.implementations):
        return [Verdict(x.name, SKIPPED, x.misfit or "") for x in case.implementations]
    dtype, rng = case.inputs[0].dtype, np.random.default_rng(1)

    def cotangent(output: Any) -> Any:
        if not output.ndim:
            return np.float32(1)
        values = rng.standard_normal(output.shape, np.float32)
        return _masked(jnp.asarray(values, output.dtype), case.real)

    plain, seconds = _with_gradients(case.plain), None
    try:
        outputs = jax.eval_shape(case.plain, *case.inputs, case.weights)
        cotangents = jax.tree.map(cotangent, outputs)
        args = (cotangents, *case.inputs, case.weights)
        # One image is altered, and its own outputs have no cotangents.
        others = case.real & ~case.altered
        masked = jax.tree.map(lambda x: _masked(x, others), cotangents)
        altered_args = (masked, *_altered(case.inputs, case.altered), case.weights)
        with _products_in(jnp.float32):
            expected = plain(*jax.tree.map(lambda x: x.astype(jnp.float32), args))
            jax.block_until_ready(expected)
        with _products_in(dtype):
            seconds = _seconds(plain, args) if timed else None
    except Exception as error:  # out of memory, for example
        why = f"the plain path fails: {_first_line(error)}"
        return [Verdict(x.name, SKIPPED, x.misfit or why) for x in case.implementations]

    with _products_in(dtype):
        return [
            Verdict(x.name, SKIPPED, x.misfit)
            if x.misfit
            else _verdict(x, case, expected, args, altered_args, seconds)
            for x in case.implementations
        ]


def _verdict(
    implementation: Implementation,
    case: Case,
    expected: Any,
    args: Any,
    altered_args: Any,
    plain_seconds: float | None,
) -> Verdict:
    """Compares one implementation that this device and config can run.

    Args:
      expected: outputs and gradients of the plain path, in float32.
      args: cotangents of outputs, inputs and weights; `altered_args`: with an image
        altered.
      plain_seconds: the time of the plain path; None if nothing is timed.
    """
    name, interpreted = implementation.name, implementation.interpreted
    run = _with_gradients(implementation.run)
    try:
        actual, other = run(*args), run(*altered_args)
        result = _compared(actual, expected, other, case.real, case.altered)
        values, gradients, finite, leaked = map(float, result)
        timed = plain_seconds is not None and not interpreted
        seconds = _seconds(run, args) if timed else None
    except Exception as error:  # compilers raise many types
        return Verdict(name, NO_PROGRAM, _first_line(error), interpreted=interpreted)
    largest, most = max(values, gradients), tolerance(args[1].dtype, case.terms)
    why = ""
    if not finite:
        why = "a result is NaN or infinite"
    elif leaked:
        why = "an image, or an empty slot, changes the results of others"
    elif largest > most:
        why = f"by {largest:.1e} of the largest value, over {most:.1e}"
    return Verdict(
        name,
        DIFFERS if why else OK,
        why,
        values=values if finite and math.isfinite(values) else None,
        gradients=gradients if finite and math.isfinite(gradients) else None,
        tolerance=most,
        seconds=seconds,
        plain_seconds=plain_seconds,
        interpreted=interpreted,
    )


def _first_line(error: Exception) -> str:
    lines = (x.strip() for x in str(error).splitlines())
    return next(filter(None, lines), repr(error))[:200]


def _with_gradients(f: Callable[..., Any]) -> Callable[..., Any]:
    """`(cotangents, *args) -> (outputs, gradients of args)`."""

    @jax.jit
    def run(cotangents: Any, *args: Any) -> Any:
        outputs, back = jax.vjp(f, *args)
        return outputs, back(cotangents)

    return run


def _products_in(dtype: Any) -> contextlib.AbstractContextManager:
    """Computes float32 products in full precision; a device may round operands."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest" if exact else None)


def _seconds(run: Callable[..., Any], args: Any) -> float:
    """The median time of three calls; the first call before them compiles."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@jax.jit
def _altered(inputs: Any, altered: Bool[Array, "*m"]) -> Any:
    return jax.tree.map(lambda x: jnp.where(_expand(altered, x), -30 * x, x), inputs)


@jax.jit
def _compared(
    actual: Any, expected: Any, other: Any, real: Any, altered: Any
) -> tuple[Array, ...]:
    """Differences of values and of gradients, whether all is finite, and any leak.

    Args:
      actual, expected, other: outputs, and gradients of inputs and weights; `other`
        with an image altered.
      real, altered: `[*m]`, as in `Case`.
    """

    def masked(tree: Any, mask: Any) -> list[Array]:
        return [_masked(x, mask) for x in jax.tree.leaves(tree)]

    values = _difference(masked(actual[0], real), masked(expected[0], real))
    gradients = _difference(*map(jax.tree.leaves, (actual[1], expected[1])))
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((actual, expected))]
    before, after = (masked(x[0], real & ~altered) for x in (actual, other))
    leaked = [(a != b).any() for a, b in zip(before, after, strict=True)]
    leaked += [(x != 0).any() for x in masked(other[1][:-1], altered)]
    return values, gradients, jnp.stack(finite).all(), jnp.stack(leaked).any()


def _difference(actual: list[Array], expected: list[Array]) -> Float[Array, ""]:
    """The largest difference, as a share of the largest value of the same array."""
    shares = [
        jnp.abs(a.astype(jnp.float32) - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30)
        for a, b in zip(actual, expected, strict=True)
    ]
    return jnp.stack(shares).max()


def _masked(x: Any, mask: Bool[Array, "*m"]) -> Any:
    """0 where the mask is False; a scalar as it is."""
    return jnp.where(_expand(mask, x), x, 0) if np.ndim(x) else x


def _expand(mask: Bool[Array, "*m"], x: Array) -> Array:
    return mask[(..., *[None] * (x.ndim - mask.ndim))]
