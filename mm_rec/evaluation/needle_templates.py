"""What the tests of recall hide in a text and ask for.

Read by :mod:`mm_rec.evaluation.recall` alone. Nothing that training reads may share a sentence, a kind of key or a
template with this file, or the tests would be answered by rote: tests/evaluation/test_needles.py holds that.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "NOISE", "NeedleKind"]


@dataclass(frozen=True)
class NeedleKind:
    """One kind of needle.

    Attributes:
        name: for tables.
        wordings: pairs of a statement, with ``{key}`` and ``{value}``, and the question up to its answer.
        others: sentences with the value of another candidate, which answer no question.
        keys: what statements are about; empty for a kind that has one statement alone.
        values: words of one kind and length; empty for numbers of five digits.
        needles: how many statements are hidden, of which one is asked for.
        in_noise: hidden in :data:`NOISE` in place of a document.
    """

    name: str
    wordings: tuple[tuple[str, str], ...]
    others: tuple[str, ...]
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    needles: int = 1
    in_noise: bool = False


NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Riga", "Tunis", "Sofia", "Vienna", "Dublin", "Athens", "Warsaw"),
    *("Ankara", "Havana", "Nairobi", "Manila", "Bogota", "Zagreb", "Geneva", "Naples", "Porto", "Tallinn", "Malta"),
)
_PERSONS = (
    *("Ambrose Hale", "Beatrix Fenn", "Caspar Lunt", "Dorothea Pym", "Edmund Stroud", "Flora Quill", "Gideon Marsh"),
    *("Honoria Blythe", "Isidor Crane", "Judith Vane", "Konrad Ott", "Lavinia Shaw", "Mungo Reid", "Nora Teague"),
)
_SHIPS = (
    *("Albatross", "Bellerophon", "Calypso", "Dauntless", "Endymion", "Fearless", "Galatea", "Hesperus", "Iphigenia"),
    *("Juno", "Leviathan", "Minotaur", "Nautilus", "Orion", "Pegasus", "Resolute", "Swiftsure", "Thunderer"),
)
_ANIMALS = (
    *("badger", "beaver", "donkey", "falcon", "ferret", "jackal", "lizard", "magpie", "monkey", "pigeon", "rabbit"),
    *("spider", "turtle", "walrus", "weasel", "parrot", "oyster", "salmon", "jaguar", "baboon", "iguana", "gibbon"),
    *("marten", "cougar", "coyote", "python", "toucan", "canary", "turkey", "kitten"),
)
_GOODS = (
    *("barley", "butter", "canvas", "cement", "cotton", "copper", "grapes", "indigo", "lemons", "marble", "pepper"),
    *("quartz", "rubber", "silver", "timber", "cheese", "coffee", "ginger", "nickel", "olives", "potash", "velvet"),
    *("amber", "brandy", "carpet", "spices", "treacle", "walnuts", "wicker", "saddles"),
)

_NUMBER_WORDINGS = (
    (
        "The old lighthouse at {key} has {value} steps.",
        "How many steps has the old lighthouse at {key}? The old lighthouse at {key} has",
    ),
    (
        "In the year of the flood {key} counted {value} chimneys.",
        "How many chimneys did {key} count in the year of the flood? In the year of the flood {key} counted",
    ),
    (
        "{key} owes its fame to {value} cedar trees.",
        "To how many cedar trees does {key} owe its fame? {key} owes its fame to",
    ),
)
_NUMBER_OTHERS = (
    "A cart with {value} bricks went by.",
    "Somebody had scratched {value} into the bark of a tree.",
    "On the back of the photograph stood {value}.",
    "The bill came to {value} crowns.",
)

KINDS = (
    NeedleKind(
        "pass key",
        (("The pass key is {value}. Remember it.", "What is the pass key? The pass key is"),),
        _NUMBER_OTHERS,
        in_noise=True,
    ),
    NeedleKind("number", _NUMBER_WORDINGS, _NUMBER_OTHERS, _CITIES),
    NeedleKind(
        "word",
        (
            (
                "{key} never travelled without a tame {value}.",
                "Without which animal did {key} never travel? {key} never travelled without a tame",
            ),
            (
                "In the dream {key} rode upon a {value}.",
                "What did {key} ride upon in the dream? In the dream {key} rode upon a",
            ),
            (
                "Everybody knew that {key} was afraid of the {value}.",
                "Of which animal was {key} afraid? Everybody knew that {key} was afraid of the",
            ),
        ),
        ("A {value} ran across the road.", "Nobody had seen the {value}.", "There was a {value} on the coat of arms."),
        _PERSONS,
        _ANIMALS,
    ),
    NeedleKind("one of four", _NUMBER_WORDINGS, _NUMBER_OTHERS, _CITIES, needles=4),
    NeedleKind(
        "other wording",
        (
            (
                "Captain's log: {value} loaded aboard the {key} at dawn.",
                "What did the {key} carry? Her hold was full of",
            ),
            ("All the {value} in the harbour went into the {key}.", "The cargo of the {key} consisted of"),
        ),
        ("They talked about {value} until midnight.", "The smell of {value} was everywhere."),
        _SHIPS,
        _GOODS,
    ),
)
"""All kinds, in the order of tables. The last is asked for in other words than it is said in."""
