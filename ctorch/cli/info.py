"""``ctorch info``: what runs here, on what, and why not faster."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shlex
from pathlib import Path


def info(cache: bool = False) -> None:
    """Show versions, devices, and which kernels are compiled; say what is missing and its cure.

    With --cache: what the cache of compiled solves holds.
    """
    print("\n".join(_cache()) if cache else report())


def report() -> str:
    """The text that ``ctorch info`` prints."""
    return "\n\n".join(["\n".join(part) for part in (_versions(), _kernels(), _extras())])


def _versions() -> list[str]:
    import numpy
    import torch

    from ctorch._version import __version__

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = f"CUDA {torch.version.cuda}: " + ", ".join(gpus)
    else:
        built = torch.version.cuda
        cuda = f"no CUDA device (torch for CUDA {built})" if built else "none (torch for CPU)"
    return [
        f"ctorch   {__version__} in {Path(__file__).resolve().parent.parent}",
        f"torch    {torch.__version__}",
        f"numpy    {numpy.__version__}",
        f"python   {platform.python_version()} on {platform.platform()}",
        f"cpu      {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"gpu      {cuda}",
    ]


def _kernels() -> list[str]:
    import torch

    importlib.import_module("ctorch.ops")
    from ctorch.ops import _kernels as kernels

    note = kernels.build_note()
    lines = ["kernels  " + ("compiled" if kernels.HAS_KERNELS else "reference (plain PyTorch)")]
    if kernels.HAS_KERNELS and note:
        lines.append(f"         built with {note['compiler']} against torch {note['torch']}")
    if kernels.HAS_CUDA_KERNELS and note:
        lines.append(
            f"         CUDA kernels for {', '.join('sm_' + a for a in note['cuda_archs'])}"
        )
    operators = kernels.operators()
    width = max(map(len, operators), default=0)
    for name in operators:
        cpu, cuda = (kernels.implementation(name, device) for device in ("cpu", "cuda"))
        lines.append(f"         {name:<{width}}  cpu: {cpu:<9}  cuda: {cuda}")
    if not kernels.HAS_KERNELS:
        lines.append(f"         why: {kernels.reason()}")
    elif torch.version.cuda and not kernels.HAS_CUDA_KERNELS:
        lines.append(f"         why no CUDA kernels: {kernels.cuda_reason()}")
    return lines


def _cache() -> list[str]:
    from ctorch.codegen import build
    from ctorch.codegen import cache as stored

    try:
        stored.check_writable()
        held = stored.contents()
        kept = [
            f"cache    {held.folder}",
            f"         {held.libraries} compiled solves, {held.size / 1e6:.1f} MB"
            " (`ctorch cache clear` removes them)",
        ]
    except OSError as error:
        kept = [f"cache    none: {error} (set CTORCH_CACHE_DIR)"]
    try:
        compiler = shlex.join(build.compiler())
    except (build.NoCompiler, build.CompileError) as error:
        compiler = f"none: {error}"
    return [
        *kept,
        f"compiler {compiler}",
        f"headers  {build.include_folder()}",
    ]


def _extras() -> list[str]:
    from ctorch._extras import EXTRAS, cure

    lines = []
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        state = f"{', '.join(missing)} missing: {cure(missing[0])}" if missing else "installed"
        lines.append(f"         {extra:<8} {state}")
    lines[0] = "extras" + lines[0].removeprefix("      ")
    return lines
