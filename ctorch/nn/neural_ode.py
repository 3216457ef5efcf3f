"""A module whose output is the solution of an ODE that another module defines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ctorch.ode import Solution, solve_ode

_SHOWN = ("method", "rtol", "atol", "gradient", "batched", "dt0")


class NeuralODE(nn.Module):
    """``y' = func(t, y)`` as a module: initial states in, states at the times ``t`` out.

    Its ``state_dict`` is that of ``func``, under the same names: a field that was trained alone
    loads into it, and the other way round. What it has besides (times that are a parameter, what a
    subclass adds) goes under its own name.

    Args:
        func: the vector field, ``func(t, y, *args)``; a module, so that its parameters are trained,
            or a function.
        t: [T] output times; None: every call brings its own. They stay on their device, in their
            dtype: the solver reads them on the host.
        solve_options: anything else that ``ctorch.solve_ode`` takes, as ``method="dopri5"``,
            ``rtol=1e-6``, ``gradient="checkpoint"``. ``dense=True`` and ``events`` are for
            ``solve``.

    Raises:
        TypeError: ``func`` is not callable, or an option is not one of ``solve_ode``'s (at the
            first call).

    Example:
        >>> import torch
        >>> from ctorch.nn import NeuralODE
        >>> decay = NeuralODE(lambda t, y: -y, torch.tensor([0.0, 1.0]), method="tsit5")
        >>> decay(torch.ones(2))[-1]
        tensor([0.3679, 0.3679])
    """

    def __init__(
        self, func: Callable[..., Any], t: Tensor | None = None, **solve_options: Any
    ) -> None:
        super().__init__()
        if not callable(func):
            raise TypeError(
                f"NeuralODE: func must be a module or function, got {type(func).__name__}"
            )
        self.func = func
        self.solve_options = solve_options
        self.t = t
        self._complaints: tuple[str, tuple[list[str], ...]] = "", ()
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.register_load_state_dict_post_hook(_drop_prefix_of_complaints)

    def forward(self, y0: Any, t: Tensor | None = None, args: tuple[Any, ...] = ()) -> Any:
        """The states at the output times.

        Args:
            y0: initial state: a tensor of any shape, or a pytree of tensors.
            t: [T] output times instead of the module's own ([B, T] with ``batched=True``).
            args: passed on to ``func`` after ``t`` and ``y``.

        Returns:
            [T, *shape] ([B, T, *shape] with ``batched=True``), or a pytree of such tensors.
        """
        return self.solve(y0, t, args).y

    def solve(
        self, y0: Any, t: Tensor | None = None, args: tuple[Any, ...] = (), **options: Any
    ) -> Solution:
        """The whole solution, with its statistics.

        Args:
            y0, t, args: as for ``forward``.
            **options: of ``solve_ode``; they override the module's own.

        Returns:
            The ``ctorch.ode.Solution``.

        Raises:
            ValueError: there are no times, neither here nor in the module.
            SolveError: as ``solve_ode``.
        """
        times = self.t if t is None else t
        if times is None:
            raise ValueError("NeuralODE: give the output times t, here or when the module is made")
        return solve_ode(self.func, y0, times, args=args, **{**self.solve_options, **options})

    def extra_repr(self) -> str:
        parts = [] if self.t is None else [f"t=[{self.t.shape[-1]} times]"]
        settings = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8, **self.solve_options}
        parts += [f"{name}={settings[name]!r}" for name in _SHOWN if name in settings]
        return ", ".join(parts)


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Names the entries of a module's state as those of its ``func``."""
    for key in [k for k in state if k.startswith(f"{prefix}func.")]:
        name = key[len(prefix) + len("func.") :]
        if not _is_own(module, name):
            state[prefix + name] = state.pop(key)


def _add_prefix(
    module: NeuralODE,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """The reverse of ``_drop_prefix``, before a state is loaded."""
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if not _is_own(module, name) and not _is_own(module, name.removeprefix("func.")):
            state[f"{prefix}func.{name}"] = state.pop(key)
    module._complaints = prefix, (missing, unexpected, errors)


def _drop_prefix_of_complaints(module: NeuralODE, incompatible: Any) -> None:
    """Names what did not fit as the state does that the user has given, and can print."""
    prefix, complaints = module._complaints
    module._complaints = "", ()
    name = re.compile(rf"(?<![\w.]){re.escape(prefix)}func\.")
    for texts in complaints:
        texts[:] = [name.sub(prefix, text, count=1) for text in texts]


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether the module itself has that: times that are a parameter, parts of a subclass."""
    first = name.partition(".")[0]
    held = (module._parameters, module._buffers, module._modules)
    return first != "func" and any(first in part for part in held)
