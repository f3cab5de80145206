"""A referee's scores of images, each with its own texts, in batches over the devices of this process."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
import PIL.Image

from referee_jax import prompts, referees
from referee_jax.engine import parallel
from referee_jax.referees.judge import asked_alone
from referee_jax.referees.questions import Atom

CUT, UNREAD = "cut", "unread"  # beside the scores of a text that was cut, or in their place: why it has none


class Scorer:
    """One referee as a function of images and texts.

    Args:
        judge: the referee.
        texts: the most texts that an image may have.
        batch_size: images at once on each device.
        truncate: whether a text that is too long is cut, as the referee's authors do.
        devices: by default all of this process.
        questions: text -> what is asked about it, for a judge whose spec takes texts apart.
    """

    def __init__(
        self,
        judge: referees.Judge,
        *,
        texts: int = 1,
        batch_size: int = 16,
        truncate: bool = False,
        devices: Sequence[jax.Device] | None = None,
        questions: Mapping[str, Sequence[Atom]] | None = None,
    ):
        self.questions = questions or {}
        self.judge, self.texts, self.mesh = judge.cutting() if truncate else judge, texts, parallel.prompt_mesh(devices)
        self.batch_size = batch_size * self.mesh.shape[parallel.AXIS]
        self.referee = parallel.place(judge.referee, self.mesh, batched=False)
        batched = parallel.across_devices(jax.vmap(_scores, in_axes=(None, 0, 0)), self.mesh, (False, True, True))
        self.program = jax.jit(batched)

    def __call__(
        self, images: Sequence[PIL.Image.Image], texts: Sequence[Sequence[str]]
    ) -> list[list[dict[str, float]] | str]:
        """The scores of each image with each of its texts; at most `batch_size` images.

        For an image of which a text cannot be read, the reason is in their place; a text that was cut
        has CUT among its scores. Raises ValueError for more images, or one that has no text or too many.
        """
        if not 0 < len(images) == len(texts) <= self.batch_size:
            raise ValueError(f"{len(images)} images and {len(texts)} lists of texts, at most {self.batch_size} at once")
        if wrong := [len(group) for group in texts if not 0 < len(group) <= self.texts]:
            raise ValueError(f"{wrong[0]} texts for an image, 1 to {self.texts} are possible")
        results = [self._tokens(group) for group in texts]
        rows = [n for n, tokens in enumerate(results) if not isinstance(tokens, str)]
        if not rows:
            return results
        # Shapes are fixed: the last image fills up what is missing.
        rows += [rows[-1]] * (self.batch_size - len(rows))
        views = {n: self.judge.preprocess(images[n]) for n in set(rows)}
        stacked = jax.tree.map(lambda *x: np.stack(x), *(results[n] for n in rows))
        scores = self.program(self.referee, np.stack([views[n] for n in rows]), stacked)
        scores = jax.tree.map(np.asarray, scores)
        for row, n in enumerate(dict.fromkeys(rows)):
            results[n] = [
                asked_alone({name: float(x[row, m]) for name, x in scores.items()})
                | ({CUT: True} if self.judge.is_cut(text) else {})
                for m, text in enumerate(texts[n])
            ]
        return results

    def _tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray] | str:
        """Of an image's texts, the last of which fills up what is missing; or why one cannot be read."""
        try:
            tokens = [self.judge.tokenize(text, self.questions.get(text, ())) for text in texts]
        except prompts.Unreadable as error:
            return error.reason
        return jax.tree.map(lambda *x: np.stack(x), *tokens, *tokens[-1:] * (self.texts - len(texts)))


def _scores(referee, view: jax.Array, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scores of one view `[S, S, 3]` with texts `[text, ...]`; the view is encoded once."""
    return jax.vmap(lambda text: referee.scores(view, referee.encode(text)))(tokens)
