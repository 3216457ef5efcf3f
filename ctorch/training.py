"""One small training loop for every model: progress, logs, atomic checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctorch import _checkpoint
from ctorch._checkpoint import CheckpointError as CheckpointError
from ctorch._logs import Log, open_log
from ctorch._progress import display

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
    """Ctrl-C or SIGTERM ended the training after a whole step.

    Attributes:
        step: steps done.
        checkpoint: the file that holds them; None where no checkpoints were asked for.
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


class History(Sequence[Mapping[str, float]]):
    """The records of a run, one mapping per step: ``step``, ``loss``, ``gradient``, ``seconds``.

    Metrics that the loss function returns stand beside them.

    ``history["loss"]`` is the column of that name, as a list; ``history[3]`` the fourth record.

    Args:
        records: to begin with.
    """

    def __init__(self, records: Iterable[Mapping[str, float]] = ()) -> None:
        self._records = [dict(r) for r in records]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [r[key] for r in self._records if key in r]
        return self._records[key]

    def __repr__(self) -> str:
        loss = f", loss {self['loss'][-1]:.4g}" if self else ""
        return f"History({len(self)} steps{loss})"

    @property
    def loss(self) -> list[float]:
        """The loss of every step, before the step's update."""
        return list(self["loss"])

    def append(self, record: Mapping[str, float]) -> None:
        """Adds the record of a step."""
        self._records.append(dict(record))

    def state_dict(self) -> dict[str, Any]:
        """Columns as float64 tensors; NaN where a record lacks one."""
        names = dict.fromkeys(name for r in self._records for name in r)
        return {
            name: torch.tensor([r.get(name, math.nan) for r in self._records], dtype=torch.float64)
            for name in names
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> History:
        """What ``state_dict`` was made from."""
        columns = {name: column.tolist() for name, column in state.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return cls({k: v for k, v in row.items() if v == v} for row in rows)


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
        CheckpointError: a checkpoint cannot be read, does not fit, or belongs to an earlier run.
        FileNotFoundError: ``resume`` names a path where there is nothing.
        NonFiniteLoss: the loss or the gradient is NaN or infinite; the last good state was saved.
        TrainingInterrupted: Ctrl-C or SIGTERM.
        TypeError: the loss is no scalar tensor with a graph; ``model`` is no module and no tensors.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from ctorch.training import train
        >>> x = torch.zeros(3, requires_grad=True)
        >>> optimizer = torch.optim.SGD([x], lr=0.1)
        >>> train(lambda: ((x - 1) ** 2).sum(), [x], optimizer, steps=10, progress=False)
        History(10 steps, loss 0.05404)
    """
    _validate(optimizer, steps, every, keep, clip)
    if not isinstance(model, (nn.Module, Iterable)):
        raise TypeError(
            f"train: model must be a module or tensors, got {type(model).__name__}; the order is "
            "train(loss_fn, model, optimizer)"
        )
    run = _Run(model, optimizer, scheduler, state or {}, checkpoint, keep)
    run.start(resume)
    bar = display(steps, run.step, title, progress)
    records: Log | None = open_log(log, run.step) if log is not None else None
    try:
        with _interrupts() as interrupted:
            while run.step < steps:
                record = _step(run, loss_fn, clip)
                run.history.append(record)
                bar.update(run.step, _shown(record))
                if records is not None:
                    records.write(record)
                for callback in callbacks:
                    callback(record)
                if interrupted() or run.step == steps or run.step % every == 0:
                    run.save()
                if interrupted() and run.step < steps:
                    raise run.interrupted(resume_hint)
    finally:
        bar.close()
        if records is not None:
            records.close()
    return run.history


def _step(run: _Run, loss_fn: Loss, clip: float | None) -> dict[str, float]:
    """One step; its record. The model is untouched when loss or gradient are not finite."""
    begun = time.perf_counter()
    before = run.guard()
    result = loss_fn()
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            "train: loss_fn must return a scalar tensor that depends on the parameters, or a pair "
            f"of it and a mapping; got {_described(loss)}"
        )
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
    numbers = {name: float(number) for name, number in metrics.items()}
    seconds = time.perf_counter() - begun
    return {"step": run.step, "loss": value, **numbers, "gradient": gradient, "seconds": seconds}


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
    ) -> None:
        self.model = model if isinstance(model, nn.Module) else _Tensors(model)
        self.optimizer, self.scheduler, self.extra = optimizer, scheduler, dict(extra)
        self.folder = None if folder is None else Path(folder)
        self.keep = keep
        self.step = 0
        self.history = History()
        self.good: dict[str, Any] | None = None  # the last state whose loss was finite

    def start(self, resume: bool | str | os.PathLike[str]) -> None:
        """Loads the checkpoint that ``resume`` asks for, if any."""
        if isinstance(resume, bool):
            if self.folder is None:
                if resume:
                    raise ValueError(
                        "train: resume=True needs checkpoint=, the folder to resume from"
                    )
                return
            found = _checkpoint.in_folder(self.folder)
            if found and not resume:
                raise CheckpointError(
                    f"{self.folder} holds checkpoints of an earlier run, up to {found[-1].name}: "
                    "continue it with resume=True, or choose another folder or delete them to "
                    "start anew."
                )
        else:
            path = Path(resume)
            found = _checkpoint.in_folder(path) if path.is_dir() else [path]
            if not found:
                raise FileNotFoundError(f"no checkpoint in {path}")
        if found:
            self.load(found[-1])

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
        _checkpoint.save(path, {**state, "history": History(records).state_dict()})
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

    def interrupted(self, hint: str | None) -> TrainingInterrupted:
        text = f"interrupted after step {self.step}"
        path = None if self.folder is None else _checkpoint.path_at(self.folder, self.step)
        if path is None:
            text += "; nothing was saved: pass checkpoint= to be able to resume"
        else:
            how = hint or f"call train(..., checkpoint={str(self.folder)!r}, resume=True)"
            text += f"; saved {path}. To resume: {how}"
        return TrainingInterrupted(text, self.step, path, self.history)

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


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or SIGTERM came; a second SIGINT stops at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


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


def _validate(
    optimizer: torch.optim.Optimizer, steps: int, every: int, keep: int, clip: float | None
) -> None:
    for name, value in (("steps", steps), ("every", every), ("keep", keep)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name != "steps"):
            least = 0 if name == "steps" else 1
            raise ValueError(f"train: {name} must be an integer from {least} on, got {value!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"train: clip must be positive, got {clip!r}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "train: LBFGS evaluates the loss many times per step; take another optimizer"
        )
