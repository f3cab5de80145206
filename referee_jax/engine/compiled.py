"""The compiled programs of an engine: each when it is first asked for, or before that in a thread.

`programs.PROGRAMS` has their functions, of one item; here they get the batch by vmap and the devices by shard_map.
"""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from referee_jax.engine import parallel, programs, traced
from referee_jax.hardware import chips, devices
from referee_jax.method.state import Plan

THREADS = 4  # that compile at once, at most: each needs a core, and memory


def jit(fn: Callable, mesh: Mesh, *, is_rare: bool = False, **how: Any) -> Any:
    """`jax.jit` with the options of the mesh's devices, for a program that runs rarely or often."""
    options = chips.compiler_options(mesh.devices.flat[0].platform, mesh.size, is_rare=is_rare)
    return jax.jit(fn, compiler_options=options, **how)


class Programs:
    """The programs of a plan on a mesh, for batches of one size."""

    def __init__(self, plan: Plan, mesh: Mesh):
        self.plan, self.mesh = plan, mesh
        self._fresh: dict[tuple, Any] = {}  # traced anew, for those who look at a trace
        self._made: dict[tuple, Any] = {}
        self._begun: dict[Any, concurrent.futures.Future] = {}  # by program

    def __call__(self, name: str, swept: bool = False, **static: Any) -> Any:
        """The program of this name (programs.PROGRAMS); waits where a thread is compiling it."""
        program = self._program(name, swept, static)
        begun = self._begun.pop(program, None)
        if begun and not begun.cancel():
            concurrent.futures.wait([begun])  # an error comes again where the program is called
        return program

    def trace(self, name: str, swept: bool, args: tuple, **static: Any) -> jax.stages.Traced:
        """A program before it is compiled; a thread that compiles it is left to it."""
        return self._jitted(name, swept, static).trace(*args)

    def waits(self, name: str, **static: Any) -> bool:
        """Whether a thread has compiled this program, which has not been asked for since."""
        begun = self._begun.get(self._program(name, False, static))
        return bool(begun) and begun.done()

    def _program(self, name: str, swept: bool, static: dict[str, Any]) -> Any:
        key = _key(name, swept, static)
        if key not in self._made:
            jitted = self._jitted(name, swept, static)
            # How a group splits weights is said outside of a trace.
            is_kept = name in programs.LARGE and self.mesh.shape[parallel.MODEL] == 1
            keeping = traced.keeping(jitted.__wrapped__, self.plan, (key, dict(self.mesh.shape))) if is_kept else None
            self._made[key] = self._jit(name, keeping) if keeping else jitted
        return self._made[key]

    def _jitted(self, name: str, swept: bool, static: dict[str, Any]) -> Any:
        """The program of this name that has no trace yet."""
        key = _key(name, swept, static)
        if key not in self._fresh:
            fn, batched, _ = programs.PROGRAMS[name]
            batched = [swept if x == "hyper" else x for x in batched]
            fn = jax.vmap(functools.partial(fn, plan=self.plan, **static), in_axes=[0 if x else None for x in batched])
            self._fresh[key] = self._jit(name, parallel.across_devices(fn, self.mesh, batched))
        return self._fresh[key]

    def _jit(self, name: str, fn: Callable) -> Any:
        """A program's function, jitted."""
        # Said here: within a group the compiler would choose another for each program, and the next one be compiled again.
        placed, donated = parallel.batch_sharding(self.mesh), programs.PROGRAMS[name][2]
        return jit(fn, self.mesh, is_rare=name in programs.RARE, donate_argnums=donated, out_shardings=placed)

    @contextlib.contextmanager
    def ahead(self, wanted: Sequence[tuple[str, dict[str, Any], tuple]]) -> Iterator[None]:
        """Compiles programs in threads meanwhile, in this order: names, static arguments and abstract ones.

        What has not begun at the end is left. JAX keeps what a thread compiles for the calls of the same program.
        """
        if not (threads := min(THREADS, devices.cores() - 1)):
            yield
            return
        pool = concurrent.futures.ThreadPoolExecutor(threads, "compile")
        try:
            for name, static, args in wanted:
                program = self._program(name, False, static)
                self._begun[program] = pool.submit(_compile, program, args)
            yield
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._begun.clear()


def _key(name: str, swept: bool, static: dict[str, Any]) -> tuple:
    return name, swept, *sorted(static.items())


def _compile(program: Any, args: tuple) -> None:
    program.trace(*args).lower().compile()
