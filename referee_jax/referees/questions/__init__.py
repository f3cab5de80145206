"""A prompt as questions: objects, attributes, numbers and relations, each with "yes" as its answer.

    atoms("a red circle left of two blue squares")
    # object    circle                             Is there a circle?
    # attribute red circle                         Is the circle red?
    # number    two squares                        Are there exactly two squares?
    # attribute blue squares                       Are the squares blue?
    # relation  circle to the left of squares      Is the circle to the left of the squares?

A parser by rules, without a model: closed classes of words (determiners, numbers, prepositions, common
adjectives and verbs) cut a text into noun phrases, verbs and relations. In a noun phrase what is not
known as an adjective belongs to the noun, so a word that is missing here makes a longer noun and
no wrong question. Actions are no atoms, nor is what a text of many clauses tells.

Users may give questions of their own (`given`), also with other answers, as GenEval 2's "How many bicycles are
in the image?", "four".
"""

from referee_jax.referees.questions.answers import closed, given, spellings
from referee_jax.referees.questions.atoms import ATTRIBUTE, KINDS, NUMBER, OBJECT, RELATION, YES, Atom, atoms

__all__ = ["ATTRIBUTE", "KINDS", "NUMBER", "OBJECT", "RELATION", "YES", "Atom", "atoms", "closed", "given", "spellings"]
