"""ImageReward as a referee: the reward that people's preferences taught it (arXiv 2304.05977)."""

from jax import Array

from referee_jax import config
from referee_jax.models import layers
from referee_jax.referees import blip, resizing

TOKENS = 35  # both ends included, as ImageReward was trained


class Reward(blip.BlipReferee):
    """Loss `reward`: minus the reward, in standard deviations of the authors' data; `first_token` is None here."""

    losses = config.LOSSES["image_reward"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids, mask [T]`, as they are: all of the text reads the image."""
        return tokens

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        ids, mask = (layers.repeat(text[name][None], len(views)) for name in ("input_ids", "mask"))
        return {"reward": -self.network.reward(self._states(views), ids, mask)}

    def fit(self, image: Array) -> Array:
        """The middle square, as the authors cut it."""
        return resizing.cropped(image, self.image_size)

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`reward`."""
        return {"reward": -self.views_losses(view[None], text)["reward"][0]}
