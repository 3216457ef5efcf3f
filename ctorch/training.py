"""One small training loop for every model: progress, logs, atomic checkpoints, exact resume."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctorch import _checkpoint
from ctorch._checkpoint import CheckpointError as CheckpointError
from ctorch._history import History as History
from ctorch._logs import Log, open_log
from ctorch._progress import display
from ctorch._signals import postponed

__all__ = [
    "Batches",
    "CheckpointError",
    "History",
    "NonFiniteLoss",
    "TrainingInterrupted",
    "train",
]

Loss = Callable[[], "Tensor | tuple[Tensor, Mapping[str, Any]]"]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the training after a whole step, a second Ctrl-C at once.

    Attributes:
        step: steps done.
        checkpoint: the file to resume from, which holds them all unless it was the second Ctrl-C;
            None where there is none.
        history: the records so far.
    """

    def __init__(self, message: str, step: int, checkpoint: Path | None, history: History) -> None:
        super().__init__(message)
        self.step, self.checkpoint, self.history = step, checkpoint, history


class NonFiniteLoss(FloatingPointError):
    """The loss, or its gradient, is NaN or infinite.

    Attributes:
        step: the step that failed (it was not done).
        checkpoint: the file with the last state whose loss was finite, if checkpoints were asked
            for.
        history: the records of the steps before.
    """

    def __init__(self, message: str, step: int, checkpoint: Path | None, history: History) -> None:
        super().__init__(message)
        self.step, self.checkpoint, self.history = step, checkpoint, history


class Batches:
    """Endless shuffled index batches whose place in the data is part of a checkpoint.

    ``next(batches)`` is an int64 tensor [batch] of indices below ``count``. Every pass over the
    data uses each index once, in a new order; the last, shorter batch of a pass is dropped if there
    are others. Give it to ``train`` as ``state={"batches": batches}``.

    Args:
        count: number of samples.
        batch: samples per batch, at most ``count``.
        seed: of the order; the global random state is left alone.
    """

    def __init__(self, count: int, batch: int, *, seed: int = 0) -> None:
        if not 1 <= batch <= count:
            raise ValueError(f"Batches: batch must be from 1 to count = {count}, got {batch}")
        self.count, self.batch = count, batch
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(count, generator=self._generator)
        self._position = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._position + self.batch > self.count:
            self._order = torch.randperm(self.count, generator=self._generator)
            self._position = 0
        chosen = self._order[self._position : self._position + self.batch]
        self._position += self.batch
        return chosen.clone()

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, for a checkpoint."""
        return {
            "generator": self._generator.get_state(),
            "order": self._order.clone(),
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken.

        Raises:
            ValueError: that was over another number of samples.
        """
        if len(state["order"]) != self.count:
            count = len(state["order"])
            raise ValueError(f"its batches are over {count} samples, not {self.count}")
        self._generator.set_state(state["generator"])
        self._order, self._position = state["order"].clone(), int(state["position"])


def train(
    loss_fn: Loss,
    model: nn.Module | Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    scheduler: Any = None,
    clip: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    keep: int = 3,
    resume: bool | str | os.PathLike[str] = False,
    resume_hint: str | None = None,
    state: Mapping[str, Any] | None = None,
    callbacks: Iterable[Callable[[Mapping[str, float]], Any]] = (),
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
    title: str = "",
) -> History:
    """Minimizes ``loss_fn()`` for a number of steps.

    A run that is interrupted and resumed takes the same steps, to the last bit, as one that is not:
    a checkpoint holds the model, optimizer, scheduler, the extra ``state``, the random states of
    torch (CPU and CUDA), numpy and Python, and the history. Anything else that the loss depends on
    from step to step belongs into ``state``.

    Ctrl-C and SIGTERM finish the step at hand, write a checkpoint and raise
    ``TrainingInterrupted``, which says how to resume; a second Ctrl-C stops at once.

    Args:
        loss_fn: called once per step; returns a scalar loss, or a pair of the loss and a mapping of
            further numbers to show and record (``{"nfe": sol.stats.nfe}``).
        model: the module, or the tensors, that checkpoints hold.
        optimizer: a ``torch.optim`` optimizer over the model's parameters (not one that needs a
            closure).
        steps: number of steps in all; a run resumed at step k takes ``steps - k`` more.
        scheduler: a learning-rate scheduler, stepped once per step.
        clip: largest norm of the whole gradient; longer ones are shortened.
        checkpoint: folder for ``step-*.ckpt`` files; None: no checkpoints.
        every: steps between checkpoints; the last step always writes one.
        keep: how many checkpoints to keep.
        resume: True: continue from the newest checkpoint in the folder, or start anew if there is
            none; a path: that file, or the newest in that folder; False: start anew, which asks for
            a folder without checkpoints.
        resume_hint: what the message after an interrupt says to do, for a command line; None: the
            call to make.
        state: further objects with ``state_dict`` and ``load_state_dict``, or of type
            ``torch.Generator``, by name.
        callbacks: functions called after every step with its record.
        log: file (``.jsonl``, ``.csv``) or folder (TensorBoard) for the records.
        progress: show a bar (rich, on a terminal), or plain lines.
        title: what the bar is called.

    Returns:
        The history of the run, with the steps before a resume.

    Raises:
        CheckpointError: a checkpoint cannot be written or read, does not fit, is beyond ``steps``,
            or belongs to an earlier run.
        FileNotFoundError: ``resume`` names a path where there is nothing.
        NonFiniteLoss: the loss or the gradient is NaN or infinite; the last good state was saved.
        OSError: the log cannot be written.
        TrainingInterrupted: Ctrl-C or SIGTERM.
        TypeError: the loss is no real scalar tensor with a graph, or a metric no number; ``model``
            is no module and no tensors, ``state`` cannot be saved, a callback not be called.
        ValueError: an argument is out of range; a metric has the name of a column of its own.

    Example:
        >>> import torch
        >>> from ctorch.training import train
        >>> x = torch.zeros(3, requires_grad=True)
        >>> optimizer = torch.optim.SGD([x], lr=0.1)
        >>> train(lambda: ((x - 1) ** 2).sum(), [x], optimizer, steps=10, progress=False)
        History(10 steps, loss 0.05404)
    """
    _validate(optimizer, steps, every, keep, clip)
    callbacks = _parts_that_fit(model, scheduler, state, callbacks)
    run = _Run(model, optimizer, scheduler, state or {}, checkpoint, keep, resume_hint)
    run.start(resume, steps)
    bar = display(steps, run.step, title, progress)
    records: Log | None = open_log(log, run.step) if log is not None else None
    try:
        with postponed() as interrupted:
            while run.step < steps:
                record = _step(run, loss_fn, clip, interrupted)
                run.history.append(record)
                bar.update(run.step, _shown(record))
                if records is not None:
                    records.write(record)
                for callback in callbacks:
                    callback(record)
                if interrupted() or run.step == steps or run.step % every == 0:
                    run.save()
                if interrupted():
                    raise run.interrupted()
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt:
        raise run.stopped() from None
    finally:
        bar.close()
        if records is not None:
            records.close()
    return run.history


def _step(
    run: _Run, loss_fn: Loss, clip: float | None, interrupted: Callable[[], bool]
) -> dict[str, float]:
    """One step; its record. A failure after Ctrl-C is taken for its consequence."""
    before = run.guard()
    try:
        return _whole_step(run, loss_fn, clip, before)
    except NonFiniteLoss:
        raise
    except Exception as error:  # of a worker or a compiler, say: the terminal stops them, too
        if not interrupted():
            raise
        run.save(before)
        raise run.interrupted() from error


def _whole_step(
    run: _Run, loss_fn: Loss, clip: float | None, before: dict[str, Any] | None
) -> dict[str, float]:
    """The model is untouched when loss or gradient are not finite."""
    begun = time.perf_counter()
    result = loss_fn()
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    real = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
    if not real or not loss.requires_grad or not isinstance(metrics, Mapping):
        raise TypeError(
            "train: loss_fn must return a real scalar tensor that depends on the parameters, or a "
            f"pair of it and a mapping; got {_described(loss)}"
            + (f" and {metrics!r}" if metrics else "")
        )
    numbers = {name: _number(name, metric) for name, metric in metrics.items()}
    value = float(loss.detach())
    if not math.isfinite(value):
        raise run.failed(f"the loss is {value}")
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    gradient = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
    if not math.isfinite(gradient):
        raise run.failed(f"the loss is {value:.6g} but its gradient has norm {gradient}")
    run.good = before
    run.optimizer.step()
    if run.scheduler is not None:
        run.scheduler.step()
    run.step += 1
    seconds = time.perf_counter() - begun
    return {"step": run.step, "loss": value, **numbers, "gradient": gradient, "seconds": seconds}


def _number(name: str, metric: Any) -> float:
    if name in ("step", "loss", "gradient", "seconds"):
        raise ValueError(f"train: a metric may not be called {name!r}: records have that already")
    try:
        return float(metric)
    except (TypeError, ValueError):
        what = _described(metric)
        raise TypeError(f"train: the metric {name!r} must be a number, got {what}") from None


def _shown(record: Mapping[str, float]) -> dict[str, float]:
    return {name: x for name, x in record.items() if name not in ("step", "gradient")}


class _Run:
    """Everything that a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        extra: Mapping[str, Any],
        folder: str | os.PathLike[str] | None,
        keep: int,
        hint: str | None,
    ) -> None:
        self.model = model if isinstance(model, nn.Module) else _Tensors(model)
        self.optimizer, self.scheduler, self.extra = optimizer, scheduler, dict(extra)
        self.folder = None if folder is None else Path(folder)
        self.keep = keep
        self.hint = hint or f"call train(..., checkpoint={str(self.folder)!r}, resume=True)"
        self.step = 0
        self.history = History()
        self.good: dict[str, Any] | None = None  # the last state whose loss was finite

    def start(self, resume: bool | str | os.PathLike[str], steps: int) -> None:
        """Loads the checkpoint that ``resume`` asks for, if any, and sees that others have room."""
        found: list[Path] = []
        own = [] if self.folder is None else _checkpoint.in_folder(self.folder)
        if not isinstance(resume, bool):
            path = Path(resume)
            found = _checkpoint.in_folder(path) if path.is_dir() else [path]
            if not found:
                raise FileNotFoundError(f"no checkpoint in {path}")
        elif resume:
            if self.folder is None:
                raise ValueError("train: resume=True needs checkpoint=, the folder to resume from")
            found = own
        elif own:
            raise CheckpointError(
                f"{self.folder} holds checkpoints of an earlier run, up to {own[-1].name}: "
                "continue it with resume=True, or choose another folder or delete them to "
                "start anew."
            )
        if found:
            self.load(found[-1])
        if self.step > steps:
            raise CheckpointError(
                f"{found[-1]} is of step {self.step}, beyond steps={steps}, which is the number of "
                "steps in all: ask for more, or resume from an earlier checkpoint."
            )
        if self.folder is not None:
            if own and own[-1] > _checkpoint.path_at(self.folder, self.step):
                raise CheckpointError(
                    f"{self.folder} holds checkpoints of later steps than {self.step}, up to "
                    f"{own[-1].name}, which this run would mix with its own: delete them, or "
                    "choose another folder."
                )
            _checkpoint.make_folder(self.folder)

    def load(self, path: Path) -> None:
        saved = _checkpoint.load(path)
        parts = {**self._parts(), **{f"state {name}": part for name, part in self.extra.items()}}
        missing = sorted(set(parts) ^ set(saved["parts"]))
        if missing:
            raise CheckpointError(
                f"{path} does not fit this run: only one of them has {', '.join(missing)}."
            )
        for name, part in parts.items():
            try:
                if isinstance(part, torch.Generator):
                    part.set_state(saved["parts"][name])
                else:
                    part.load_state_dict(saved["parts"][name])
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} does not fit this run's {name}: {error}") from error
        self.step = saved["step"]
        self.history = History.from_state_dict(saved["history"])
        _checkpoint.set_random_state(saved["random"])

    def save(self, snapshot: Mapping[str, Any] | None = None) -> Path | None:
        """Writes the present state, or an earlier one."""
        if self.folder is None:
            return None
        state = dict(snapshot or self.snapshot())
        records = self.history[: state["step"]]
        path = _checkpoint.path_at(self.folder, state["step"])
        try:
            _checkpoint.save(path, {**state, "history": History(records).state_dict()})
        except CheckpointError as error:
            raise CheckpointError(f"{error} {self._way_back()}") from error.__cause__
        _checkpoint.prune(self.folder, self.keep)
        return path

    def snapshot(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        for name, part in self.extra.items():
            own = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            parts[f"state {name}"] = own
        return {"step": self.step, "parts": parts, "random": _checkpoint.random_state()}

    def guard(self) -> dict[str, Any] | None:
        """A copy of the state before a step, to go back to when a later loss is not finite."""
        return None if self.folder is None else _copied(self.snapshot())

    def failed(self, what: str) -> NonFiniteLoss:
        text = f"step {self.step + 1}: {what}."
        path = None
        if self.folder is not None and self.good is not None:
            for later in _checkpoint.in_folder(self.folder):
                if later > _checkpoint.path_at(self.folder, self.good["step"]):
                    later.unlink()  # written in good faith; resuming there would fail at once
            path = self.save(self.good)
        if path is not None:
            text += f" The last state with a finite loss is in {path}: resume from it, with a"
            text += " smaller learning rate or clip=."
        else:
            text += " Try a smaller learning rate or clip=; with checkpoint= the last good state"
            text += " is saved."
        return NonFiniteLoss(text, self.step + 1, path, self.history)

    def interrupted(self) -> TrainingInterrupted:
        """After a step that is done and saved."""
        text = f"interrupted after step {self.step}"
        path = None if self.folder is None else _checkpoint.path_at(self.folder, self.step)
        if path is None:
            text += "; nothing was saved: pass checkpoint= to be able to resume"
        else:
            text += f"; saved {path}. To resume: {self.hint}"
        return TrainingInterrupted(text, self.step, path, self.history)

    def stopped(self) -> TrainingInterrupted:
        """At once, wherever it was."""
        found = [] if self.folder is None else _checkpoint.in_folder(self.folder)
        text = f"stopped at once, after step {self.step}. {self._way_back()}"
        return TrainingInterrupted(text, self.step, found[-1] if found else None, self.history)

    def _way_back(self) -> str:
        """Which checkpoint there is, when the present state cannot be saved."""
        if self.folder is None:
            return "Nothing was saved: pass checkpoint= to be able to resume"
        found = _checkpoint.in_folder(self.folder)
        if not found:
            return f"There is no checkpoint in {self.folder} yet."
        return f"The newest checkpoint is {found[-1]}. To resume: {self.hint}"

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler
        return parts


class _Tensors:
    """A list of tensors with the interface of a module's state."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        return {str(i): t.detach() for i, t in enumerate(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        other = {k: tuple(v.shape) for k, v in state.items()}
        if own != other:
            shapes = f"{list(other.values())}, not {list(own.values())}"
            raise ValueError(f"it holds tensors of shapes {shapes}")
        with torch.no_grad():
            for i, tensor in enumerate(self.tensors):
                tensor.copy_(state[str(i)])


def _copied(value: Any) -> Any:
    """A deep copy of containers and tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, requires_grad={value.requires_grad}"
    return repr(value)


def _parts_that_fit(
    model: Any, scheduler: Any, state: Any, callbacks: Any
) -> list[Callable[[Mapping[str, float]], Any]]:
    """The callbacks as a list, once everything that is an object has the methods it needs."""
    if not isinstance(model, (nn.Module, Iterable)):
        raise TypeError(
            f"train: model must be a module or tensors, got {type(model).__name__}; the order is "
            "train(loss_fn, model, optimizer)"
        )
    if scheduler is not None and not _has(scheduler, "step", "state_dict", "load_state_dict"):
        raise TypeError(f"train: scheduler must be a learning-rate scheduler, got {scheduler!r}")
    if not isinstance(state, (Mapping, type(None))):
        raise TypeError(f"train: state must be a mapping of names to objects, got {state!r}")
    for name, part in (state or {}).items():
        if not isinstance(part, torch.Generator) and not _has(
            part, "state_dict", "load_state_dict"
        ):
            raise TypeError(
                f"train: state[{name!r}] must have state_dict and load_state_dict, or be a "
                f"torch.Generator; got {part!r}"
            )
    called: list[Any] = list(callbacks) if isinstance(callbacks, Iterable) else [None]
    if not all(map(callable, called)):
        raise TypeError(f"train: callbacks must be a list of functions, got {callbacks!r}")
    return called


def _has(part: Any, *methods: str) -> bool:
    return all(callable(getattr(part, method, None)) for method in methods)


def _validate(
    optimizer: torch.optim.Optimizer, steps: int, every: int, keep: int, clip: float | None
) -> None:
    for name, value in (("steps", steps), ("every", every), ("keep", keep)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name != "steps"):
            least = 0 if name == "steps" else 1
            raise ValueError(f"train: {name} must be an integer from {least} on, got {value!r}")
    if clip is not None and (not isinstance(clip, (int, float)) or not clip > 0):
        raise ValueError(f"train: clip must be positive, got {clip!r}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "train: LBFGS evaluates the loss many times per step; take another optimizer"
        )
