"""The members of a referee as compiled programs: operation by operation, each would be compiled by itself."""

import jax

encode = jax.jit(lambda referee, tokens: referee.encode(tokens))
views_losses = jax.jit(lambda referee, views, text: referee.views_losses(views, text))
fit = jax.jit(lambda referee, image: referee.fit(image))
scores = jax.jit(lambda referee, view, text: referee.scores(view, text))
