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
      why: the reason in one line, unless the verdict is "ok".
      values, gradients: the largest difference from the plain path in float32, as a
        share of the largest value of the same array.
      tolerance: the most that either may be.
      seconds, plain_seconds: one call with gradients, of the implementation (None if
        it is interpreted) and of the plain path.
      interpreted: Pallas simulates a TPU.
    """

    name: str
    verdict: str
    why: str = ""
    values: float | None = None
    gradients: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    plain_seconds: float | None = None
    interpreted: bool = False

    @property
    def failed(self) -> bool:
        return self.verdict in (DIFFERS, NO_PROGRAM)


class Implementation(NamedTuple):
    """One way to compute a case: `run(inputs, weights)`.

    Attributes:
      misfit: why this device or config cannot run it; empty if it can.
      interpreted: Pallas simulates a TPU.
    """

    name: str
    run: Callable[..., Any]
    misfit: str = ""
    interpreted: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays, the plain path, and the implementations to compare with it.

    Attributes:
      plain: `(inputs, weights) -> outputs`, each an array or a tuple of arrays.
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


def judged(case: Case) -> list[Verdict]:
    """Compares the implementations of a case with its plain path."""
    wanted = [x for x in case.implementations if not x.misfit]
    found = {x.name: Verdict(x.name, SKIPPED, x.misfit) for x in case.implementations}
    if not wanted:
        return list(found.values())
    dtype = case.inputs[0].dtype
    rng = np.random.default_rng(1)

    def gradient(output: Any) -> Any:
        if not output.ndim:
            return np.float32(1)
        values = rng.standard_normal(output.shape, np.float32)
        return _masked(jnp.asarray(values, output.dtype), case.real)

    outputs = jax.eval_shape(case.plain, case.inputs, case.weights)
    above = jax.tree.map(gradient, outputs)
    args = (case.inputs, case.weights, above)
    plain = _with_gradients(case.plain)
    exact: Any = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    with _products_in(jnp.float32):
        expected = plain(*exact)
    # One image is altered, and no gradient comes from its own outputs.
    others = case.real & ~case.altered
    altered = _altered(case.inputs, case.altered)
    apart = (altered, case.weights, jax.tree.map(lambda x: _masked(x, others), above))
    with _products_in(dtype):
        plain_seconds = _seconds(plain, args)
        for each in wanted:
            found[each.name] = _verdict(
                each, case, expected, args, apart, plain_seconds
            )
    return list(found.values())


def _verdict(
    implementation: Implementation,
    case: Case,
    expected: Any,
    args: Any,
    apart: Any,
    plain_seconds: float,
) -> Verdict:
    """Args are `(inputs, weights, gradients of outputs)`; `apart` has an image altered.

    Args:
      expected: outputs and gradients of the plain path, in float32.
    """
    name, interpreted = implementation.name, implementation.interpreted
    run = _with_gradients(implementation.run)
    try:
        result = _compared(run(*args), expected, run(*apart), case.real, case.altered)
        values, gradients, finite, leaks = map(float, result)
        seconds = None if interpreted else _seconds(run, args)
    except Exception as error:  # compilers raise many types
        why = next((x for x in str(error).splitlines() if x.strip()), repr(error))
        return Verdict(name, NO_PROGRAM, why.strip()[:200], interpreted=interpreted)
    most = tolerance(case.inputs[0].dtype, case.terms)
    why = ""
    if not finite:
        why = "a result is NaN or infinite"
    elif leaks:
        why = "an image, or an empty slot, changes the results of others"
    elif max(values, gradients) > most:
        why = f"by {max(values, gradients):.1e} of the largest value, over {most:.1e}"
    return Verdict(
        name,
        DIFFERS if why else OK,
        why,
        values=values,
        gradients=gradients,
        tolerance=most,
        seconds=seconds,
        plain_seconds=plain_seconds,
        interpreted=interpreted,
    )


def _with_gradients(f: Callable[..., Any]) -> Callable[..., Any]:
    """`(inputs, weights, gradients of outputs) -> (outputs, gradients of both)`."""

    @jax.jit
    def run(inputs: Any, weights: Any, above: Any) -> Any:
        outputs, back = jax.vjp(f, inputs, weights)
        return outputs, back(above)

    return run


def _products_in(dtype: Any) -> contextlib.AbstractContextManager:
    """Float32 products are exact, since a device's default may round their operands."""
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
    return jax.tree.map(lambda x: jnp.where(_like(altered, x), -30 * x, x), inputs)


@jax.jit
def _compared(
    found: Any,
    expected: Any,
    apart: Any,
    real: Bool[Array, "*m"],
    altered: Bool[Array, "*m"],
) -> tuple[Array, ...]:
    """Differences of values and of gradients, whether all is finite, and any leak."""
    outputs, gradients = (jax.tree.leaves(x) for x in found)
    right_outputs, right_gradients = (jax.tree.leaves(x) for x in expected)

    def largest(pairs: Any) -> Array:
        shares = [_share(a, b) for a, b in pairs]
        return jnp.stack(shares).max()

    values = largest(
        (_masked(a, real), _masked(b, real))
        for a, b in zip(outputs, right_outputs, strict=True)
    )
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(found)]
    other_outputs, (d_inputs, _) = apart
    changed = [
        (_masked(a, real & ~altered) != _masked(b, real & ~altered)).any()
        for a, b in zip(outputs, jax.tree.leaves(other_outputs), strict=True)
    ]
    seen = [(_masked(x, altered) != 0).any() for x in d_inputs]
    return (
        values,
        largest(zip(gradients, right_gradients, strict=True)),
        jnp.stack(finite).all(),
        jnp.stack(changed + seen).any(),
    )


def _share(found: Array, expected: Array) -> Float[Array, ""]:
    """The largest difference of two arrays, as a share of the largest value."""
    difference = jnp.abs(found.astype(jnp.float32) - expected).max()
    return difference / jnp.maximum(jnp.abs(expected).max(), 1e-30)


def _masked(x: Array | np.float32, mask: Bool[Array, "*m"]) -> Array | np.float32:
    """0 where the mask is False; a scalar as it is."""
    return jnp.where(_like(mask, x), x, 0) if isinstance(x, Array) and x.ndim else x


def _like(mask: Bool[Array, "*m"], x: Array) -> Array:
    return mask[(..., *[None] * (x.ndim - mask.ndim))]
