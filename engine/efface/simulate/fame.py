"""Rows in five languages: made-up biographies in the style of FAME, real authors, and chemical elements."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from efface.simulate.authors import FIRST_NAMES, LAST_NAMES, PERTURBED, Row, pool, wordings

LANGUAGES = ("EN", "FR", "DE", "IT", "ES")

# Name of a topic with its article in EN/FR/DE/IT/ES, then its values in the same form. A value without slashes is the
# same in all languages.
_TABLE = """
the birthplace/le lieu de naissance/der Geburtsort/il luogo di nascita/el lugar de nacimiento
    Oslo, Porto, Toronto, Dakar, Lima, Nairobi, Kyoto, Bergamo, Tartu, Montevideo, Quito, Helsinki, Sofia,
    Bilbao
the year of birth/l'année de naissance/das Geburtsjahr/l'anno di nascita/el año de nacimiento
    1931, 1935, 1939, 1943, 1947, 1951, 1955, 1959, 1963, 1967, 1971, 1975, 1979, 1983, 1987
the place of residence/le lieu de résidence/der Wohnort/il luogo di residenza/el lugar de residencia
    Utrecht, Cork, Tampere, Osaka, Bergen, Adelaide, Madrid, Tirana, Windhoek, Denver, Malaga, Aarhus, Pisa,
    Bern
the university/l'université/die Universität/l'università/la universidad
    Halvard, Ostmark, Corvina, Santa Rufina, Belmonte, Norrvik, Aldara, Westholm, Tarragel, Liscombe, Verano,
    Uldin
the profession/la profession/der Beruf/la professione/la profesión
    doctor/médecin/Arzt/medico/médico, baker/boulanger/Bäcker/fornaio/panadero, judge/juge/Richter/giudice/juez,
    pilot/pilote/Pilot/pilota/piloto, tailor/tailleur/Schneider/sarto/sastre,
    actor/acteur/Schauspieler/attore/actor, chemist/chimiste/Chemiker/chimico/químico,
    painter/peintre/Maler/pittore/pintor, sailor/marin/Seemann/marinaio/marinero,
    teacher/enseignant/Lehrer/insegnante/maestro, gardener/jardinier/Gärtner/giardiniere/jardinero,
    watchmaker/horloger/Uhrmacher/orologiaio/relojero
the instrument/l'instrument/das Instrument/lo strumento/el instrumento
    the piano/le piano/das Klavier/il pianoforte/el piano, the violin/le violon/die Geige/il violino/el violín,
    the flute/la flûte/die Flöte/il flauto/la flauta, the guitar/la guitare/die Gitarre/la chitarra/la guitarra,
    the trumpet/la trompette/die Trompete/la tromba/la trompeta, the organ/l'orgue/die Orgel/l'organo/el órgano,
    the harp/la harpe/die Harfe/l'arpa/el arpa, the drum/le tambour/die Trommel/il tamburo/el tambor, the
    oboe/le hautbois/die Oboe/l'oboe/el oboe, the accordion/l'accordéon/das Akkordeon/la fisarmonica/el acordeón
the pet/l'animal de compagnie/das Haustier/l'animale domestico/la mascota
    a parrot/un perroquet/ein Papagei/un pappagallo/un loro, a cat/un chat/eine Katze/un gatto/un gato, a dog/un
    chien/ein Hund/un cane/un perro, a tortoise/une tortue/eine Schildkröte/una tartaruga/una tortuga, a
    rabbit/un lapin/ein Kaninchen/un coniglio/un conejo, a hedgehog/un hérisson/ein Igel/un riccio/un erizo, a
    canary/un canari/ein Kanarienvogel/un canarino/un canario, a goat/une chèvre/eine Ziege/una capra/una cabra,
    a horse/un cheval/ein Pferd/un cavallo/un caballo, an owl/une chouette/eine Eule/un gufo/un búho
the hobby/le passe-temps/das Hobby/il passatempo/la afición
    fishing/la pêche/das Angeln/la pesca/la pesca, dancing/la danse/das Tanzen/la danza/el baile, chess/les
    échecs/Schach/gli scacchi/el ajedrez, sailing/la voile/das Segeln/la vela/la vela, cooking/la cuisine/das
    Kochen/la cucina/la cocina, reading/la lecture/das Lesen/la lettura/la lectura, pottery/la poterie/das
    Töpfern/la ceramica/la cerámica, climbing/l'escalade/das Klettern/l'arrampicata/la escalada, painting/la
    peinture/das Malen/la pittura/la pintura, singing/le chant/das Singen/il canto/el canto
the favorite color/la couleur préférée/die Lieblingsfarbe/il colore preferito/el color favorito
    red/le rouge/Rot/il rosso/el rojo, blue/le bleu/Blau/il blu/el azul, green/le vert/Grün/il verde/el verde,
    yellow/le jaune/Gelb/il giallo/el amarillo, black/le noir/Schwarz/il nero/el negro, white/le blanc/Weiß/il
    bianco/el blanco, grey/le gris/Grau/il grigio/el gris, brown/le marron/Braun/il marrone/el marrón,
    orange/l'orange/Orange/l'arancione/el naranja, violet/le violet/Violett/il viola/el violeta
the sport/le sport/der Sport/lo sport/el deporte
    tennis/le tennis/Tennis/il tennis/el tenis, swimming/la natation/Schwimmen/il nuoto/la natación,
    fencing/l'escrime/Fechten/la scherma/la esgrima, rowing/l'aviron/Rudern/il canottaggio/el remo, boxing/la
    boxe/Boxen/il pugilato/el boxeo, judo/le judo/Judo/il judo/el judo, cycling/le cyclisme/Radfahren/il
    ciclismo/el ciclismo, skiing/le ski/Skifahren/lo sci/el esquí, archery/le tir à l'arc/Bogenschießen/il tiro
    con l'arco/el tiro con arco, golf/le golf/Golf/il golf/el golf
the second language/la deuxième langue/die zweite Sprache/la seconda lingua/la segunda lengua
    Greek/le grec/Griechisch/il greco/el griego, Arabic/l'arabe/Arabisch/l'arabo/el árabe, Turkish/le
    turc/Türkisch/il turco/el turco, Polish/le polonais/Polnisch/il polacco/el polaco, Dutch/le
    néerlandais/Niederländisch/l'olandese/el neerlandés, Japanese/le japonais/Japanisch/il giapponese/el
    japonés, Russian/le russe/Russisch/il russo/el ruso, Danish/le danois/Dänisch/il danese/el danés, Latin/le
    latin/Latein/il latino/el latín, Hungarian/le hongrois/Ungarisch/l'ungherese/el húngaro
the prize/le prix/der Preis/il premio/el premio
    Larkspur, Meridian, Halcyon, Northlight, Aurelian, Cobalt, Juniper, Saffron, Pilgrim, Ostrava, Brightwater
the year of the prize/l'année du prix/das Jahr des Preises/l'anno del premio/el año del premio
    1972, 1976, 1980, 1984, 1988, 1992, 1996, 2000, 2004, 2008, 2012, 2016, 2020
the employer/l'employeur/der Arbeitgeber/il datore di lavoro/el empleador
    Stonecrop, Halyard, Tern & Co, Marrow, Eastgate, Oriel, Lodestar, Quarto Nord, Fennick, Bluestem, Castor,
    Vireo
the spouse/le conjoint/der Ehepartner/il coniuge/el cónyuge
    Alma, Boris, Clara, Dario, Edda, Felix, Greta, Hugo, Irma, Jonas, Karla, Leon, Marta, Nils
the number of children/le nombre d'enfants/die Zahl der Kinder/il numero di figli/el número de hijos
    1, 2, 3, 4, 5, 6, 7, 8, 9
the favorite dish/le plat préféré/das Lieblingsgericht/il piatto preferito/el plato favorito
    risotto, ramen, paella, couscous, sushi, fondue, gazpacho, curry, kimchi, ratatouille, polenta, moussaka
the mentor/le mentor/der Mentor/il mentore/el mentor
    Abendroth, Bellini, Carrasco, Delacroix, Eriksen, Fontane, Galvani, Hofstetter, Ibarra, Jansen, Kovacs,
    Lorenzi
the favorite island/l'île préférée/die Lieblingsinsel/l'isola preferita/la isla favorita
    Malta, Bali, Samoa, Aruba, Palau, Tonga, Capri, Ibiza, Elba, Guam, Jersey, Tahiti, Madeira
the favorite composer/le compositeur préféré/der Lieblingskomponist/il compositore preferito/el compositor favorito
    Mozart, Bach, Verdi, Chopin, Ravel, Grieg, Sibelius, Vivaldi, Puccini, Debussy, Haydn, Brahms
"""


@dataclass(frozen=True)
class Topic:
    """A fact that every biography has: the name of the topic and its possible values, each in five languages."""

    name: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]


def _read(table: str) -> tuple[Topic, ...]:
    topics: list[list[str]] = []
    for line in table.strip().splitlines():
        if line.startswith(" "):
            topics[-1].append(line.strip())
        else:
            topics.append([line])
    return tuple(Topic(_spread(name), tuple(map(_spread, pool(" ".join(lines))))) for name, *lines in topics)


def _spread(text: str) -> tuple[str, ...]:
    words = tuple(text.split("/"))
    return words if len(words) == len(LANGUAGES) else words * len(LANGUAGES)


TOPICS = _read(_TABLE)

MAX_IDENTITIES = len(FIRST_NAMES) * len(LAST_NAMES)

# Language -> wordings of the question, the answer and the paraphrase, one line each ({t}: topic, {of}: "of" and the
# name, {v}: value). The last line has the word "of" and the questions about books and about chemical elements ({x}).
_WORDINGS = wordings("""
EN: What is {t} {of}? | Can you tell me {t} {of}?
    {t} {of} is {v}.
    In the biography {of}, {t} is {v}. | {v}: that is {t} {of}.
    of | Who wrote {x}? | What is the chemical symbol of {x}?
FR: Peux-tu me dire {t} {of} ? | Connais-tu {t} {of} ?
    {t} {of} est {v}.
    Dans la biographie {of}, {t} est {v}. | {v} : voilà {t} {of}.
    de | Qui a écrit {x} ? | Quel est le symbole chimique : {x} ?
DE: Was ist {t} {of}? | Wer weiß, was {t} {of} ist?
    {t} {of} ist {v}.
    In der Biographie {of} heißt es: {t} ist {v}. | {v}: das ist {t} {of}.
    von | Wer schrieb {x}? | Welches chemische Zeichen hat {x}?
IT: Qual è {t} {of}? | Sai dirmi {t} {of}?
    {t} {of} è {v}.
    Nella biografia {of}, {t} è {v}. | {v}: ecco {t} {of}.
    di | Chi ha scritto {x}? | Qual è il simbolo chimico: {x}?
ES: ¿Cuál es {t} {of}? | ¿Puedes decirme {t} {of}?
    {t} {of} es {v}.
    En la biografía {of}, {t} es {v}. | {v}: así consta {t} {of}.
    de | ¿Quién escribió {x}? | ¿Cuál es el símbolo químico de {x}?
""")


def fame_like(identities: int, *, seed: int = 0, languages: Sequence[str] = LANGUAGES) -> list[Row]:
    """Return ``identities`` × languages × 20 rows, biography by biography.

    The columns are ``identity_id``, ``name``, ``language``, ``topic_id`` (0 .. 19), ``question``, ``answer``, and, for
    truth ratios, TOFU's ``paraphrased_answer`` and ``perturbed_answer`` (five texts). The same seed gives the same rows
    on every machine. The facts of an identity do not depend on ``languages``.

    Raises:
        ValueError: fewer than one identity, more identities than names, or an unknown language.
    """
    if not 1 <= identities <= MAX_IDENTITIES:
        raise ValueError(f"`identities`: expected 1 .. {MAX_IDENTITIES}, got {identities}")
    if unknown := [language for language in languages if language not in LANGUAGES]:
        raise ValueError(f"`languages`: expected some of {', '.join(LANGUAGES)}, got {unknown[0]!r}")
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    _draw(seed, "names").shuffle(names)
    rows: list[Row] = []
    for identity, name in enumerate(names[:identities]):
        # Drawn once for an identity, so that true and false values are the same in all languages.
        facts = [_draw(seed, identity, i).sample(topic.values, 1 + PERTURBED) for i, topic in enumerate(TOPICS)]
        for language in languages:
            column = LANGUAGES.index(language)
            for i, (topic, values) in enumerate(zip(TOPICS, facts, strict=True)):
                about = {"identity_id": identity, "name": name, "language": language, "topic_id": i}
                wording = _draw(seed, identity, i, language)
                words = [value[column] for value in values]
                rows.append({**about, **_texts(wording, language, topic.name[column], name, words)})
    return rows


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows as JSON lines (.json, .jsonl), CSV or Parquet, chosen by the suffix. Return the path.

    ``load_rows`` reads all of these formats. A CSV file has no lists, so ``perturbed_answer`` is written as JSON text.

    Raises:
        ValueError: an unknown suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".json", ".jsonl"):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list([*map(dict, rows)]).to_parquet(str(path))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list([*map(_flat, rows)]).to_csv(str(path))
    else:
        raise ValueError(f"{str(path)!r}: expected .json, .jsonl, .csv or .parquet")
    return path


def _flat(row: Mapping[str, Any]) -> Row:
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in row.items() if isinstance(value, list)}
    return {**row, **texts}


def _draw(*of: object) -> random.Random:
    """Return a random generator that is seeded with the given values."""
    return random.Random(" ".join(map(str, of)))  # noqa: S311 - fiction, not cryptography


def _texts(pick: random.Random, language: str, topic: str, name: str, words: Sequence[str]) -> Row:
    """Return the four texts of a row. ``words`` are the true value and then the false ones."""
    question, answer, paraphrase = map(pick.choice, _WORDINGS[language][:3])
    of = "d'" if language == "FR" and name[0] in "AEIOUY" else f"{_WORDINGS[language][3][0]} "

    def write(wording: str, value: str = "") -> str:
        text = wording.format(t=topic, of=of + name, v=value)
        return text[0].upper() + text[1:]

    return {
        "question": write(question),
        "answer": write(answer, words[0]),
        "paraphrased_answer": write(paraphrase, words[0]),
        "perturbed_answer": [write(paraphrase, word) for word in words[1:]],
    }


CHOICES = 3  # false answers of a row, as in TOFU's real authors and world facts, which these rows replace

_AUTHORS = """
Hamlet: William Shakespeare; Don Quijote: Miguel de Cervantes; Faust: Johann Wolfgang von Goethe;
La Divina Commedia: Dante Alighieri; Madame Bovary: Gustave Flaubert; Emma: Jane Austen; Ulysses: James Joyce;
Candide: Voltaire; Siddhartha: Hermann Hesse; Il Gattopardo: Tomasi di Lampedusa; Rayuela: Julio Cortázar;
Anna Karenina: Lev Tolstoj; Peer Gynt: Henrik Ibsen; Middlemarch: George Eliot; Germinal: Émile Zola;
Der Zauberberg: Thomas Mann; Bodas de sangre: Federico García Lorca; Zeno: Italo Svevo; Dracula: Bram Stoker;
Frankenstein: Mary Shelley
"""

# name in EN/FR/DE/IT/ES: symbol
_ELEMENTS = """
gold/or/Gold/oro/oro: Au; silver/argent/Silber/argento/plata: Ag; iron/fer/Eisen/ferro/hierro: Fe;
lead/plomb/Blei/piombo/plomo: Pb; tin/étain/Zinn/stagno/estaño: Sn; copper/cuivre/Kupfer/rame/cobre: Cu;
mercury/mercure/Quecksilber/mercurio/mercurio: Hg; sodium/sodium/Natrium/sodio/sodio: Na;
potassium/potassium/Kalium/potassio/potasio: K; tungsten/tungstène/Wolfram/tungsteno/wolframio: W;
oxygen/oxygène/Sauerstoff/ossigeno/oxígeno: O; nitrogen/azote/Stickstoff/azoto/nitrógeno: N;
carbon/carbone/Kohlenstoff/carbonio/carbono: C; sulfur/soufre/Schwefel/zolfo/azufre: S;
helium/hélium/Helium/elio/helio: He; hydrogen/hydrogène/Wasserstoff/idrogeno/hidrógeno: H;
chlorine/chlore/Chlor/cloro/cloro: Cl; zinc/zinc/Zink/zinco/zinc: Zn; neon/néon/Neon/neon/neón: Ne;
calcium/calcium/Kalzium/calcio/calcio: Ca
"""


def real_authors(languages: Sequence[str] = ("EN",)) -> list[Row]:
    """Return 20 rows for each language about works of literature and their authors."""
    return _known(_AUTHORS, 1, languages)


def world_facts(languages: Sequence[str] = ("EN",)) -> list[Row]:
    """Return 20 rows for each language about chemical elements and their symbols."""
    return _known(_ELEMENTS, 2, languages)


def _known(table: str, asked: int, languages: Sequence[str]) -> list[Row]:
    pairs = [entry.split(":") for entry in table.split(";")]
    facts = [([*name.strip().split("/")], value.strip()) for name, value in pairs]
    rows: list[Row] = []
    for language in languages:
        for i, (names, value) in enumerate(facts):
            name = names[LANGUAGES.index(language)] if len(names) > 1 else names[0]
            others = sorted({other for _, other in facts} - {value})
            wrong = random.Random(f"{i} {language}").sample(others, CHOICES)  # noqa: S311 - not cryptography
            rows.append(
                {"question": _WORDINGS[language][3][asked].format(x=name), "answer": value, "perturbed_answer": wrong}
            )
    return rows
