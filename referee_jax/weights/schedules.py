"""Noise schedules of training, and the timesteps of published samplers, as scheduler_config.json names them."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The part of scheduler_config.json about training, and which timesteps its sampler goes through.

    The defaults are those of diffusers' `DDIMScheduler`, and of sampling to the end: `set_alpha_to_one`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True  # whether the last step ends without noise, or at that of timestep 0

    shift = 1.0  # of rectified flows alone

    def __post_init__(self):
        for name, values in (
            ("beta_schedule", ("scaled_linear", "linear")),
            ("prediction_type", ("epsilon", "v_prediction")),
            ("timestep_spacing", ("leading", "trailing", "linspace")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not implemented; supported: {', '.join(values)}")

    def alphas_cumprod(self) -> np.ndarray:
        """float32[num_train_timesteps]: the remaining share of signal variance at each step."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        betas = np.linspace(self.beta_start**power, self.beta_end**power, self.num_train_timesteps) ** (1 / power)
        return np.cumprod(1 - betas).astype(np.float32)

    def first_scale(self, timestep: int) -> float:
        """What the published sampler multiplies its noise by at the first timestep; 1 with "leading" ones."""
        return 1.0 if self.timestep_spacing == "leading" else math.sqrt(1 - self.alphas_cumprod()[timestep])

    def timesteps(self, steps: int) -> list[int]:
        """Where the published sampler goes in so many steps, the noisiest first; the last, -1, is the end without noise.

        As in diffusers, but for "linspace", whose timesteps are rounded.
        """
        total, numbers = self.num_train_timesteps, np.arange(steps)
        if self.timestep_spacing == "leading":
            levels = numbers[::-1] * (total // steps) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            levels = np.round(total - numbers * total / steps) - 1
        else:
            levels = np.round(np.linspace(total - 1, 0, steps))
        return [*np.minimum(levels, total - 1).astype(int).tolist(), -1 if self.set_alpha_to_one else 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Of a rectified flow (`FlowMatchEulerDiscreteScheduler`), whose noise at timestep t has the share t / 1000.

    Attributes:
        shift: of timesteps towards noise, see `shifted` (Esser et al. 2024, arXiv 2403.03206, equation 23).
        last_is_step: whether the sampler's timesteps before the shift end at 1 / steps, as FLUX's pipeline has it, or at
            the least of training, as SD3's has it, which is shifted already. Not a key of diffusers.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    last_is_step: bool = False

    prediction_type = "flow"

    def __post_init__(self):
        if self.num_train_timesteps != 1000:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps} is not implemented; supported: 1000")

    def alphas_cumprod(self) -> None:
        """None: there is no table."""

    def first_scale(self, timestep: float) -> float:
        """What the published sampler multiplies its noise by at the first timestep."""
        return 1.0

    def timesteps(self, steps: int) -> list[float]:
        """Where the published sampler goes in so many steps, the noisiest first; the last, -1, is the end without noise."""
        least = 1 / steps if self.last_is_step else shifted(1 / self.num_train_timesteps, self.shift)
        shares = shifted(np.linspace(1.0, least, steps), self.shift)
        return [*(self.num_train_timesteps * shares).tolist(), -1.0]


def shifted(share, shift: float):
    """The share of noise s' = shift s / (1 + (shift - 1) s)."""
    return shift * share / (1 + (shift - 1) * share)
