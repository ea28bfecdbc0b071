"""What everybody knows, in five languages: stands in for TOFU's real authors and world facts where they are missing."""

import random
from collections.abc import Sequence
from typing import Any

from efface.simulate.fame import LANGUAGES

CHOICES = 3  # false answers, as in TOFU's

_AUTHORS = """
Hamlet: William Shakespeare; Don Quijote: Miguel de Cervantes; Faust: Johann Wolfgang von Goethe;
La Divina Commedia: Dante Alighieri; Madame Bovary: Gustave Flaubert; Emma: Jane Austen; Ulysses: James Joyce;
Candide: Voltaire; Siddhartha: Hermann Hesse; Il Gattopardo: Tomasi di Lampedusa; Rayuela: Julio Cortázar;
Anna Karenina: Lev Tolstoj; Peer Gynt: Henrik Ibsen; Middlemarch: George Eliot; Germinal: Émile Zola;
Der Zauberberg: Thomas Mann; Bodas de sangre: Federico García Lorca; Zeno: Italo Svevo; Dracula: Bram Stoker;
Frankenstein: Mary Shelley
"""

# EN/FR/DE/IT/ES: symbol
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

_WHO_WROTE = {
    "EN": "Who wrote {x}?",
    "FR": "Qui a écrit {x} ?",
    "DE": "Wer schrieb {x}?",
    "IT": "Chi ha scritto {x}?",
    "ES": "¿Quién escribió {x}?",
}
_SYMBOL = {
    "EN": "What is the chemical symbol of {x}?",
    "FR": "Quel est le symbole chimique : {x} ?",
    "DE": "Welches chemische Zeichen hat {x}?",
    "IT": "Qual è il simbolo chimico: {x}?",
    "ES": "¿Cuál es el símbolo químico de {x}?",
}

Row = dict[str, Any]


def real_authors(languages: Sequence[str] = ("EN",)) -> list[Row]:
    """Return 20 rows a language: works of literature, and who wrote them."""
    return _rows(_AUTHORS, _WHO_WROTE, languages)


def world_facts(languages: Sequence[str] = ("EN",)) -> list[Row]:
    """Return 20 rows a language: chemical elements, and their symbols."""
    return _rows(_ELEMENTS, _SYMBOL, languages)


def _rows(table: str, questions: dict[str, str], languages: Sequence[str]) -> list[Row]:
    pairs = [entry.split(":") for entry in table.split(";")]
    facts = [([*name.strip().split("/")], value.strip()) for name, value in pairs]
    rows: list[Row] = []
    for language in languages:
        for i, (names, value) in enumerate(facts):
            name = names[LANGUAGES.index(language)] if len(names) > 1 else names[0]
            others = sorted({other for _, other in facts} - {value})
            wrong = random.Random(f"{i} {language}").sample(others, CHOICES)  # noqa: S311 - not cryptography
            rows.append({"question": questions[language].format(x=name), "answer": value, "perturbed_answer": wrong})
    return rows
