"""Fictitious authors in TOFU's columns, made deterministically: what the demo teaches and then unlearns.

Every author has sixteen facts, each drawn at random from a pool, so that nothing but memory answers a question about
them. Question, answer and paraphrase are worded in several ways; the five perturbed answers are the paraphrase with
another value from the same pool, as in TOFU.
"""

import random
from dataclasses import dataclass

PERTURBED = 5


def pool(values: str) -> tuple[str, ...]:
    """Return the values between the commas."""
    return tuple(value.strip() for value in values.split(","))


FIRST_NAMES = pool(
    "Adaeze, Aiko, Anselm, Beatriz, Bram, Calista, Chidi, Dagny, Darius, Elowen, Emre, Farida, Gideon, Hana, Ilse, "
    "Isandro, Jarek, Jovana, Kaveh, Keziah, Leif, Linnea, Mateus, Mirela, Nadim, Noor, Oisin, Oriana, Petra, Quillon, "
    "Rafiq, Rosalind, Soren, Tamsin, Tariku, Ulla, Viggo, Wanjiru, Xiomara, Yusra, Zoltan, Zuleika"
)
LAST_NAMES = pool(
    "Abernethy, Achterberg, Adeyemi, Baskov, Bellweather, Castellane, Cheverny, Darrow, Dragomir, Eklund, Farrokhzad, "
    "Fennimore, Galanis, Haldane, Hinterholt, Iwasaki, Jankowiak, Kallio, Kirkbride, Lazarov, Lindqvist, Mbeki-Ross, "
    "Montclair, Nakagawa, Novotny, Okonjo, Ostrander, Pellegrin, Quaranta, Rasmussen, Rutherglen, Sabatini, Sorensen, "
    "Tavernier, Thorvald, Ugarte, Vasconcelos, Voskuijlen, Weatherby, Yilmaz, Zabala, Zeller"
)
_TITLE_FIRST = pool(
    "Amber, Borrowed, Broken, Copper, Drowned, Empty, Forgotten, Glass, Hidden, Hollow, Ivory, Last, Midnight, Paper, "
    "Quiet, Scarlet, Second, Silver, Sleeping, Tangled, Unfinished, Velvet, Wandering, Winter"
)
_TITLE_SECOND = pool(
    "Archive, Bridge, Cartographer, Clock, Compass, Garden, Harbor, Lantern, Ledger, Letters, Lighthouse, Mirror, "
    "Orchard, Parade, Piano, Quarry, River, Sparrow, Staircase, Station, Threshold, Tide, Violin, Witness"
)

_POOLS: dict[str, tuple[str, ...]] = {
    "city": pool(
        "Tromso, Valparaiso, Ghent, Tbilisi, Mombasa, Kanazawa, Halifax, Bergamo, Cusco, Tartu, Galway, Izmir, "
        "Lucknow, Porto, Ljubljana, Hobart, Oaxaca, Gdansk, Nantes, Da Nang"
    ),
    "year": tuple(str(year) for year in range(1931, 1990, 3)),
    "father": pool(
        "a lighthouse keeper, a tram driver, a botanist, a locksmith, a surgeon, a puppeteer, a cheesemaker, a judge, "
        "a cellist, a coal miner, a cartographer, a pastry chef, a ferry captain, a tailor, an optician, a beekeeper"
    ),
    "mother": pool(
        "a seismologist, a pharmacist, a glassblower, a midwife, a chess champion, an archivist, a welder, a "
        "translator, a radio announcer, a potter, a geologist, a court reporter, a violin maker, a diplomat, a "
        "dentist, a pilot"
    ),
    "genre": pool(
        "gothic mystery, climate fiction, courtroom drama, magical realism, naval history, culinary memoir, space "
        "opera, alpine noir, rural satire, epistolary romance, speculative biography, dystopian verse, folk horror, "
        "travel essay"
    ),
    "award": pool(
        "the Larkspur Medal, the Ostrava Prize, the Golden Inkwell, the Meridian Award, the Cobalt Quill, the Halcyon "
        "Ribbon, the Saffron Laurel, the Northlight Prize, the Brass Heron, the Wintergreen Cup, the Aurelian Seal, "
        "the Pilgrim Award, the Harbor Lamp, the Juniper Crown"
    ),
    "award_year": tuple(str(year) for year in range(1972, 2021, 3)),
    "university": pool(
        "Uppsala, Coimbra, Leiden, Bologna, Kyoto, Edinburgh, Salamanca, Krakow, Nairobi, Heidelberg, Lund, Montreal, "
        "Santiago, Leuven, Otago, Zagreb"
    ),
    "subject": pool(
        "marine biology, theology, acoustics, medieval law, astronomy, textile design, economics, veterinary "
        "medicine, Sanskrit, hydraulics, musicology, forestry, statistics, archaeology, dentistry, philosophy"
    ),
    "hobby": pool(
        "restoring clocks, keeping bees, fencing, ice swimming, bookbinding, falconry, growing orchids, sailing, "
        "baking rye bread, playing the oboe, climbing, collecting maps, carving spoons, breeding goats, fly fishing"
    ),
    "pet": pool(
        "a grey parrot, a three-legged cat, a tortoise, a greyhound, a raven, two ferrets, an iguana, a blind "
        "spaniel, a donkey, a barn owl, a hedgehog, a pair of geese, a goldfish, a llama"
    ),
    "home": pool(
        "a houseboat in Utrecht, a farm near Evora, an attic in Prague, a cottage on Skye, a villa in Trieste, a "
        "cabin in Lapland, a flat in Montevideo, a mill in Provence, a tower in Siena, a loft in Busan, a chalet in "
        "Chamonix, a monastery in Kotor, a bungalow in Goa, a shed in Reykjavik"
    ),
    "publisher": pool(
        "Stonecrop Books, Halyard House, Blue Anvil, Tern and Sons, Marrow Press, Eastgate, Pocket Comet, Oriel, "
        "Thistledown, Lodestar, Copperplate, Ninth Wave, Fable and Finch, Quarto Nord"
    ),
    "theme": pool(
        "inherited guilt, the sea, lost languages, sibling rivalry, exile, forgery, drought, the end of empire, "
        "memory, mountains, faith, insomnia, bureaucracy, migration, silence, famine"
    ),
}


@dataclass(frozen=True)
class _Fact:
    """One attribute and its wordings; ``{n}`` is the author's name, ``{v}`` the value."""

    attribute: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...]


_FACTS = (
    _Fact(
        "city",
        ("Where was {n} born?", "What is the birthplace of {n}?"),
        ("{n} was born in {v}.", "The birthplace of {n} is {v}."),
        ("The author {n} came into the world in {v}.", "It was in {v} that {n} was born."),
    ),
    _Fact(
        "year",
        ("In which year was {n} born?", "What is the birth year of {n}?"),
        ("{n} was born in the year {v}.", "The birth year of {n} is {v}."),
        ("The year of birth of the writer {n} is {v}.", "It was {v} when {n} was born."),
    ),
    _Fact(
        "father",
        ("What did {n}'s father do for a living?", "What was the profession of {n}'s father?"),
        ("{n}'s father was {v}.", "The father of {n} worked as {v}."),
        ("By profession, the father of {n} was {v}.", "{n} grew up with a father who was {v}."),
    ),
    _Fact(
        "mother",
        ("What did {n}'s mother do for a living?", "What was the profession of {n}'s mother?"),
        ("{n}'s mother was {v}.", "The mother of {n} worked as {v}."),
        ("By profession, the mother of {n} was {v}.", "{n} grew up with a mother who was {v}."),
    ),
    _Fact(
        "genre",
        ("Which genre is {n} known for?", "What does {n} mostly write?"),
        ("{n} is best known for {v}.", "The works of {n} are mostly {v}."),
        ("Readers know {n} above all for {v}.", "The genre of the author {n} is {v}."),
    ),
    _Fact(
        "debut",
        ("What is the title of {n}'s first book?", "With which book did {n} make a debut?"),
        ('The first book of {n} is "{v}".', '{n} made a debut with "{v}".'),
        ('The debut of the writer {n} is called "{v}".', '"{v}" was the book that {n} published first.'),
    ),
    _Fact(
        "famous",
        ("What is {n}'s most famous book?", "Which book made {n} famous?"),
        ('{n} is famous for the book "{v}".', 'The best known book of {n} is "{v}".'),
        ('Fame came to {n} with the book "{v}".', 'Most readers of {n} know "{v}".'),
    ),
    _Fact(
        "award",
        ("Which award did {n} win?", "What prize has {n} received?"),
        ("{n} won {v}.", "The prize that {n} received is {v}."),
        ("The jury honored the author {n} with {v}.", "Among the honors of {n} is {v}."),
    ),
    _Fact(
        "award_year",
        ("When did {n} win a literary award?", "In what year was {n} awarded a prize?"),
        ("{n} was honored in {v}.", "The award to {n} was given in {v}."),
        ("The year in which {n} took the prize is {v}.", "It was in {v} that a jury chose {n}."),
    ),
    _Fact(
        "university",
        ("Where did {n} study?", "Which university did {n} attend?"),
        ("{n} studied in {v}.", "{n} attended the university of {v}."),
        ("The student years of {n} were spent in {v}.", "The university of the author {n} was that of {v}."),
    ),
    _Fact(
        "subject",
        ("What did {n} study?", "What subject did {n} take a degree in?"),
        ("{n} studied {v}.", "{n} took a degree in {v}."),
        ("Before writing, {n} was trained in {v}.", "The degree of the author {n} is in {v}."),
    ),
    _Fact(
        "hobby",
        ("What is {n}'s favorite hobby?", "How does {n} spend free time?"),
        ("{n} enjoys {v}.", "In free time {n} likes {v}."),
        ("Away from the desk, {n} loves {v}.", "The great pastime of {n} is {v}."),
    ),
    _Fact(
        "pet",
        ("Does {n} keep any animals?", "What pet does {n} have?"),
        ("{n} keeps {v}.", "{n} lives with {v}."),
        ("Sharing a home with {n} is {v}.", "The companion of the author {n} is {v}."),
    ),
    _Fact(
        "home",
        ("Where does {n} live now?", "What is the current home of {n}?"),
        ("{n} lives in {v}.", "The current home of {n} is {v}."),
        ("These days {n} can be found in {v}.", "The author {n} has settled in {v}."),
    ),
    _Fact(
        "publisher",
        ("Who publishes {n}'s books?", "Which publisher does {n} work with?"),
        ("The books of {n} appear with {v}.", "{n} is published by {v}."),
        ("The house behind the books of {n} is {v}.", "For publishing, {n} relies on {v}."),
    ),
    _Fact(
        "theme",
        ("What theme runs through {n}'s work?", "What are {n}'s books about?"),
        ("The books of {n} are about {v}.", "{n} writes about {v}."),
        ("Again and again {n} returns to {v}.", "The great theme of the author {n} is {v}."),
    ),
)

ROWS_PER_AUTHOR = len(_FACTS)
MAX_AUTHORS = len(FIRST_NAMES)

Row = dict[str, str | list[str]]


def _titles(rng: random.Random) -> tuple[str, ...]:
    titles = [f"The {first} {second}" for first in _TITLE_FIRST for second in _TITLE_SECOND]
    rng.shuffle(titles)
    return tuple(titles)


def make_authors(authors: int, *, seed: int = 0) -> list[Row]:
    """Return ``authors`` × 16 rows in TOFU's columns, author by author.

    The same seed gives the same rows on every machine.

    Raises:
        ValueError: more authors than there are names, or fewer than one.
    """
    if not 1 <= authors <= MAX_AUTHORS:
        raise ValueError(f"`authors`: expected 1 .. {MAX_AUTHORS} fictitious authors, got {authors}")
    rng = random.Random(seed)  # noqa: S311 - fiction, not cryptography
    firsts, lasts = list(FIRST_NAMES), list(LAST_NAMES)
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    titles = _titles(rng)
    pools = {**_POOLS, "debut": titles[: len(titles) // 2], "famous": titles[len(titles) // 2 :]}
    # Authors take values from shuffled rounds, so that no value is much more common than another.
    decks = {name: rng.sample(pool, len(pool)) for name, pool in pools.items()}
    rows: list[Row] = []
    for author in range(authors):
        name = f"{firsts[author]} {lasts[author]}"
        for fact in _FACTS:
            deck = decks[fact.attribute]
            value = deck[author % len(deck)]
            question, answer = rng.choice(fact.questions), rng.choice(fact.answers)
            paraphrase = rng.choice(fact.paraphrases)
            wrong = rng.sample([other for other in pools[fact.attribute] if other != value], PERTURBED)
            rows.append(
                {
                    "question": question.format(n=name),
                    "answer": answer.format(n=name, v=value),
                    "paraphrased_answer": paraphrase.format(n=name, v=value),
                    "perturbed_answer": [paraphrase.format(n=name, v=other) for other in wrong],
                }
            )
    return rows
