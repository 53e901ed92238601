"""Noise and masking schedules in plain numpy, one algorithm per file."""

from __future__ import annotations

from pochade.runtime.schedulers.ddim import Ddim, OriginalDdim
from pochade.runtime.schedulers.ddpm import Ddpm
from pochade.runtime.schedulers.diffusion import DiffusionScheduler
from pochade.runtime.schedulers.dpm_solver import DpmSolver, OriginalDpmSolver

SAMPLERS: dict[str, type[DiffusionScheduler]] = {
    "ddpm": Ddpm,
    "ddim": Ddim,
    "dpm-solver": DpmSolver,
    "ddim-original": OriginalDdim,
    "dpm-solver-original": OriginalDpmSolver,
}
"""Samplers of continuous diffusion by the name a user gives."""
