"""The numbers of the oracle of the method, apart from torch."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of the method; defaults are the authors'.

    The `use_*` switches take one component out: without SDS gs = 0 and r = 1, without views the judge sees the resized
    image, without noise the latents and kept views get none (noise inside the view parameters is part of those).
    """

    steps: int = 160
    sds_weight: float = 800.0
    sds_weight_final: float = 400.0
    sds_weight_steps: int = 160
    sds_guidance: float = 30.0
    sds_alpha_power: float = 0.0
    sds_sigma_power: float = 0.0
    referee_weight: float = 2.0
    referee_start: int = 0
    referee_stop: int = 150
    referee_balance_epsilon: float = 0.0
    referee_noise: float = 0.2
    referee_losses: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"cosine": 1.0})
    optim_lr: float = 1.0
    optim_lr_final: float = 0.5
    optim_warmup: int = 10
    optim_noise: float = 0.2
    optim_tail_noise: float = 0.01
    ema_decay: float = 0.95
    ema_start: int = 40
    ema_every: int = 60
    ema_alias: bool = False
    views_count: int = 10
    views_keep: int = 10
    views_augmentations: tuple[str, ...] = ("Af", "Pe", "Ji", "Er")
    output: str = "final"
    clamp: str = "hard"
    use_views: bool = True
    use_sds: bool = True
    use_referee: bool = True
    use_ema: bool = True
    use_noise: bool = True

    def sds_weight_at(self, i: int) -> float:
        """Cosine from `sds_weight` at 0 to `sds_weight_final` at `sds_weight_steps`, constant afterwards."""
        share = min(i, self.sds_weight_steps) / self.sds_weight_steps
        return self.sds_weight_final + 0.5 * (self.sds_weight - self.sds_weight_final) * (1 + math.cos(math.pi * share))

    def lr_at(self, i: int) -> float:
        """Linear lr (i + 1) / warmup for i < warmup, then cosine from lr at i = warmup to lr_final at i = steps."""
        if i < self.optim_warmup:
            return self.optim_lr * (i + 1) / self.optim_warmup
        share = (i - self.optim_warmup) / (self.steps - self.optim_warmup)
        return self.optim_lr_final + 0.5 * (self.optim_lr - self.optim_lr_final) * (1 + math.cos(math.pi * share))

    def referee_on(self, i: int) -> bool:
        return self.use_referee and self.referee_start <= i < self.referee_stop

    def restart_after(self, i: int) -> bool:
        k = i + 1
        due = k >= self.ema_start and (k - self.ema_start) % self.ema_every == 0 and k <= self.referee_stop
        return self.use_ema and due
