"""The training loop: resuming changes nothing, files are whole or absent, failures are named."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ctorch import _checkpoint
from ctorch._signals import postponed
from ctorch.training import (
    Batches,
    CheckpointError,
    NonFiniteLoss,
    TrainingInterrupted,
    train,
)

ROOT = Path(__file__).parents[1]


def problem(seed: int = 0):
    """A model whose loss depends on everything that a checkpoint must hold."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what is tested
    random.seed(seed)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    batches = Batches(20, 6, seed=3)
    own = torch.Generator().manual_seed(4)

    def loss():
        noise = torch.randn(6, 3) + np.random.rand() + random.random()  # noqa: NPY002
        noise = noise + torch.rand(1, generator=own)
        return (net(x[next(batches)] + 0.1 * noise) ** 2).mean(), {"nfe": 3}

    return {
        "loss_fn": loss,
        "model": net,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "state": {"batches": batches, "own": own},
        "progress": False,
    }


def same_state(a, b) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(tmp_path):
    whole = problem()
    history = train(**whole, steps=17)

    train(**problem(), steps=7, checkpoint=tmp_path)
    rest = problem(seed=99)  # other weights and random states, all to be replaced
    resumed = train(**rest, steps=17, checkpoint=tmp_path, resume=True)

    assert resumed.loss == history.loss
    assert resumed["gradient"] == history["gradient"]
    assert len(resumed) == 17
    assert same_state(rest["model"], whole["model"])
    assert rest["scheduler"].get_last_lr() == whole["scheduler"].get_last_lr()


def test_checkpoints_do_not_change_the_run(tmp_path):
    assert (
        train(**problem(), steps=9).loss
        == train(**problem(), steps=9, checkpoint=tmp_path, every=2).loss
    )


def test_an_interrupt_finishes_the_step_saves_and_says_how_to_resume(tmp_path):
    def strike(record):
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="resume=True") as caught:
        train(**problem(), steps=20, checkpoint=tmp_path, callbacks=[strike])
    assert caught.value.step == 4
    assert caught.value.checkpoint == tmp_path / "step-00000004.ckpt"
    assert str(caught.value.checkpoint) in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train(**problem(9), steps=20, checkpoint=tmp_path, resume=True)
    assert resumed.loss == train(**problem(), steps=20).loss


def test_an_interrupt_without_checkpoints_says_what_was_missing():
    with pytest.raises(TrainingInterrupted, match="pass checkpoint="):
        train(**problem(), steps=5, callbacks=[lambda r: os.kill(os.getpid(), signal.SIGTERM)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_process_leaves_a_checkpoint_that_resumes(tmp_path, number):
    process = _start(tmp_path, "(x**2).sum(), time.sleep(0.01)", steps=100000)
    _wait_for_line(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "To resume: run me again" in errors
    (path,) = _checkpoint.in_folder(tmp_path)
    assert _checkpoint.load(path)["step"] > 0


def test_a_process_killed_while_it_writes_leaves_only_whole_checkpoints(tmp_path):
    for _ in range(4):
        process = _start(tmp_path, "(x**2).sum()", steps=100000, every=1)
        _wait_for_line(process)
        time.sleep(random.uniform(0.0, 0.15))
        process.kill()
        process.wait()
        found = _checkpoint.in_folder(tmp_path)
        assert found
        for path in found:
            _checkpoint.load(path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "step-00000001.ckpt"
    _checkpoint.save(path, {"step": 1})

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-00000001\.ckpt cannot be written: no space"):
        _checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert _checkpoint.load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_newest_checkpoint_and_how_to_resume(tmp_path):
    limit, room = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    x = torch.ones(20000, requires_grad=True)
    own = {"model": [x], "optimizer": torch.optim.SGD([x], lr=0.1), "progress": False}
    common = {"loss_fn": lambda: (x**2).sum(), "checkpoint": tmp_path, **own}

    def fill(record):
        if record["step"] == 3:
            resource.setrlimit(limit, (50000, room[1]))

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CheckpointError) as caught:
            train(**common, steps=9, every=2, callbacks=[fill], resume_hint="run me again")
    finally:
        resource.setrlimit(limit, room)
        signal.signal(signal.SIGXFSZ, before)
    (kept,) = tmp_path.iterdir()
    newest = f"The newest checkpoint is {kept}. To resume: run me again"
    assert str(caught.value).endswith(
        f"step-00000004.ckpt cannot be written: File too large. {newest}"
    )
    assert len(train(**common, steps=9, resume=True)) == 9


def test_a_second_interrupt_stops_at_once_and_names_the_newest_checkpoint(tmp_path):
    def twice(record):
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=r"at once, after step 5.*call train") as caught:
        train(**problem(), steps=20, every=2, checkpoint=tmp_path, callbacks=[twice])
    assert caught.value.checkpoint == tmp_path / "step-00000004.ckpt"
    assert caught.value.step == 5
    resumed = train(**problem(9), steps=20, checkpoint=tmp_path, resume=True)
    assert resumed.loss == train(**problem(), steps=20).loss
    with pytest.raises(TrainingInterrupted, match="Nothing was saved"):
        train(**problem(), steps=20, callbacks=[twice])


def test_an_interrupt_in_the_last_step_is_not_lost(tmp_path):
    def strike(record):
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 4"):
        train(**problem(), steps=4, checkpoint=tmp_path, callbacks=[strike])
    assert len(train(**problem(), steps=4, checkpoint=tmp_path, resume=True)) == 4


def test_a_signal_that_nobody_asked_about_comes_again():
    with pytest.raises(KeyboardInterrupt), postponed():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_step_that_fails_after_an_interrupt_is_undone_and_saved(tmp_path, interrupted):
    parts = problem()
    real, calls = parts["loss_fn"], []

    def fails():
        value = real()
        calls.append(1)
        if len(calls) == 4:
            if interrupted:
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("a worker died")
        return value

    expected = TrainingInterrupted if interrupted else RuntimeError
    with pytest.raises(expected) as caught:
        train(**(parts | {"loss_fn": fails}), steps=20, checkpoint=tmp_path)
    if interrupted:
        assert caught.value.step == 3
        assert str(caught.value.__cause__) == "a worker died"
        resumed = train(**problem(9), steps=20, checkpoint=tmp_path, resume=True)
        assert resumed.loss == train(**problem(), steps=20).loss


def test_checkpoints_of_later_steps_are_not_mixed_with_new_ones(tmp_path):
    train(**problem(), steps=10, checkpoint=tmp_path, every=2)
    early = tmp_path / "step-00000006.ckpt"
    with pytest.raises(CheckpointError, match=r"later steps than 6, up to step-00000010\.ckpt"):
        train(**problem(), steps=10, checkpoint=tmp_path, resume=early)
    with pytest.raises(CheckpointError, match="step 10, beyond steps=9"):
        train(**problem(), steps=9, checkpoint=tmp_path, resume=True)
    assert len(train(**problem(), steps=10, checkpoint=tmp_path / "new", resume=early)) == 10


def test_a_folder_that_cannot_be_made_is_named_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    parts = problem() | {"loss_fn": lambda: pytest.fail("a step was taken")}
    with pytest.raises(CheckpointError, match=r"kept in .*file.*: File exists"):
        train(**parts, steps=3, checkpoint=tmp_path / "file")


def test_a_state_that_could_not_be_read_again_is_refused_when_it_is_written(tmp_path):
    batches = Batches(20, 6)
    batches.state_dict = lambda: {"position": np.float64(3)}
    with pytest.raises(CheckpointError, match=r"could not be read again.*numpy"):
        train(**(problem() | {"state": {"own": batches}}), steps=1, checkpoint=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    train(**problem(), steps=1, checkpoint=tmp_path)
    path = tmp_path / "step-00000001.ckpt"
    torch.save(_checkpoint.load(path) | {"version": 2}, path)
    with pytest.raises(CheckpointError, match="version 2, this ctorch reads 1"):
        train(**problem(), steps=2, checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_log_that_cannot_be_written_is_named_and_stays_whole(tmp_path, monkeypatch, suffix):
    log = tmp_path / f"log{suffix}"
    train(**problem(), steps=4, checkpoint=tmp_path / "kept", log=log)
    before = log.read_text()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=rf"the log cannot be written: No space.*log\{suffix}"):
        train(**problem(), steps=6, checkpoint=tmp_path / "kept", resume=True, log=log)
    assert log.read_text() == before


def test_only_the_last_checkpoints_are_kept_and_half_written_ones_removed(tmp_path):
    (tmp_path / ".step-00000001.ckpt.abc.tmp").write_bytes(b"half")
    train(**problem(), steps=10, checkpoint=tmp_path, every=2, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000008.ckpt",
        "step-00000010.ckpt",
    ]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    """Changes one byte of the largest record, behind the archive's back."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda i: i.file_size)
    data = bytearray(path.read_bytes())
    data[record.header_offset + 30 + len(record.filename) + record.file_size // 2 + 64] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip, lambda p: p.write_bytes(b"nonsense"), lambda p: torch.save({"a": 1}, p)],
    ids=["truncated", "flipped", "nonsense", "foreign"],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    train(**problem(), steps=3, checkpoint=tmp_path)
    path = tmp_path / "step-00000003.ckpt"
    damage(path)
    with pytest.raises(CheckpointError, match=r"step-00000003\.ckpt.*delete it"):
        train(**problem(), steps=5, checkpoint=tmp_path, resume=True)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "step-00000001.ckpt"
    torch.save({"format": _checkpoint.FORMAT, "version": 1, "trap": Trap()}, path)
    with pytest.raises(CheckpointError):
        train(**problem(), steps=5, resume=path)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_model_or_run_is_refused(tmp_path):
    train(**problem(), steps=3, checkpoint=tmp_path)
    other = problem()
    other["model"][3] = nn.Linear(5, 2)
    with pytest.raises(CheckpointError, match="does not fit this run's model"):
        train(**other, steps=5, checkpoint=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="state own"):
        train(**(problem() | {"state": {}}), steps=5, checkpoint=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="earlier run"):
        train(**problem(), steps=5, checkpoint=tmp_path)
    with pytest.raises(FileNotFoundError):
        train(**problem(), steps=5, resume=tmp_path / "nothing.ckpt")


def test_resume_true_in_an_empty_folder_starts_anew(tmp_path):
    assert (
        train(**problem(), steps=3, checkpoint=tmp_path / "new", resume=True).loss
        == train(**problem(), steps=3).loss
    )


@pytest.mark.parametrize("every", [1, 100])
def test_a_nan_loss_stops_and_saves_the_last_state_with_a_finite_one(tmp_path, every):
    x = torch.ones(1, requires_grad=True)

    def loss():  # its slope is 1, so that x goes 1, 0, -1, -2: the root fails at the fourth step
        return (x + 0 * (x.detach() + 1.5).sqrt()).sum()

    optimizer = torch.optim.SGD([x], lr=1.0)
    with pytest.raises(NonFiniteLoss, match="step 4: the loss is nan") as caught:
        train(loss, [x], optimizer, steps=9, checkpoint=tmp_path, every=every, progress=False)
    assert caught.value.checkpoint == tmp_path / "step-00000002.ckpt"
    assert _checkpoint.in_folder(tmp_path)[-1] == caught.value.checkpoint
    assert _checkpoint.load(caught.value.checkpoint)["parts"]["model"]["0"].item() == -1
    assert len(caught.value.history) == 3


def test_an_infinite_gradient_stops_before_it_is_applied():
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(NonFiniteLoss, match="gradient has norm inf"):
        train(lambda: x.sqrt().sum(), [x], torch.optim.SGD([x], lr=1.0), steps=3, progress=False)
    assert x.item() == 0.0


def test_clip_bounds_the_step():
    x = torch.full((4,), 100.0, requires_grad=True)
    train(
        lambda: (x**2).sum(), [x], torch.optim.SGD([x], lr=1.0), steps=1, clip=0.5, progress=False
    )
    assert (x - 100).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_log_holds_every_step_once_after_an_interrupt(tmp_path, suffix):
    log = tmp_path / f"log{suffix}"
    train(**problem(), steps=4, checkpoint=tmp_path, log=log)
    with log.open("a") as file:
        file.write(
            '{"step": 5, "los' if suffix == ".jsonl" else "5,0.1"
        )  # killed in mid-line, not saved
    train(**problem(), steps=6, checkpoint=tmp_path, resume=True, log=log)
    lines = log.read_text().splitlines()
    if suffix == ".jsonl":
        steps = [json.loads(line)["step"] for line in lines]
    else:
        assert lines[0] == "step,loss,nfe,gradient,seconds"
        steps = [int(float(line.split(",")[0])) for line in lines[1:]]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_tensorboard_folder_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    train(**problem(), steps=2, log=tmp_path / "board")
    assert any(p.name.startswith("events") for p in (tmp_path / "board").iterdir())


def test_plain_lines_show_loss_metrics_and_time(capsys):
    train(**(problem() | {"progress": True}), steps=40, title="fit")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 22
    assert lines[-1].startswith("fit 40/40  loss ")
    assert "nfe 3" in lines[-1]
    assert "ms/it" in lines[-1]


def test_batches_visit_every_sample_once_per_pass_in_a_new_order():
    batches = Batches(12, 4, seed=0)
    first, second = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    kept = batches.state_dict()
    after = [next(batches).tolist() for _ in range(5)]
    other = Batches(12, 4, seed=5)
    other.load_state_dict(kept)
    assert [next(other).tolist() for _ in range(5)] == after
    with pytest.raises(ValueError, match="samples"):
        Batches(11, 4).load_state_dict(kept)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"steps": -1}, ValueError, "steps"),
        ({"steps": 2.5}, ValueError, "steps"),
        ({"every": 0}, ValueError, "every"),
        ({"keep": 0}, ValueError, "keep"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"resume": True}, ValueError, "needs checkpoint="),
        ({"log": "log.txt"}, ValueError, r"\.jsonl"),
        ({"loss_fn": lambda: torch.zeros(2, requires_grad=True)}, TypeError, r"shape \[2\]"),
        ({"loss_fn": lambda: torch.zeros(())}, TypeError, "requires_grad=False"),
        ({"model": lambda: None}, TypeError, r"train\(loss_fn, model, optimizer\)"),
        ({"loss_fn": lambda: 3.0}, TypeError, "scalar tensor"),
        ({"loss_fn": lambda: (_scalar(), 3)}, TypeError, "scalar tensor.* and 3"),
        ({"loss_fn": lambda: _scalar() * 1j}, TypeError, "real scalar"),
        ({"loss_fn": lambda: (_scalar(), {"nfe": None})}, TypeError, "metric 'nfe'.*None"),
        ({"loss_fn": lambda: (_scalar(), {"step": 3})}, ValueError, "'step'"),
        ({"state": 3}, TypeError, "state must be a mapping"),
        ({"state": {"epoch": 3}}, TypeError, r"state\['epoch'\]"),
        ({"scheduler": 3}, TypeError, "scheduler"),
        ({"callbacks": print}, TypeError, "list of functions"),
        ({"callbacks": [3]}, TypeError, "list of functions"),
        ({"log": 3}, TypeError, "log: expected a file name"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    with pytest.raises(error, match=text):
        train(**(problem() | {"steps": 3} | change))


def _scalar() -> torch.Tensor:
    return torch.zeros((), requires_grad=True)


def test_callbacks_that_come_as_a_generator_are_called_after_every_step():
    seen: list[float] = []
    train(**problem(), steps=3, callbacks=(f for f in [lambda r: seen.append(r["step"])]))
    assert seen == [1, 2, 3]


def test_lbfgs_is_refused():
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="LBFGS"):
        train(lambda: x.sum(), [x], torch.optim.LBFGS([x]), steps=1)


def _start(folder: Path, loss: str, steps: int, every: int = 100) -> subprocess.Popen[str]:
    """A process that trains; it prints a line per step."""
    script = textwrap.dedent(f"""
        import time, torch
        from ctorch.training import train
        x = torch.ones(2000, requires_grad=True)
        train(lambda: ({loss},)[0] if "sleep" not in {loss!r} else ({loss})[0], [x],
              torch.optim.Adam([x], lr=1e-3), steps={steps}, checkpoint={str(folder)!r},
              every={every}, resume=True, resume_hint="run me again", progress=False,
              callbacks=[lambda r: print(r["step"], flush=True)])
    """)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline(), process.stderr and process.stderr.read()
