"""ImageReward as a referee: a reward learned from people's preferences (arXiv 2304.05977)."""

from collections.abc import Mapping
from typing import Any

from jax import Array

from referee_jax import config
from referee_jax.models import layers
from referee_jax.referees import blip
from referee_jax.referees.judge import Family

TOKENS = 35  # both ends included, as ImageReward was trained


class Reward(blip.BlipReferee):
    """Loss `reward`: minus the reward, in standard deviations of the authors' data. [CLS] stays."""

    losses = config.LOSSES["image_reward"]
    shape = "rounded"

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids, mask [T]`, unchanged: all of the text reads the image."""
        return tokens

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        ids, mask = (layers.repeat(text[name][None], len(views)) for name in ("input_ids", "mask"))
        return {"reward": -self.network.reward(self._states(views), ids, mask)}

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`reward`."""
        return {"reward": -self.views_losses(view[None], text)["reward"][0]}


def _build(spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any) -> Reward:
    # The authors cut out the middle, whatever a file beside the weights says.
    sizes = {"size": network.config.vision_config.image_size, "do_center_crop": False}
    return blip.from_checkpoint(Reward, network, preprocessing | sizes, image_size=spec.image_size)


FAMILY = Family(
    kind="image_reward",
    build=_build,
    tokens=blip.tokens,
    length=TOKENS,
    published=("THUDM/ImageReward",),
    files=("ImageReward.pt",),
    is_converted=True,
)
