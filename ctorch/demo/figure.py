"""The demo's picture: data, fit, forecast, phase portrait, and what the network has learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.demo.data import FIRST_YEAR, HELD_OUT, record
from ctorch.demo.fit import Fit
from ctorch.demo.model import UniversalODE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HARE, LYNX, RED, PLAIN = "#b5651d", "#2a6f97", "#c1121f", "#8d99ae"
INK, PAPER = "#22223b", "#fbfaf7"
STYLE: Any = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "font.size": 10,
    "legend.frameon": False,
}


def draw(plain: Fit, universal: Fit, path: Path) -> None:
    """Writes the picture to ``path`` (PNG)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, hspace=0.05, wspace=0.0)
        figure = Figure(figsize=(13, 8.6), layout=layout)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.15))
        _series(figure.add_subplot(grid[0, :3]), 0, "Snowshoe hare", HARE, plain, universal)
        _series(figure.add_subplot(grid[0, 3:]), 1, "Canada lynx", LYNX, plain, universal)
        _portrait(figure.add_subplot(grid[1, :2]), plain, universal)
        _correction(figure.add_subplot(grid[1, 2:4]), universal)
        _losses(figure.add_subplot(grid[1, 4:]), plain, universal)
        figure.suptitle(
            "A universal differential equation fitted to the Hudson Bay record, 1900-1915, "
            "and its forecast to 1920",
            x=0.012, ha="left", fontsize=14, fontweight="bold",
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _series(ax: Axes, column: int, name: str, color: str, plain: Fit, universal: Fit) -> None:
    """One species over the years: what was seen, what was held out, and both models."""
    t, pelts = record()
    years, counts = (t + FIRST_YEAR).numpy(), pelts[:, column].numpy()
    end = len(years) - HELD_OUT
    fine = torch.linspace(0, float(t[-1]), 401, dtype=torch.float64)
    at = (fine + FIRST_YEAR).numpy()
    ax.axvspan(years[end - 1] + 0.5, years[-1] + 0.4, color="#e9e4d8", lw=0)
    ax.text(years[end - 1] + 0.65, 0.965, "held out", transform=ax.get_xaxis_transform(),
            va="top", color="#77705f", fontsize=9)  # fmt: skip
    for fit, hue, width, style in ((plain, PLAIN, 1.6, (0, (5, 2))), (universal, color, 2.4, "-")):
        label = f"{fit.name}, forecast error {fit.forecast_error(column):.2f}"
        line = fit.solve(fine)[:, column].numpy()
        ax.plot(at, line, color=hue, lw=width, ls=style, label=label)
    ax.plot(years[:end], counts[:end], "o", color=INK, ms=5.5, label="record")
    ax.plot(years[end:], counts[end:], "o", mfc=PAPER, mec=INK, mew=1.5, ms=5.5)
    ax.set(title=name, ylabel="pelts (thousands)", ylim=(0, 1.32 * counts.max()))
    ax.set_xlim(FIRST_YEAR - 0.5, years[-1] + 0.4)
    ax.set_xticks(range(FIRST_YEAR, FIRST_YEAR + 21, 4))
    ax.legend(loc="upper left", fontsize=9, ncols=1, borderaxespad=0.2)


def _portrait(ax: Axes, plain: Fit, universal: Fit) -> None:
    """Orbits over the learned vector field, on logarithmic axes."""
    import numpy as np

    _, pelts = record()
    x, y, points = _plane(pelts, 28)
    with torch.no_grad():
        rates = universal.field(torch.tensor(0.0), points).reshape(28, 28, 2).numpy()
    speed = np.hypot(rates[..., 0], rates[..., 1])
    ax.streamplot(x, y, rates[..., 0], rates[..., 1], color=np.log(speed + 1e-3), cmap="YlGnBu",
                  density=1.0, linewidth=0.7, arrowsize=0.8, zorder=1)  # fmt: skip
    fine = torch.linspace(0, 20, 801, dtype=torch.float64)
    for fit, color, style in ((plain, PLAIN, (0, (5, 2))), (universal, RED, "-")):
        path = fit.solve(fine).log().numpy()
        ax.plot(path[:, 0], path[:, 1], color=color, lw=2, ls=style, label=fit.name, zorder=2)
    logs = pelts.log().numpy()
    ax.plot(logs[:-HELD_OUT, 0], logs[:-HELD_OUT, 1], "o", color=INK, ms=4.5, zorder=3)
    ax.plot(logs[-HELD_OUT:, 0], logs[-HELD_OUT:, 1], "o", mfc=PAPER, mec=INK, mew=1.3, ms=4.5,
            zorder=3)  # fmt: skip
    _log_axes(ax, x, y)
    ax.set_title("Phase portrait and learned vector field")
    ax.legend(loc="upper left", fontsize=9, facecolor=PAPER, frameon=True, edgecolor="none",
              framealpha=0.85)  # fmt: skip


def _correction(ax: Axes, universal: Fit) -> None:
    """What the network adds to Lotka-Volterra, and where the data say something about it."""
    field = universal.field
    assert isinstance(field, UniversalODE)
    _, pelts = record()
    x, y, points = _plane(pelts, 13)
    with torch.no_grad():
        added = field.correction(points).reshape(13, 13, 2).numpy()
        size = field.correction(_plane(pelts, 60)[2]).norm(dim=-1).reshape(60, 60).numpy()
    image = ax.imshow(size, extent=(x[0], x[-1], y[0], y[-1]), origin="lower", aspect="auto",
                      cmap="Oranges", alpha=0.75)  # fmt: skip
    ax.quiver(x, y, added[..., 0], added[..., 1], color=INK, width=0.0045, alpha=0.8)
    logs = pelts[:-HELD_OUT].log().numpy()
    ax.plot(logs[:, 0], logs[:, 1], "o", color=PAPER, mec=INK, mew=0.8, ms=4)
    _log_axes(ax, x, y)
    ax.set_title("What the network adds (per year)")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02).outline.set_visible(False)  # type: ignore[operator]


def _losses(ax: Axes, plain: Fit, universal: Fit) -> None:
    """Both trainings."""
    for fit, color in ((plain, PLAIN), (universal, RED)):
        last = f"{fit.history.loss[-1]:.3f}" if fit.history.loss else "-"
        label = f"{fit.name}: {last}"
        ax.semilogy(fit.history["step"], fit.history.loss, color=color, lw=1.8, label=label)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    ax.set_yticks(ticks, [f"{v:g}" for v in ticks])
    ax.minorticks_off()
    ax.set(title="Loss", xlabel="iteration")
    ax.grid(axis="y", color="#e2ddd2", lw=0.6)
    ax.legend(loc="upper right", fontsize=9)


def _plane(pelts: Tensor, count: int) -> tuple[Any, Any, Tensor]:
    """A grid over the log-counts: both axes as arrays, and its points [count * count, 2]."""
    logs = pelts.log()
    low, high = logs.amin(0) - 0.35, logs.amax(0) + 0.35
    x, y = (
        torch.linspace(float(low[i]), float(high[i]), count, dtype=torch.float64) for i in (0, 1)
    )
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    return x.numpy(), y.numpy(), points


def _log_axes(ax: Axes, x: Any, y: Any) -> None:
    """Ticks in thousands of pelts on axes that hold logarithms."""
    import numpy as np

    ticks = np.array([5, 10, 20, 40, 80])
    ax.set(
        xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="hare (thousands)", ylabel="lynx (thousands)"
    )
    ax.set_xticks(np.log(ticks), [str(v) for v in ticks])
    ax.set_yticks(np.log(ticks), [str(v) for v in ticks])
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
