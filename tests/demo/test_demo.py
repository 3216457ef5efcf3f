"""The demo fits, forecasts, draws, and goes on where it was stopped."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import torch

from ctorch.demo import fit as fitting
from ctorch.demo.data import HARE, LYNX, record
from ctorch.demo.fit import fit_both
from ctorch.demo.model import LotkaVolterra, UniversalODE
from ctorch.testing import check_gradients
from ctorch.training import CheckpointError, TrainingInterrupted


def test_the_record_is_the_published_one():
    t, pelts = record()
    assert t.tolist() == list(range(21))
    assert pelts.shape == (21, 2)
    # sums of the published columns, as a guard against a slip of the keyboard
    assert sum(HARE) == pytest.approx(715.7)
    assert sum(LYNX) == pytest.approx(423.5)
    assert pelts[4].tolist() == [36.3, 59.4]


def test_both_vector_fields_have_right_gradients():
    log_counts = record()[1].log()
    plain = LotkaVolterra(log_counts)
    check_gradients(plain, (0.0, torch.zeros(2)), order=2, examples=5)
    check_gradients(UniversalODE(plain, log_counts), (0.0, torch.zeros(2)), order=2, examples=5)


def test_the_first_guess_is_near_what_the_record_implies():
    birth, predation, death, growth = LotkaVolterra(record()[1].log()).log_rates.exp().tolist()
    assert 0.3 < birth < 0.8  # published fits: 0.55, 0.028, 0.80, 0.024
    assert 0.01 < predation < 0.05
    assert 0.5 < death < 1.2
    assert 0.01 < growth < 0.05


def test_a_fit_improves_and_never_sees_the_years_held_out(tmp_path, monkeypatch):
    plain, universal = fit_both(0, 25, tmp_path / "a", progress=False)
    assert plain.history.loss[-1] < 0.06
    assert universal.error[0] < plain.error[0] + 0.05
    t, pelts = record()
    pelts[-5:] *= 3
    monkeypatch.setattr(fitting, "record", lambda: (t, pelts))
    again = fit_both(0, 25, tmp_path / "b", progress=False)
    assert again[0].history.loss == plain.history.loss
    assert again[1].history.loss == universal.history.loss
    assert again[1].error[1] != universal.error[1]


def test_an_interrupted_and_resumed_fit_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = fit_both(3, 6, tmp_path / "whole", progress=False)
    real, calls = UniversalODE.penalty, []

    def strike(self, y):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, y)

    monkeypatch.setattr(UniversalODE, "penalty", strike)
    with pytest.raises(TrainingInterrupted, match="say it again") as caught:
        fit_both(3, 6, tmp_path / "cut", hint="say it again", progress=False)
    assert caught.value.step == 3
    monkeypatch.undo()
    resumed = fit_both(3, 6, tmp_path / "cut", resume=True, progress=False)
    for a, b in zip(whole, resumed, strict=True):
        assert a.history.loss == b.history.loss
        assert torch.equal(a.path, b.path)


def test_a_resume_with_other_settings_is_refused(tmp_path):
    fit_both(0, 2, tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="--seed 0"):
        fit_both(1, 2, tmp_path, resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"with --seed 0 and 2 steps.* has --seed 0 and 3"):
        fit_both(0, 3, tmp_path, resume=True, progress=False)


def test_a_resume_without_a_checkpoint_says_so(tmp_path):
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("matplotlib")
    from ctorch.cli import app

    command = ["demo", "--steps", "1", "--resume", "--out", str(tmp_path)]
    runner = testing.CliRunner()
    (tmp_path / "checkpoints" / "plain").mkdir(parents=True)
    (tmp_path / "checkpoints" / "plain" / ".step-00000001.ckpt.abc.tmp").write_bytes(b"half")
    assert "no checkpoint" in runner.invoke(app(), command).output
    assert "no checkpoint" not in runner.invoke(app(), command).output


def _full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (_full, 1, "step-00000001.ckpt cannot be written: No space left on device"),
        (signal.default_int_handler, 130, "stopped at once, after step 1"),
    ],
    ids=["full-disk", "second-interrupt"],
)
def test_a_checkpoint_that_fails_says_what_there_is_and_how_to_resume(
    tmp_path, monkeypatch, failure, code, said
):
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("matplotlib")
    from ctorch.cli import app

    real = os.fsync

    def fails_later(handle):
        if any(tmp_path.glob("checkpoints/universal/*")):
            failure(2, None)
        real(handle)

    monkeypatch.setattr(os, "fsync", fails_later)
    command = ["demo", "--steps", "1", "--out", str(tmp_path)]
    result = testing.CliRunner().invoke(app(), command)
    output = result.output.replace("\n", "")
    assert result.exit_code == code, output
    assert said in output
    assert "There is no checkpoint in" in output
    assert "Without --resume" not in output
    assert not any((tmp_path / "checkpoints" / "universal").iterdir())
    monkeypatch.undo()
    assert testing.CliRunner().invoke(app(), [*command, "--resume"]).exit_code == 0


def test_an_interrupt_between_the_fits_says_how_to_resume(tmp_path, monkeypatch):
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("matplotlib")
    from ctorch.cli import app

    monkeypatch.setattr(UniversalODE, "__init__", lambda *a: signal.default_int_handler(2, None))
    command = ["demo", "--steps", "1", "--out", str(tmp_path)]
    result = testing.CliRunner().invoke(app(), command)
    assert result.exit_code == 130
    assert "To resume: ctorch demo --resume --seed 0 --steps 1 --out" in result.output


def test_the_command_writes_a_picture_and_says_where(tmp_path):
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("matplotlib")
    from ctorch.cli import app

    result = testing.CliRunner().invoke(app(), ["demo", "--steps", "3", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    picture = tmp_path / "lynx_hare.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(picture) in result.output.replace("\n", "")
    assert "forecast 1916-1920" in result.output
    assert "nfe" in result.output


def test_a_folder_that_cannot_be_made_is_named_before_the_fit(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from ctorch.cli import app

    (tmp_path / "file").write_text("in the way")
    place = str(tmp_path / "file" / "out")
    result = testing.CliRunner().invoke(app(), ["demo", "--quick", "--out", place])
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert f"--out {place}" in result.output


def test_what_cannot_be_written_is_named_and_what_is_another_s_is_kept(tmp_path):
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("matplotlib")
    from ctorch.cli import app

    def run() -> str:
        command = ["demo", "--steps", "1", "--out", str(tmp_path)]
        result = testing.CliRunner().invoke(app(), command)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        return result.output.replace("\n", "")

    (tmp_path / "checkpoints").write_text("in the way")
    assert "checkpoints cannot be kept in" in run()
    (tmp_path / "checkpoints").unlink()
    kept = tmp_path / "checkpoints" / "plain" / "of-another-program"
    kept.parent.mkdir(parents=True)
    kept.touch()
    (tmp_path / "lynx_hare.png").mkdir()
    for _ in range(2):  # the second begins anew
        assert "picture cannot be written" in run()
    assert kept.exists()
