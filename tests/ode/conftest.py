"""The solver's tests run in several forms: as they are written, natively, and through the batched
path.

A form changes how ``solve_ode`` and ``odeint`` come to their result, not what it is, so that a test
of what a solve returns holds in each. What cannot be solved natively is refused by name: such a
test is skipped, with the refusal as its reason, and runs from the day on which nothing refuses it.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import ctorch
from ctorch.codegen import Untraceable, build
from ctorch.ode import Solution, Stats, Status
from ctorch.ode.native import Unsupported

from ..precompiled import included

#: of all solves
HEADERS = """#include "native/solver.h"
#include "native/adjoint.h"
#include "native/observed.h"
"""
#: by module: the further forms of its tests, and of which parameters, where they have them (every
#: field, method and form is compiled once, which takes seconds)
FORMS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "test_convergence": (
        ("native", "batched", "native batched"), {"method": ("dopri5", "vern7", "rk4")}
    ),
    "test_failures": (
        ("native", "batched", "native batched"),
        {"method": ("dopri5", "rk4"), "gradient": ("none", "checkpoint")},
    ),
    "test_gradients": (
        ("native", "batched"),
        {"how": ("dopri5", "rk4", "jumps"), "method": ("dopri5",), "gradient": ("checkpoint",)},
    ),
    "test_captured_tensors": (("native", "batched"), {"gradient": ("checkpoint",)}),
    "test_arguments": (("native",), {"method": ("dopri5",)}),
    "test_second_derivatives": (
        ("native",),
        {"method": ("dopri5", "rk4"), "how": ("dopri5", "tsit5 with jumps", "rk4")},
    ),
    "test_against_peers": (("native", "batched"), {"method": ("dopri5", "rk4")}),
    "test_contract": (("native",), {"method": ("dopri5", "dopri8", "midpoint")}),
    "test_events": (
        ("native",),
        {"how": ("dopri5", "vern7", "rk4"), "gradient": ("checkpoint",), "interface": ("odeint",)},
    ),
    "test_batched": (("native",), {"method": ("dopri5", "vern7"), "gradient": ("checkpoint",)}),
    "test_batched_steps": (
        ("native",), {"method": ("dopri5", "vern7"), "gradient": ("checkpoint",)}
    ),
}  # fmt: skip
#: tests of what another form says, or does, in its own way
WRITTEN = {
    "test_what_a_field_may_return",  # the shapes that a batch's messages name
    "test_a_bad_argument_is_named",
    "test_a_bad_initial_state_is_named",
    "test_max_steps",
    "test_what_is_refused_is_named",
    "test_step_underflow_names_the_worst_element_and_remedies",  # natively, no element is known
    "test_a_start_too_late_for_its_first_step_is_no_fault_of_the_field",
    "test_no_evaluation_lies_outside_the_interval_and_the_last_step_ends_on_its_end",  # callbacks
    "test_native_try_solves_and_warns_once",
    "test_an_error_that_no_step_is_short_enough_for_ends_the_solve",  # by a norm of one system
    "test_errors_in_the_field_come_through_unchanged",
    "test_every_method_of_torchdiffeq_is_there",
    "test_unknown_options_warn",
    "test_a_larger_norm_makes_steps_shorter",
    "test_the_gradient_is_that_of_the_accepted_steps",  # which a callback tells
}
#: draws its fields, of which each would be compiled: the lowering of drawn functions is tested by
#: tests/codegen/test_fuzz, native solves of drawn settings by test_native_random
DRAWN = {"test_solutions_agree_with_scipy"}
#: what the tests' own fields do that cannot be traced
UNTRACED = (
    "_local_scalar_dense", "is changed by each call", "func returned", "is random",
    "cannot be called with some of the samples", "computes in torch.float",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of the modules above, in each of their forms."""
    forms, _ = FORMS.get(_name(metafunc.module), ((), {}))
    if metafunc.function.__name__ in DRAWN:
        forms = tuple(form for form in forms if "native" not in form)
    if forms and metafunc.function.__name__ not in WRITTEN:
        metafunc.parametrize("solver_form", ["written", *forms], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the forms of parameters that are not chosen."""
    dropped = [item for item in items if _form(item) != "written" and not _chosen(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def _form(item: pytest.Item) -> str:
    spec = getattr(item, "callspec", None)
    return "written" if spec is None else str(spec.params.get("solver_form", "written"))


def _chosen(item: Any) -> bool:
    _, choices = FORMS[_name(item.module)]
    words = set(re.split(r"[\[\]-]", item.name.partition("[")[2]))
    return all(
        name not in item.callspec.params or words & set(chosen) for name, chosen in choices.items()
    )


def _name(module: Any) -> str:
    return str(module.__name__.rpartition(".")[2])


@pytest.fixture(autouse=True)
def solver_form(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """How the solves of a test are made."""
    form = getattr(request, "param", "written")
    if "batched" in form:
        copies = 3 if "native" in form else 1
        monkeypatch.setattr(ctorch, "solve_ode", through_batch(ctorch.solve_ode, copies))
    if "native" not in form:
        yield form
        return
    _compile_quickly(request, monkeypatch, tmp_path_factory)
    with ctorch.native_solves(True):
        yield form


@pytest.fixture(scope="module")
def quick_compiler(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A cache that all tests share, and a compiler that does not try hard."""
    with pytest.MonkeyPatch.context() as patch:
        _compile_quickly(request, patch, tmp_path_factory)
        yield


def _compile_quickly(
    request: pytest.FixtureRequest, patch: pytest.MonkeyPatch, factory: pytest.TempPathFactory
) -> None:
    shared = factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent  # that of all workers
    patch.setenv("CTORCH_CACHE_DIR", str(shared / "native-cache"))
    patch.setenv("CTORCH_NATIVE_FLAGS", _flags(shared))


@functools.cache
def _flags(shared: Path) -> str:
    given = os.environ.get("CTORCH_NATIVE_FLAGS", "")  # of a sanitizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTORCH_NATIVE_FLAGS", f"-Og {given}")
        command = [*build.compiler(), *build.flags(), f"-I{build.include_folder()}"]
        headers = included(shared / "native-headers", HEADERS, command)
    return f"-Og {given} {shlex.join(headers)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A refusal by name skips a test in the form that is refused."""
    form = _form(item)
    try:
        return (yield)
    except BaseException as error:
        reason = _refusal(error, form)
        if not reason:
            raise
        pytest.skip(f"refused: {reason}")


def _refusal(error: BaseException, form: str) -> str:
    """What was refused, where that is why a form of a test failed; "": it is not."""
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause)
        known = (
            isinstance(cause, Unsupported)
            or (isinstance(cause, Untraceable) and any(word in said for word in UNTRACED))
        ) and "native" in form
        late = isinstance(cause, NotImplementedError) and "batched=True" in said
        if known or (late and "batched" in form):
            return said
        cause = cause.__cause__ or cause.__context__  # pytest.raises may have met it first
    return ""


def through_batch(solve: Callable[..., Solution], copies: int) -> Callable[..., Solution]:
    """``solve_ode`` of one system as that of a batch of ``copies``, of which the last is
    returned.
    """

    def solve_ode(func: Any, y0: Any, t: Any, **how: Any) -> Solution:
        if how.get("batched"):
            return solve(func, y0, t, **how)

        def rows(times: Tensor, y: Any, *args: Any) -> Any:
            leaves, spec = pytree.tree_flatten(y)
            slopes = [
                func(time.reshape(()), pytree.tree_unflatten([x[i] for x in leaves], spec), *args)
                for i, time in enumerate(times)
            ]
            return pytree.tree_map(lambda *parts: torch.stack(parts), *slopes)

        many = pytree.tree_map(lambda x: torch.stack([x] * copies), y0)
        how.setdefault("controller", "i")  # the default of a solve without batched
        try:
            return last(solve(rows, many, t, batched=True, **how))
        except ctorch.SolveError as error:
            error.solution = error.solution and last(error.solution)
            raise

    def last(sol: Solution) -> Solution:
        y = pytree.tree_map(lambda x: x[-1], sol.y)
        work = (sol.stats.nfe, sol.stats.accepted, sol.stats.rejected)
        stats = Stats(*[int(torch.as_tensor(count).reshape(-1)[-1]) for count in work])
        return Solution(sol.t, y, stats, Status(int(sol.status[-1])), message=sol.message)

    return solve_ode
