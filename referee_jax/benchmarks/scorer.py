"""A referee's scores of images, each with its own texts, in batches over the devices of this process."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import PIL.Image

from referee_jax import referees
from referee_jax.engine import parallel


class Scorer:
    """One referee as a function of images and texts.

    Args:
        judge: the referee.
        texts: the most texts that an image may have.
        batch_size: images at once on each device.
        tokenize: text -> tokens; the judge's, unless a benchmark has its own.
        devices: by default all of this process.
    """

    def __init__(
        self,
        judge: referees.Judge,
        *,
        texts: int = 1,
        batch_size: int = 16,
        tokenize: Callable[[str], dict[str, np.ndarray]] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.tokenize, self.texts, self.mesh = tokenize or judge.tokenize, texts, parallel.prompt_mesh(devices)
        self.batch_size = batch_size * self.mesh.shape[parallel.AXIS]
        self.preprocess = judge.preprocess
        self.referee = parallel.place(judge.referee, self.mesh, batched=False)
        batched = parallel.across_devices(jax.vmap(_scores, in_axes=(None, 0, 0)), self.mesh, (False, True, True))
        self.program = jax.jit(batched)

    def __call__(
        self, images: Sequence[PIL.Image.Image], texts: Sequence[Sequence[str]]
    ) -> list[list[dict[str, float]]]:
        """The scores of each image with each of its texts; at most `batch_size` images.

        Raises ValueError for more, or where an image has no text or too many; PromptError as from `tokenize`.
        """
        if not 0 < len(images) == len(texts) <= self.batch_size:
            raise ValueError(f"{len(images)} images and {len(texts)} lists of texts, at most {self.batch_size} at once")
        if wrong := [len(group) for group in texts if not 0 < len(group) <= self.texts]:
            raise ValueError(f"{wrong[0]} texts for an image, 1 to {self.texts} are possible")
        # Shapes are fixed: the last image, and each image's last text, fill up what is missing.
        padding = [len(images) - 1] * (self.batch_size - len(images))
        rows = [*range(len(images)), *padding]
        views = np.stack([self.preprocess(image) for image in images])[rows]
        tokens = [self._tokens([*group, *[group[-1]] * (self.texts - len(group))]) for group in texts]
        stacked = jax.tree.map(lambda *x: np.stack(x)[rows], *tokens)
        scores = jax.tree.map(np.asarray, self.program(self.referee, views, stacked))
        return [
            [{name: float(x[n, m]) for name, x in scores.items()} for m in range(len(group))]
            for n, group in enumerate(texts)
        ]

    def _tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return jax.tree.map(lambda *x: np.stack(x), *map(self.tokenize, texts))


def _scores(referee, view: jax.Array, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scores of one view `[S, S, 3]` with texts `[text, ...]`; the view is encoded once."""
    return jax.vmap(lambda text: referee.scores(view, referee.encode(text)))(tokens)
