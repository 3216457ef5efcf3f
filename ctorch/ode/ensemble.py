"""``ensemble``: one problem from many initial states and with many parameters, chunk by chunk."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._exceptions import SolveError
from ctorch._numbers import as_int
from ctorch._progress import Display, display
from ctorch.codegen import CompileError, MixesSamples, NoCompiler, Untraceable
from ctorch.ode import arguments
from ctorch.ode import native as native_solve
from ctorch.ode.ensemble_group import Team, on
from ctorch.ode.ensemble_merge import Collected, Merge, how
from ctorch.ode.ensemble_samples import Samples
from ctorch.ode.solution import Solution, Stats, Status
from ctorch.ode.solve import solve_ode

_CHUNK_BYTES = 64 * 2**20
_NAMED = 8  # indices in a message


@dataclasses.dataclass
class EnsembleSolution:
    """What an ensemble returns.

    Attributes:
        t: output times as given.
        y: states there, [N, T, *shape], or a pytree of such; None where ``reduce`` was given. Rows
            that a failed sample did not reach are NaN.
        reduced: what ``reduce`` and ``merge`` made; None where ``reduce`` was not given.
        status: [N] int64, values of ``Status``.
        stats: work done; nfe, accepted and rejected are [N] int64. Of an eager solve, nfe counts
            the calls of func with the chunk that the sample was in.
        indices: the samples that these are: all, or with ``gather=False`` this process's share.
        message: what went wrong, if something did.
    """

    t: Any
    y: Any
    reduced: Any
    status: Tensor
    stats: Stats
    indices: range
    message: str = ""

    @property
    def failed(self) -> Tensor:
        """Indices of the samples that failed, increasing."""
        return self.indices.start + self.status.nonzero().reshape(-1)


def ensemble(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    args: tuple[Any, ...] = (),
    size: int | None = None,
    seed: int | None = None,
    chunk_size: int | None = None,
    reduce: Callable[[Solution, Tensor], Any] | str | None = None,
    merge: Callable[[Any, Any], Any] | str = "cat",
    native: bool | str = "try",
    gradient: str = "none",
    devices: Sequence[torch.device | str] | torch.device | str | None = None,
    group: Any = None,
    gather: bool = True,
    progress: bool = False,
    throw: bool = True,
    **solve_options: Any,
) -> EnsembleSolution:
    """Solve y' = func(t, y, *args) for N samples, each with steps of its own, in chunks.

    Every chunk is one ``ctorch.solve_ode(..., batched=True)``; only its states are in memory, and
    what ``reduce`` keeps of the chunks before. What comes of a sample does not hang on the chunk
    that it is in: natively to the last bit, where chunks have 128 samples or more (one sample, some
    and many have programs of their own), else to rounding.

    Args:
        func: ``func(t, y, *args)`` for any number n of samples: ``t`` is [n, 1, ..., 1], ``y``
            [n, *shape]. It must not mix them. Tensors and modules that it holds are for all.
        y0: initial states [N, *shape] (of one for all: ``y0.expand(N, ...)``), or a pytree of
            such tensors, or a function of the indices of some samples ([n] int64, on the CPU) that
            returns theirs.
        t: [T] output times, the first the initial one; or [N, T].
        args: further arguments of func, or pytrees of them. Tensors are [N, ...], one row for each
            sample; functions of indices, as y0, return such rows. Numbers, 0-dim tensors, modules
            and other objects are for all.
        size: N; needed where y0 is a function.
        seed: functions of indices are called ``f(indices, draws)``, where ``draws`` (``Draws``)
            makes random numbers for these samples: the same whatever the chunks.
        chunk_size: samples in a chunk at most. None: what fits into about 64 MB, at 16 states in
            work and T in the solution.
        reduce: ``reduce(sol, indices)`` returns what is kept of a chunk's ``Solution``; failed
            samples have ``sol.status`` other than 0, and NaN from where they stopped. "moments":
            mean and variance over the samples that did not fail (``Moments``). None: all of
            ``sol.y``.
        merge: what is done with what ``reduce`` returned: "cat": (pytrees of) tensors are
            concatenated along the first dimension; "sum": added; or a function of two results.
            Results come in the order of samples.
        native: "try", True or False, as for ``solve_ode``; a func that is seen to mix samples is
            refused by "try", too.
        gradient: as for ``solve_ode``. With another than "none", ``reduce`` may call ``backward``
            on its chunk's loss; results that keep their graph keep the memory of all chunks.
        devices: chunks are solved on these (or this) in turn, at the same time, and what is kept
            comes to the CPU. func must work on each. None: where y0 is.
        group: a process group of ``torch.distributed``, of which each process solves its share
            (a run of samples); "world": all processes, and this one alone where there is but one.
        gather: with a group: every process returns everything (on the CPU), else its share.
        progress: show how far it is (in the first process).
        throw: raise where samples failed, when all have been solved; else say so in ``status``.
        **solve_options: method, rtol, atol, controller, max_steps, dt0, options. Tolerances are
            numbers, or broadcast against the state of one sample.

    Returns:
        ``EnsembleSolution``.

    Raises:
        ctorch.SolveError: samples failed; ``error.solution`` holds everything. TypeError,
        ValueError: bad arguments. RuntimeError: another process of the group failed. Also what
        ``solve_ode`` raises.

    Example:
        >>> import torch, ctorch
        >>> rates = torch.linspace(0.0, 2.0, 1000, dtype=torch.float64)[:, None]
        >>> y0 = torch.ones(1, 1, dtype=torch.float64).expand(1000, 1)
        >>> t = torch.tensor([0.0, 1.0])
        >>> sol = ctorch.ensemble(lambda t, y, rate: -rate * y, y0, t, args=(rates,), native=False)
        >>> sol.y.shape
        torch.Size([1000, 2, 1])
    """
    arguments.check_func(func)
    if "batched" in solve_options:
        raise TypeError("ensemble has no batched: every sample steps on its own.")
    keep, merged = how(reduce, merge)
    team = Team(group)
    samples = Samples(y0, t, args, size, seed)
    places = _places(devices)
    bounds = _bounds(samples, chunk_size, team.size, len(places))
    first, last = (k * (len(bounds) - 1) // team.size for k in (team.rank, team.rank + 1))
    share = _Share(range(bounds[first], bounds[last]), merged)
    solver = _Solver(func, places, native, {"gradient": gradient, **solve_options})

    def solve() -> None:
        chunks = [range(*pair) for pair in itertools.pairwise(bounds[first : last + 1])]
        shown = display(len(chunks), title="ensemble", wanted=progress and team.rank == 0)
        try:
            _run(solver.solutions(samples, chunks), share, keep, shown, devices is not None)
        finally:
            shown.close()

    if team.group is None or not gather:
        solve()
    else:
        share = _gathered(team, share, solve)
    return _finished(share, t, samples.size, reduce is None, throw)


# -- solving
# ------------------------------------------------------------------------------------------


def _places(devices: Any) -> list[torch.device | None]:
    """The devices that take turns; None: where a chunk is."""
    if devices is None:
        return [None]
    one = isinstance(devices, (str, torch.device))
    places: list[torch.device | None] = [torch.device(x) for x in ([devices] if one else devices)]
    if not places:
        raise ValueError("devices is empty: name some, or leave it out.")
    return places


def _bounds(samples: Samples, chunk_size: int | None, processes: int, places: int) -> list[int]:
    """Where chunks begin and end: of nearly equal sizes, as many for each process."""
    if chunk_size is None:
        most = max(1, _CHUNK_BYTES // max(1, samples.bytes()))
    else:
        most = as_int(chunk_size) or 0
        if most < 1:
            raise ValueError(f"chunk_size must be an integer from 1 on, but is {chunk_size!r}.")
    each = max(places, -(-samples.size // (most * processes)))
    count = min(samples.size, each * processes)
    return [k * samples.size // count for k in range(count + 1)]


class _Solver:
    """Solves chunks. The first one shows whether that can be done natively.

    Args:
        func: the vector field.
        places: devices that take turns; None: where a chunk is.
        mode: True, False, "try" or None.
        options: of ``solve_ode``.
    """

    def __init__(
        self, func: Any, places: Sequence[torch.device | None], mode: Any, options: dict[str, Any]
    ) -> None:
        self.func, self.places, self.options = func, places, options
        self.native = native_solve.check_mode(mode)

    def solutions(
        self, samples: Samples, chunks: Sequence[range]
    ) -> Iterator[tuple[range, Solution]]:
        """The chunks' solutions in order; as many are made at a time as there are places."""
        start, count, graph = 0, len(self.places), torch.is_grad_enabled()
        with ThreadPoolExecutor(count) as pool:
            while start < len(chunks):
                wave = chunks[start : start + (count if start else 1)]
                tasks = [
                    (samples.of(chunk), self.places[(start + k) % count], graph)
                    for k, chunk in enumerate(wave)
                ]
                start += len(wave)
                if len(wave) == 1:
                    yield wave[0], self._solve(*tasks[0])
                    continue
                waiting = [pool.submit(self._solve, *task) for task in tasks]
                yield from zip(wave, (x.result() for x in waiting), strict=True)

    def _solve(self, inputs: Any, place: torch.device | None, graph: bool) -> Solution:
        y0, t, args = inputs if place is None else on(inputs, place)
        call = functools.partial(
            solve_ode, self.func, y0, t, args=args, batched=True, throw=False, **self.options
        )
        with torch.set_grad_enabled(graph):  # a thread has a mode of its own
            if self.native == "try":
                try:
                    return call(native=True)
                except MixesSamples:  # eagerly it would hang on the chunks what comes of a sample
                    raise
                except (native_solve.Unsupported, Untraceable, NoCompiler, CompileError) as error:
                    warnings.warn(f"ensemble: solving eagerly, for {error}", stacklevel=6)
                    self.native = False
            return call(native=self.native)


class _Share:
    """What has been solved of a run of samples.

    Args:
        indices: the samples.
        merge: how results become one; None: they are concatenated.
    """

    def __init__(self, indices: range, merge: Merge | None) -> None:
        self.indices, self.results, self.failed = indices, Collected(merge), 0
        #: status, evaluations, accepted and rejected steps
        self.numbers = torch.empty(4, len(indices), dtype=torch.int64)

    def add(self, chunk: range, sol: Solution, result: Any) -> None:
        """Take a chunk's solution, and what is kept of it."""
        self.results.add(result)
        start = self.indices.start
        numbers = self.numbers[:, chunk.start - start : chunk.stop - start]
        stats = sol.stats
        for row, part in zip(
            numbers, (sol.status, stats.nfe, stats.accepted, stats.rejected), strict=True
        ):
            row.copy_(torch.as_tensor(part))
        self.failed += int(numbers[0].count_nonzero())


def _run(
    solutions: Iterator[tuple[range, Solution]],
    share: _Share,
    keep: Callable[[Solution, Tensor], Any],
    shown: Display,
    to_cpu: bool,
) -> None:
    """Let a share take all solutions."""
    started = time.monotonic()
    number = 0
    for chunk, sol in solutions:
        result = keep(sol, torch.arange(chunk.start, chunk.stop))
        share.add(chunk, sol, on(result, torch.device("cpu")) if to_cpu else result)
        del sol, result  # the next chunk needs the memory
        number, done = number + 1, chunk.stop - share.indices.start
        rate = round(done / max(time.monotonic() - started, 1e-9))
        shown.update(number, {"samples": done, "failed": share.failed, "per second": rate})


def _gathered(team: Team, share: _Share, solve: Callable[[], None]) -> _Share:
    """Solve a share; returns what all processes of the team have, together."""
    mine: Any = None
    error: Exception | None = None
    try:
        solve()
        result = share.results.result()
        if any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(result)):
            raise ValueError(
                "results have a graph, which cannot be sent: detach them in reduce, or use"
                " gather=False."
            )
        mine = share.indices, result, share.numbers
    except Exception as problem:  # the others wait for word from here
        error = problem
    try:
        everything = team.exchange(mine, error)
    finally:
        del error  # its traceback holds this frame, and so the group
    total = _Share(range(everything[0][0].start, everything[-1][0].stop), share.results.merge)
    for _, result, _ in everything:
        total.results.add(result)
    total.numbers = torch.cat([numbers for *_, numbers in everything], 1)
    return total


def _finished(share: _Share, t: Any, size: int, is_whole: bool, throw: bool) -> EnsembleSolution:
    """The share as it is returned, or raised."""
    status, nfe, accepted, rejected = share.numbers
    result = share.results.result()
    y, reduced = (result, None) if is_whole else (None, result)
    stats = Stats(nfe, accepted, rejected)
    solution = EnsembleSolution(t, y, reduced, status, stats, share.indices)
    failed = solution.failed
    if len(failed):
        solution.message = _message(status, failed, size)
        if throw:
            first = Status(int(status[failed[0] - share.indices.start]))
            raise SolveError(solution.message, status=first, solution=solution)
    return solution


def _message(status: Tensor, failed: Tensor, size: int) -> str:
    counts = torch.bincount(status).tolist()
    causes = [f"{counts[k]} {Status(k).name}" for k in range(1, len(counts)) if counts[k]]
    named = ", ".join(map(str, failed[:_NAMED].tolist())) + ", ..." * (len(failed) > _NAMED)
    return (
        f"{len(failed)} of {size} samples failed ({', '.join(causes)}): indices {named}. All"
        " samples were solved: error.solution holds them, and throw=False returns them, with a"
        " status for each. To see why one failed, solve it alone with ctorch.solve_ode."
    )
