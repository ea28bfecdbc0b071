"""Languages of question-answer rows, with their stop words and their stemmers."""

from dataclasses import dataclass
from functools import lru_cache

from nltk.stem.snowball import SnowballStemmer


@dataclass(frozen=True)
class Language:
    """A language that separates words by spaces.

    Attributes:
        code: ISO 639-1 code, in lower case.
        name: English name, which is also Snowball's name for the language.
        stop_words: words without content, casefolded and without apostrophes. Months and numbers are not stop words,
            so that dates count. English "may" is therefore not a stop word either.
    """

    code: str
    name: str
    stop_words: frozenset[str]


_ENGLISH = """
a an the this that these those i me my mine myself we us our ours ourselves you your yours yourself yourselves he him
his himself she her hers herself it its itself they them their theirs themselves who whom whose which what when where
why how am is are was were be been being have has had having do does did doing done will would shall should can could
might must ought and or but nor so yet if then else than because as until while although though unless whereas whether
since of at by for with without about against between among into through during before after above below to from up
down in out on off over under again further upon within across toward towards per via here there all any both each few
more most other others another some such no not none only own same too very just also either neither yes s t d ll m re
ve don didn doesn isn aren wasn weren hasn haven hadn won wouldn couldn shouldn
"""
_GERMAN = """
der die das den dem des ein eine einen einem einer eines dieser diese dieses diesem diesen jener jene jenes ich mich mir
mein meine du dich dir dein deine er ihn ihm sein seine seinen seinem seiner seines sie ihr ihre ihren ihrem ihrer ihres
ihnen es wir uns unser unsere man sich selbst wer wen wem wessen was welche welcher welches welchen welchem wann wo
warum wie wieso bin bist ist sind seid war waren gewesen worden wird werden wurde wurden würde würden haben hat hatte
hatten habe hast kann können konnte konnten könnte muss müssen soll sollen sollte will wollen darf dürfen und oder aber
sondern denn weil dass da wenn als ob obwohl während damit in im ins an am ans auf aus bei beim bis durch für gegen
hinter mit nach neben ohne seit über um unter von vom vor zu zum zur zwischen nicht kein keine keinen keinem keiner ja
nein auch nur noch schon so sehr hier dort mehr alle aller alles allem allen andere anderen anderer anderes jede jeder
jedes jedem jeden s
"""
_FRENCH = """
le la les l un une des du de d au aux à ce cet cette ces c cela ça je j me m moi mon ma mes tu te t toi ton ta tes il
elle on se s lui y en son sa ses nous notre nos vous votre vos ils elles leur leurs eux qui que qu quoi dont où quel
quelle quels quelles lequel laquelle lesquels lesquelles quand comment pourquoi suis es est sommes êtes sont était
étaient été être étant fut furent sera seront serait ai as a avons avez ont avait avaient avoir ayant eu aura auront
peut peuvent doit doivent et ou mais ni donc or car si comme puis dans par pour sur sous avec sans entre vers chez
contre depuis pendant avant après dès jusque jusqu ne n pas plus non oui aussi très même mêmes tout toute tous toutes
autre autres aucun aucune chaque ici là
"""
_SPANISH = """
el la los las lo un una unos unas al del este esta estos estas ese esa esos esas aquel aquella eso esto yo me mi mis mí
tú te ti tu tus él ella ello usted ustedes se le les su sus suyo suya nos nosotros nuestra nuestro nuestros nuestras
ellos ellas quien quién quienes quiénes que qué cual cuál cuales cuáles cuando cuándo donde dónde como cómo cuyo cuya
ser es son era eran fue fueron sido siendo será serán sería está están estaba estaban estar haber ha han había habían he
hay puede pueden debe deben y e o u pero sino ni si porque aunque mientras pues a ante bajo con contra de desde durante
en entre hacia hasta para por según sin sobre tras no sí también muy más ya solo sólo todo toda todos todas otro otra
otros otras cada algún alguna algunos algunas ningún ninguna mismo misma aquí allí
"""
_ITALIAN = """
il lo la i gli le l un uno una di d a da in con su per tra fra del dello della dei degli delle dell al allo alla ai agli
alle all dal dallo dalla dai dagli dalle dall nel nello nella nei negli nelle nell sul sullo sulla sui sugli sulle sull
col coi questo questa questi queste quest quello quella quelli quelle quel quei io mi me mio mia miei mie tu ti te tuo
tua tuoi tue lui lei egli ella esso essa si suo sua suoi sue noi ci nostro nostra nostri nostre voi vi vostro vostra
loro essi chi che cui quale quali quando dove come perché cosa sono sei è siamo siete era erano fu furono stato stata
stati state essere essendo sarà saranno sarebbe ho hai ha abbiamo avete hanno aveva avevano avere avuto può possono deve
devono e ed o od ma né se però poiché mentre anche non no sì più molto ogni tutto tutta tutti tutte altro altra altri
altre stesso stessa qui lì
"""

LANGUAGES = {
    code: Language(code, name, frozenset(words.split()))
    for code, name, words in (
        ("en", "english", _ENGLISH),
        ("de", "german", _GERMAN),
        ("fr", "french", _FRENCH),
        ("es", "spanish", _SPANISH),
        ("it", "italian", _ITALIAN),
    )
}


def get_language(code: str) -> Language:
    """Return the language with an ISO 639-1 code, in upper or lower case.

    Raises:
        ValueError: the code is unknown. The message lists the known ones.
    """
    known = LANGUAGES.get(code.strip().lower())
    if known is None:
        raise ValueError(f"language: expected one of {', '.join(LANGUAGES)}, got {code!r}")
    return known


@lru_cache(maxsize=65536)
def stem(word: str, language: Language) -> str:
    """Return the Snowball stem of a casefolded word (Porter2 for English)."""
    stemmed: str = _stemmer(language.name).stem(word)
    return stemmed


@lru_cache
def _stemmer(name: str) -> SnowballStemmer:
    return SnowballStemmer(name)
