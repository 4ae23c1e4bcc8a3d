"""Time several functions in one process so that their times can be compared.

The functions take turns (A B A B ...), so that a busy machine, a hot chip or a changing clock
affects all of them alike, and every call is waited for with `jax.block_until_ready`, as JAX returns
before the device is done. The median is reported: a few slow calls would dominate a mean.

On an accelerator the first call of each turn is not timed. A GPU runs a program as a captured
graph, which has to be updated when its arrays lie elsewhere than at its last call, as they may
after another function's turn; a robot calls one program again and again.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi import progress

PACKAGES = (
    "shallow-pi",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "mujoco",
    "grain",
    "polars",
    "av",
    "sentencepiece",
)


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds per call, by the function's name."""

    median_ms: dict[str, float]
    # 95 % of the calls took at most this long.
    p95_ms: dict[str, float]
    repeats: int
    # Device kind, such as "cpu" or "NVIDIA H200".
    device: str

    def ratio(self, slow: str, fast: str) -> float:
        """Ratio of the median times of `slow` and `fast`."""
        return self.median_ms[slow] / self.median_ms[fast]


def median_latency(
    functions: Mapping[str, Callable[[], PyTree]],
    *,
    repeats: int = 50,
    warmup: int = 3,
    label: str = "Latency",
) -> Latency:
    """Time the functions in turns.

    The functions return JAX arrays (any pytree). `warmup` calls of each come first, untimed, to
    compile and to fill caches.
    """
    if not functions or repeats < 1 or warmup < 0:
        raise ValueError(
            f"Expected at least one function, repeats >= 1 and warmup >= 0, got "
            f"{len(functions)} functions, {repeats=}, {warmup=}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    settle = jax.default_backend() != "cpu"
    with progress.bar(label, total=warmup + repeats) as advance:
        for turn in range(warmup + repeats):
            for name, function in functions.items():
                if settle:
                    jax.block_until_ready(function())
                start = time.perf_counter()
                jax.block_until_ready(function())
                if turn >= warmup:
                    seconds[name].append(time.perf_counter() - start)
            advance(1)
    return Latency(
        median_ms={name: 1e3 * float(np.median(values)) for name, values in seconds.items()},
        p95_ms={name: 1e3 * float(np.quantile(values, 0.95)) for name, values in seconds.items()},
        repeats=repeats,
        device=jax.devices()[0].device_kind,
    )


def back_to_back(call: Callable[[], PyTree]) -> float:
    """Median milliseconds between results where the next call never waits for the last one.

    That is the device's own time if it takes longer than the host takes to dispatch a call.
    """
    # So many in one go that the first one's launch does not count.
    calls = 3 if jax.default_backend() == "cpu" else 30
    jax.block_until_ready(call())
    found = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        found.append((time.perf_counter() - start) / calls)
    return 1e3 * float(np.median(found))


def compile_all(functions: Mapping[str, Callable[[], PyTree]]) -> None:
    """Call each function once: the first alone, the others from several threads.

    What is compiled alone is autotuned undisturbed.
    """
    first, *others = functions.values()
    jax.block_until_ready(first())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda function: function(), others):
            jax.block_until_ready(result)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
