"""Several questions about one picture in one sequence: `before`, image tokens, question after question.

Questions share what comes before them and do not see each other. Each has the positions that it has
alone: those that follow the picture.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Where the S tokens of a sequence stand, and what they see.

    Attributes:
        positions: int32[3, S], in time, rows and columns.
        owner: int32[S], the number of a token's question; -1 before the questions.
        image: where the image tokens are.
    """

    positions: np.ndarray
    owner: np.ndarray
    image: slice

    @property
    def allowed(self) -> np.ndarray:
        """bool[S, S]: whether a query (row) attends to a key: not after it, nor of another question."""
        query, key = self.owner[:, None], self.owner[None]
        return np.tri(len(self.owner), dtype=bool) & ((key == query) | (key == -1))


def pack(before: int, rows: int, columns: int, questions: int, length: int) -> Packing:
    """The packing of `before` tokens, a picture of `rows` x `columns` tokens and `questions` of `length` tokens each."""
    text = np.tile(np.arange(before), (3, 1))
    # All tokens of a picture stand at one time, and what follows behind its longer side.
    picture = before + np.stack([np.zeros((rows, columns)), *np.indices((rows, columns))]).reshape(3, -1)
    question = np.tile(before + max(rows, columns) + np.arange(length), (3, questions))
    shared = before + rows * columns
    return Packing(
        positions=np.concatenate([text, picture, question], axis=1).astype(np.int32),
        owner=np.concatenate([np.full(shared, -1), np.repeat(np.arange(questions), length)]).astype(np.int32),
        image=slice(before, shared),
    )
