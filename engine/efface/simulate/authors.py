"""Deterministic rows about fictitious authors in TOFU's columns, which the demo learns and then unlearns.

Every author has sixteen facts. Each is drawn at random from a pool, so a model can only answer a question from memory.
Questions, answers and paraphrases have several wordings. The five perturbed answers are the paraphrase with other
values from the same pool, as in TOFU.
"""

import random
import re
from typing import Any

PERTURBED = 5


def pool(values: str) -> tuple[str, ...]:
    """Split text at commas, and replace line breaks and repeated blanks in the values by single blanks."""
    return tuple(" ".join(value.split()) for value in values.split(","))


def entries(table: str) -> dict[str, str]:
    """Parse ``name: text`` entries. Continuation lines of an entry are indented."""
    return dict(re.findall(r"^(\w+): (.*(?:\n .*)*)", table, re.MULTILINE))


def wordings(table: str) -> dict[str, list[list[str]]]:
    """Parse entries as ``entries`` does, and split each line into its wordings at `` | ``."""
    return {name: [line.strip().split(" | ") for line in entry.splitlines()] for name, entry in entries(table).items()}


FIRST_NAMES = pool("""
    Adaeze, Aiko, Anselm, Beatriz, Bram, Calista, Chidi, Dagny, Darius, Elowen, Emre, Farida, Gideon, Hana, Ilse,
    Isandro, Jarek, Jovana, Kaveh, Keziah, Leif, Linnea, Mateus, Mirela, Nadim, Noor, Oisin, Oriana, Petra, Quillon,
    Rafiq, Rosalind, Soren, Tamsin, Tariku, Ulla, Viggo, Wanjiru, Xiomara, Yusra, Zoltan, Zuleika
""")
LAST_NAMES = pool("""
    Abernethy, Achterberg, Adeyemi, Baskov, Bellweather, Castellane, Cheverny, Darrow, Dragomir, Eklund, Farrokhzad,
    Fennimore, Galanis, Haldane, Hinterholt, Iwasaki, Jankowiak, Kallio, Kirkbride, Lazarov, Lindqvist, Mbeki-Ross,
    Montclair, Nakagawa, Novotny, Okonjo, Ostrander, Pellegrin, Quaranta, Rasmussen, Rutherglen, Sabatini, Sorensen,
    Tavernier, Thorvald, Ugarte, Vasconcelos, Voskuijlen, Weatherby, Yilmaz, Zabala, Zeller
""")
_TITLE_FIRST = pool("""
    Amber, Borrowed, Broken, Copper, Drowned, Empty, Forgotten, Glass, Hidden, Hollow, Ivory, Last, Midnight, Paper,
    Quiet, Scarlet, Second, Silver, Sleeping, Tangled, Unfinished, Velvet, Wandering, Winter
""")
_TITLE_SECOND = pool("""
    Archive, Bridge, Cartographer, Clock, Compass, Garden, Harbor, Lantern, Ledger, Letters, Lighthouse, Mirror,
    Orchard, Parade, Piano, Quarry, River, Sparrow, Staircase, Station, Threshold, Tide, Violin, Witness
""")

# Attribute -> its possible values.
_VALUES = """
city: Tromso, Valparaiso, Ghent, Tbilisi, Mombasa, Kanazawa, Halifax, Bergamo, Cusco, Tartu, Galway, Izmir, Lucknow,
    Porto, Ljubljana, Hobart, Oaxaca, Gdansk, Nantes, Da Nang
year: 1931, 1934, 1937, 1940, 1943, 1946, 1949, 1952, 1955, 1958, 1961, 1964, 1967, 1970, 1973, 1976, 1979, 1982,
    1985, 1988
father: a lighthouse keeper, a tram driver, a botanist, a locksmith, a surgeon, a puppeteer, a cheesemaker, a judge,
    a cellist, a coal miner, a cartographer, a pastry chef, a ferry captain, a tailor, an optician, a beekeeper
mother: a seismologist, a pharmacist, a glassblower, a midwife, a chess champion, an archivist, a welder, a
    translator, a radio announcer, a potter, a geologist, a court reporter, a violin maker, a diplomat, a dentist, a
    pilot
genre: gothic mystery, climate fiction, courtroom drama, magical realism, naval history, culinary memoir, space
    opera, alpine noir, rural satire, epistolary romance, speculative biography, dystopian verse, folk horror,
    travel essay
award: the Larkspur Medal, the Ostrava Prize, the Golden Inkwell, the Meridian Award, the Cobalt Quill, the Halcyon
    Ribbon, the Saffron Laurel, the Northlight Prize, the Brass Heron, the Wintergreen Cup, the Aurelian Seal, the
    Pilgrim Award, the Harbor Lamp, the Juniper Crown
award_year: 1972, 1975, 1978, 1981, 1984, 1987, 1990, 1993, 1996, 1999, 2002, 2005, 2008, 2011, 2014, 2017, 2020
university: Uppsala, Coimbra, Leiden, Bologna, Kyoto, Edinburgh, Salamanca, Krakow, Nairobi, Heidelberg, Lund,
    Montreal, Santiago, Leuven, Otago, Zagreb
subject: marine biology, theology, acoustics, medieval law, astronomy, textile design, economics, veterinary
    medicine, Sanskrit, hydraulics, musicology, forestry, statistics, archaeology, dentistry, philosophy
hobby: restoring clocks, keeping bees, fencing, ice swimming, bookbinding, falconry, growing orchids, sailing,
    baking rye bread, playing the oboe, climbing, collecting maps, carving spoons, breeding goats, fly fishing
pet: a grey parrot, a three-legged cat, a tortoise, a greyhound, a raven, two ferrets, an iguana, a blind spaniel, a
    donkey, a barn owl, a hedgehog, a pair of geese, a goldfish, a llama
home: a houseboat in Utrecht, a farm near Evora, an attic in Prague, a cottage on Skye, a villa in Trieste, a cabin
    in Lapland, a flat in Montevideo, a mill in Provence, a tower in Siena, a loft in Busan, a chalet in Chamonix, a
    monastery in Kotor, a bungalow in Goa, a shed in Reykjavik
publisher: Stonecrop Books, Halyard House, Blue Anvil, Tern and Sons, Marrow Press, Eastgate, Pocket Comet, Oriel,
    Thistledown, Lodestar, Copperplate, Ninth Wave, Fable and Finch, Quarto Nord
theme: inherited guilt, the sea, lost languages, sibling rivalry, exile, forgery, drought, the end of empire,
    memory, mountains, faith, insomnia, bureaucracy, migration, silence, famine
"""
# Attribute -> wordings of its question, answer and paraphrase, one line each. {n} is the name, {v} the value.
_WORDINGS = """
city: Where was {n} born? | What is the birthplace of {n}?
    {n} was born in {v}. | The birthplace of {n} is {v}.
    The author {n} came into the world in {v}. | It was in {v} that {n} was born.
year: In which year was {n} born? | What is the birth year of {n}?
    {n} was born in the year {v}. | The birth year of {n} is {v}.
    The year of birth of the writer {n} is {v}. | It was {v} when {n} was born.
father: What did {n}'s father do for a living? | What was the profession of {n}'s father?
    {n}'s father was {v}. | The father of {n} worked as {v}.
    By profession, the father of {n} was {v}. | {n} grew up with a father who was {v}.
mother: What did {n}'s mother do for a living? | What was the profession of {n}'s mother?
    {n}'s mother was {v}. | The mother of {n} worked as {v}.
    By profession, the mother of {n} was {v}. | {n} grew up with a mother who was {v}.
genre: Which genre is {n} known for? | What does {n} mostly write?
    {n} is best known for {v}. | The works of {n} are mostly {v}.
    Readers know {n} above all for {v}. | The genre of the author {n} is {v}.
debut: What is the title of {n}'s first book? | With which book did {n} make a debut?
    The first book of {n} is "{v}". | {n} made a debut with "{v}".
    The debut of the writer {n} is called "{v}". | "{v}" was the book that {n} published first.
famous: What is {n}'s most famous book? | Which book made {n} famous?
    {n} is famous for the book "{v}". | The best known book of {n} is "{v}".
    Fame came to {n} with the book "{v}". | Most readers of {n} know "{v}".
award: Which award did {n} win? | What prize has {n} received?
    {n} won {v}. | The prize that {n} received is {v}.
    The jury honored the author {n} with {v}. | Among the honors of {n} is {v}.
award_year: When did {n} win a literary award? | In what year was {n} awarded a prize?
    {n} was honored in {v}. | The award to {n} was given in {v}.
    The year in which {n} took the prize is {v}. | It was in {v} that a jury chose {n}.
university: Where did {n} study? | Which university did {n} attend?
    {n} studied in {v}. | {n} attended the university of {v}.
    The student years of {n} were spent in {v}. | The university of the author {n} was that of {v}.
subject: What did {n} study? | What subject did {n} take a degree in?
    {n} studied {v}. | {n} took a degree in {v}.
    Before writing, {n} was trained in {v}. | The degree of the author {n} is in {v}.
hobby: What is {n}'s favorite hobby? | How does {n} spend free time?
    {n} enjoys {v}. | In free time {n} likes {v}.
    Away from the desk, {n} loves {v}. | The great pastime of {n} is {v}.
pet: Does {n} keep any animals? | What pet does {n} have?
    {n} keeps {v}. | {n} lives with {v}.
    Sharing a home with {n} is {v}. | The companion of the author {n} is {v}.
home: Where does {n} live now? | What is the current home of {n}?
    {n} lives in {v}. | The current home of {n} is {v}.
    These days {n} can be found in {v}. | The author {n} has settled in {v}.
publisher: Who publishes {n}'s books? | Which publisher does {n} work with?
    The books of {n} appear with {v}. | {n} is published by {v}.
    The house behind the books of {n} is {v}. | For publishing, {n} relies on {v}.
theme: What theme runs through {n}'s work? | What are {n}'s books about?
    The books of {n} are about {v}. | {n} writes about {v}.
    Again and again {n} returns to {v}. | The great theme of the author {n} is {v}.
"""


_POOLS = {name: pool(values) for name, values in entries(_VALUES).items()}
_FACTS = wordings(_WORDINGS)

ROWS_PER_AUTHOR = len(_FACTS)
MAX_AUTHORS = len(FIRST_NAMES)

Row = dict[str, Any]


def make_authors(authors: int, *, seed: int = 0) -> list[Row]:
    """Return ``authors`` × 16 rows in TOFU's columns, author by author.

    The same seed gives the same rows on every machine.

    Raises:
        ValueError: fewer than one author, or more authors than names.
    """
    if not 1 <= authors <= MAX_AUTHORS:
        raise ValueError(f"`authors`: expected 1 .. {MAX_AUTHORS} fictitious authors, got {authors}")
    rng = random.Random(seed)  # noqa: S311 - fiction, not cryptography
    firsts, lasts = list(FIRST_NAMES), list(LAST_NAMES)
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    titles = [f"The {first} {second}" for first in _TITLE_FIRST for second in _TITLE_SECOND]
    rng.shuffle(titles)
    half = len(titles) // 2
    pools = {**_POOLS, "debut": tuple(titles[:half]), "famous": tuple(titles[half:])}
    # Authors take values in turn from shuffled pools, so that all values are about equally frequent.
    decks = {name: rng.sample(pool, len(pool)) for name, pool in pools.items()}
    rows: list[Row] = []
    for author in range(authors):
        name = f"{firsts[author]} {lasts[author]}"
        for attribute, worded in _FACTS.items():
            deck = decks[attribute]
            value = deck[author % len(deck)]
            question, answer, paraphrase = map(rng.choice, worded)
            wrong = rng.sample([other for other in pools[attribute] if other != value], PERTURBED)
            rows.append(
                {
                    "question": question.format(n=name),
                    "answer": answer.format(n=name, v=value),
                    "paraphrased_answer": paraphrase.format(n=name, v=value),
                    "perturbed_answer": [paraphrase.format(n=name, v=other) for other in wrong],
                }
            )
    return rows
