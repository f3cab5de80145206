"""A referee of the user's own: a function of any module, named in the settings as "module:function".

It is called as `build(spec, dtype)` and returns a pair: the referee (method/referee.py), and the
function that reads a text for it. docs/referees.md has a complete one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from referee_jax import config, prompts, schema
from referee_jax.method.referee import Referee
from referee_jax.referees.judge import Scoring
from referee_jax.weights.convert import WeightsError

MEMBERS = ("image_size", "losses", "encode", "views_losses", "fit", "scores")
TEXT = "a"  # any text: the shapes of what is read of it are those of all texts


@dataclasses.dataclass(frozen=True)
class OwnJudge(Scoring):
    """A user's referee with its part of the settings.

    Attributes:
        reader: text -> a pytree of arrays, of one shape for all texts; raises prompts.Unreadable.
    """

    spec: config.RefereeSpec
    referee: Referee
    reader: Callable[[str], Any]

    def tokenize(self, text: str, given: Any = ()) -> Any:
        """What `referee.encode` reads of a text; questions that a user gave are not asked.

        Raises prompts.Unreadable, whatever `reader` raises, and for other shapes than those of TEXT.
        """
        try:
            tokens = jax.tree.map(np.asarray, self.reader(text))
        except prompts.Unreadable:
            raise
        except Exception as error:  # one text that it did not expect should not end a run
            raise prompts.Unreadable(text, f"{self.spec.name} cannot read it: {schema.failure(error)}") from error
        if _shapes(tokens) != self._expected:
            raise prompts.Unreadable(text, f"{self.spec.name} reads other shapes of it than of {TEXT!r}")
        return tokens

    read = tokenize  # of a prompt to make an image of

    @functools.cached_property
    def _expected(self) -> Any:
        return _shapes(self.reader(TEXT))

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray:
        """An RGB picture to the view that `referee.scores` reads: `referee.fit`, on pixels in [0, 1]."""
        return np.asarray(self.referee.fit(jnp.asarray(image, jnp.float32) / 255))

    def cutting(self) -> "OwnJudge":
        """The same: `reader` alone knows what is too long."""
        return self

    def is_cut(self, prompt: str) -> bool:
        """Whether a prompt is cut, which nobody tells."""
        return False


def load(spec: config.RefereeSpec, *, dtype: jax.typing.DTypeLike) -> OwnJudge:
    """Builds the referee of `spec`, and checks its members by their shapes. Raises ConfigError, WeightsError."""
    build = schema.function(config.own_referee(spec.name), "name")
    try:
        built = build(spec, dtype)
    except (config.ConfigError, WeightsError):
        raise
    except Exception as error:  # a user's code may raise anything
        raise config.ConfigError(f"referee {spec.name} cannot be built: {schema.failure(error)}") from error
    if not (isinstance(built, tuple) and len(built) == 2 and callable(built[1])):
        raise _wrong(spec, "returns", type(built).__name__, "a pair: the referee, and the function that reads a text")
    judge = OwnJudge(spec, *built)
    _check(judge)
    return judge


def _wrong(spec: config.RefereeSpec, does: str, what: Any, instead: str) -> config.ConfigError:
    return config.ConfigError(f"referee {spec.name} {does} {what}, it must be {instead}; see docs/referees.md")


def _check(judge: OwnJudge) -> None:
    """Raises ConfigError where a member is missing, or gives other shapes than method/referee.py says."""
    spec, referee = judge.spec, judge.referee
    if missing := [name for name in MEMBERS if not hasattr(referee, name)]:
        raise _wrong(spec, "lacks", ", ".join(missing), f"an object with {', '.join(MEMBERS)}")
    if jax.tree_util.all_leaves([referee]):
        raise _wrong(spec, "is a", type(referee).__name__, "a pytree, as a flax.struct.PyTreeNode is")
    try:
        tokens = judge.reader(TEXT)
    except Exception as error:
        raise _wrong(spec, f"cannot read {TEXT!r}:", schema.failure(error), "able to, for the shapes") from error
    side, count = referee.image_size, 2
    if not isinstance(side, int) or side < 1:
        raise _wrong(spec, "has an image_size of", side, "the side of its views in pixels")
    pixels = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    view, views, image = pixels(side, side, 3), pixels(count, side, side, 3), pixels(2 * side, 2 * side, 3)
    text = _traced(judge, "encode", tokens)
    if (losses := _traced(judge, "views_losses", views, text)) != dict.fromkeys(referee.losses, pixels(count)):
        raise _wrong(spec, "has views_losses of", losses, f"float32 [views] for each of losses = {referee.losses}")
    scores = _traced(judge, "scores", view, text)
    if not scores or any(x.shape for x in jax.tree.leaves(scores)):
        raise _wrong(spec, "has scores of", scores, "a dictionary of scalars")
    if (fitted := _traced(judge, "fit", image)).shape != view.shape:
        raise _wrong(spec, "has fit of", fitted, f"a view {view.shape}")


def _traced(judge: OwnJudge, name: str, *arguments: Any) -> Any:
    """The shapes of a member's result; nothing is computed."""
    try:
        return jax.eval_shape(lambda referee, *x: getattr(referee, name)(*x), judge.referee, *arguments)
    except Exception as error:
        raise config.ConfigError(f"referee {judge.spec.name}: {name} fails: {schema.failure(error)}") from error


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype), tree)
