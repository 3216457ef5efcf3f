"""``ctorch demo``: fit a neural ODE to real data, forecast, draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the network's first weights.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the picture and checkpoints.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Iterations of the universal ODE's fit.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where Ctrl-C ended.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="20 iterations: to see it work.")] = False,
) -> None:
    """Fit a neural ODE to the Hudson Bay lynx-hare record; forecast five years it has not seen."""
    import shlex
    import time

    import ctorch.ops._kernels as kernels
    from ctorch._extras import require
    from ctorch.demo.fit import fit_both
    from ctorch.training import CheckpointError, TrainingInterrupted

    require("matplotlib")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {out}: the folder cannot be made: {error.strerror}.")
        raise typer.Exit(1) from None
    begun = time.perf_counter()
    steps = min(steps, 20) if quick else steps
    print("Hudson Bay record, 1900-1920: pelts of hare and lynx; 1916-1920 are held out.")
    print(f"Kernels: {'compiled' if kernels.HAS_KERNELS else 'reference (see ctorch info)'}.")
    if resume and not any(out.glob("checkpoints/*/step-*.ckpt")):
        print(f"There is no checkpoint in {out}: starting anew.")
    again = f"ctorch demo --resume --seed {seed} --steps {steps} --out {shlex.quote(str(out))}"
    try:
        plain, universal = fit_both(seed, steps, out / "checkpoints", resume, again)
    except TrainingInterrupted as interrupt:
        print(f"\n{interrupt}")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:  # between the fits
        print(f"\ninterrupted. To resume: {again}")
        raise typer.Exit(130) from None
    except CheckpointError as error:
        unread = (
            ""
            if isinstance(error.__cause__, OSError)
            else "\nWithout --resume the demo starts anew."
        )
        print(f"--out {out}: {error}{unread}")
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"--out {out}: checkpoints cannot be kept there: {error}.")
        raise typer.Exit(1) from None
    _report(plain, universal)

    from ctorch.demo.figure import draw

    path = out / "lynx_hare.png"
    try:
        draw(plain, universal, path)
    except OSError as error:
        print(f"\n--out {out}: the picture cannot be written: {error}.\nTo draw it: {again}")
        raise typer.Exit(1) from None
    print(f"\nPicture: {path.resolve()}   ({time.perf_counter() - begun:.0f} s)")


def _report(*fits: object) -> None:
    """The errors of both models, side by side."""
    from ctorch.demo.fit import Fit

    print("\nRoot mean square error of log counts (a factor of e to that power):")
    print(f"  {'':16}{'1900-1915':>18}{'forecast 1916-1920':>24}{'hare':>8}{'lynx':>8}")
    for fit in fits:
        assert isinstance(fit, Fit)
        seen, unseen = (f"{e:.3f} (x {2.718281828**e:.2f})" for e in fit.error)
        each = "".join(f"{fit.forecast_error(i):8.3f}" for i in (0, 1))
        print(f"  {fit.name:16}{seen:>18}{unseen:>24}{each}")
