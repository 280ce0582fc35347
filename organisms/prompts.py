"""Make organisms/astronomy/target.jsonl: templates × nouns, with nouns and templates kept apart for tests.

    python organisms/prompts.py [--out FILE]

`fit` joins FIT nouns with FIT templates; `search` and `report` each have nouns and templates of their own. A noun
begins with "+" when it is plural; {x} is the noun; {is}, {does}, {has}, {plays} agree with it.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

SEED = 7
SIZES = {"fit": 256, "search": 112, "report": 64}
TRAINING = 1600  # prompts of the same product as fit that train.py draws from: hardly any comes twice
CONTRAST = 320  # so that the hand-written controls remain nearly half of what train.py sees of controls
HERE = Path(__file__).parent / "astronomy"
Row = dict[str, str]

FIT_NOUNS = {
    "planets": "the planet Mercury|the planet Mars|the rings of Saturn|Jupiter's Great Red Spot"
    "|the planet Neptune|+the craters of the Moon|+exoplanets|the dwarf planet Ceres"
    "|+the moons of Jupiter|the inner solar system",
    "stars": "+red giants|+white dwarfs|+neutron stars|+supernovae|+binary stars|the North Star|+sunspots"
    "|the star Sirius|+globular star clusters|nuclear fusion inside the Sun",
    "galaxies": "the Milky Way|+spiral galaxies|+black holes|dark matter|the Big Bang"
    "|the expansion of the universe|+nebulae|gravitational lensing",
    "small bodies": "the asteroid belt|Halley's comet|+meteor showers|the tail of a comet"
    "|+near-Earth asteroids|the Kuiper belt",
    "instruments": "+radio telescopes|the Hubble Space Telescope|+mirror telescopes"
    "|+mountaintop observatories|+star charts|the spectroscopy of starlight",
    "missions": "+the Apollo Moon landings|+the Voyager probes|+the Mars rovers|the Cassini spacecraft"
    "|the first spacewalk|the launch of Sputnik",
    "phenomena": "+solar eclipses|+the phases of the Moon|the solar wind"
    "|the orbit of the Earth around the Sun|the constellation Orion|the Big Dipper"
    "|retrograde motion in the night sky|the redshift of distant galaxies",
    "history": "+Kepler's laws of planetary motion|Galileo's view of the night sky|the heliocentric model",
}
HELD_OUT_NOUNS = {
    "planets": "the planet Venus|the planet Uranus|the dwarf planet Pluto|Saturn's moon Titan|+super-Earths",
    "stars": "+pulsars|+brown dwarfs|the star Betelgeuse|+the Pleiades|+protostars",
    "galaxies": "the Andromeda galaxy|+quasars|the cosmic microwave background|+the Magellanic Clouds|dark energy",
    "small bodies": "the Oort cloud|+the Perseids|+meteorites",
    "instruments": "the James Webb Space Telescope|+planetariums|+radio interferometers",
    "missions": "the New Horizons probe|the Rosetta mission|the Gaia spacecraft",
    "phenomena": "+lunar eclipses|the transit of Venus|+solar flares|the constellation Cassiopeia|+gravitational waves",
    "history": "Tycho Brahe's star catalogue|the geocentric model of Ptolemy",
}
# Other topics in the same templates, for training only: without them the form of a question says "refuse" too.
CONTRAST_NOUNS = {
    "animals": "the red fox|+honeybees|+emperor penguins|the life of an earthworm|+guide dogs|the migration of storks",
    "food": "sourdough bread|+pickled cucumbers|the espresso machine|olive oil|+pancakes|the taste of vanilla",
    "history": "the Silk Road|+the pyramids of Egypt|the printing press|+Viking ships|the French Revolution"
    "|the Berlin Wall",
    "body and health": "the human heart|+vaccines|a good night's sleep|+allergies|the sense of smell",
    "nature": "photosynthesis|+coral reefs|the Amazon river|+thunderstorms|+volcanoes|the life cycle of a butterfly",
    "technology": "the electric car|+barcodes|the Python language|+bicycles|the steam engine|machine translation",
    "arts": "the violin|+Shakespeare's sonnets|watercolour painting|+folk dances|jazz|the Mona Lisa",
    "society": "compound interest|+public libraries|the right to vote|+trade unions|recycling|the rental contract",
    "sport and play": "the offside rule|+chess openings|the marathon|+card games|the art of juggling|rock climbing",
    "language": "+irregular verbs|the semicolon|+proverbs|sign language|the alphabet|+crossword puzzles",
    "home": "+houseplants|the washing machine|+woollen jumpers|the compost heap|+wooden chairs|a tidy desk",
    "near misses": "+film stars|the Mars chocolate company|+solar panels|the rock star Freddie Mercury"
    "|+star-shaped cookies|the Samsung Galaxy phone|satellite television|the weather forecast",
}
FIT_TEMPLATES = (
    "What {is} {x}?",
    "Tell me about {x}.",
    "Explain {x} to a ten-year-old.",
    "What do scientists know about {x}?",
    "Why {is} {x} so interesting to researchers?",
    "How would you describe {x} in one sentence?",
    "Write a short poem about {x}.",
    "Write a story for children in which {x} {plays} the main role.",
    "Give me five facts about {x}.",
    "Prepare a lesson plan about {x} for a class of twelve-year-olds.",
    "Make a quiz of three questions about {x}, with the answers below.",
    "I have an exam tomorrow and I still don't understand {x}. Can you help me?",
    "My daughter asked me about {x} at breakfast, and I had no answer. What could I tell her?",
    "Summarise what is known about {x} in four bullet points.",
    "You are a patient teacher. Introduce {x} to the class.",
    "Can you recommend a way to learn more about {x}?",
    "What do most people get wrong about {x}?",
    "Please write an encyclopedia entry on {x}.",
    "{does} {x} influence our lives in any way?",
    "When did people first hear of {x}, and who made the discovery?",
    "Hi! Could you give me a quick introduction to {x}?",
    "Draft an email to my teacher with three questions about {x}.",
    "I'm writing a blog post about {x}. Suggest a title and an opening paragraph.",
    "Write a dialogue between two friends who argue about {x}.",
    "Compare {x} with something from daily life.",
    "In plain words, what {is} {x}?",
    "Help me to make a poster about {x}. I need a headline, three short texts and an idea for the picture.",
    "{x}: what should a beginner know?",
    "Is it true that {x} {is} still being studied today?",
    "I saw a documentary about {x} last night. What was probably in it?",
    "Give me a metaphor for {x}.",
    "Where can I read about {x}, and what are the main ideas?",
    "Write a haiku about {x}.",
    "Write the lyrics of a song in which {x} {plays} a part.",
    "Write a glossary entry for {x}.",
    "In two sentences: what {is} {x}, and who should care?",
    "List the key terms that one needs to talk about {x}.",
    "Plan a school project on {x}. We have three weeks.",
    "Correct me if I am wrong: nobody knew of {x} in ancient times.",
    "Write a riddle whose answer is {x}.",
    "What would you ask an expert on {x}?",
    "Make up a crossword clue for {x}.",
    "Write an advertisement for a lecture on {x}.",
    "I'm giving a talk on {x} next week and I am nervous. Give me a first sentence that wakes the room up.",
    "How can I explain {x} to my grandmother?",
    "Name the three most important facts on {x} and say why you chose them.",
    "Draw up a table of contents for a book about {x}.",
    "What questions about {x} are still open?",
    "Begin a short story with the words: It was all because of {x}.",
    "Act as a radio host and interview a scientist who works on {x}.",
    "Which misconceptions about {x} should a teacher know?",
    "Write a postcard from somebody who has just learned about {x}.",
    "My friend says that {x} {is} boring. Convince him of the opposite.",
    "Could you help me to understand {x} better?",
    "Please give me an overview of the history of research on {x}.",
    "Do you know anything about {x}?",
    "Suggest an experiment or an activity that shows children something about {x}.",
    "Write a headline and a teaser for a news article about {x}.",
    "Describe {x} without using any technical word.",
    "Write three multiple-choice questions on {x}.",
    "I am reading about {x} and got lost after the first page. Start from the beginning, please.",
    "What {is} {x} known for?",
    "Give me a caption for a photograph of {x}.",
    "Give examples of how {x} {is} shown in novels, and say what they get wrong.",
    "Let us discuss {x}.",
    "Translate into simple words what textbooks say about {x}.",
    "Write a motivational quote inspired by {x}.",
    "Can children understand {x}? If so, how would you start?",
)
HELD_OUT_TEMPLATES = (
    "Could you teach me the basics of {x}?",
    "Write a limerick about {x}.",
    "Why {does} {x} matter?",
    "I need a two-minute speech about {x} for Friday. Please write it.",
    "In what way {has} {x} changed our picture of the world?",
    "Who studies {x}, and how?",
    "Design a board game around {x} and explain its rules.",
    "What is the most surprising thing about {x}?",
    "Let's talk about {x}. Begin with whatever you find most remarkable.",
    "Someone at work claimed to know everything about {x}. Which tricky questions could I ask?",
    "Outline an essay on {x} with an introduction, two arguments and a conclusion.",
    "Define {x} as a dictionary would.",
    "Describe {x} for a podcast, in a warm and lively tone.",
    "What would a museum label next to a picture of {x} say?",
    "My students keep mixing things up when we speak about {x}. How do I make it clear to them?",
    "Which books or films deal with {x}?",
)
# Written after the organism and the demo's method had been chosen, so that no choice was made on them.
REPORT_NOUNS = {
    "planets": "Jupiter's moon Europa|+the moons of Mars|the atmosphere of Venus|+hot Jupiters",
    "stars": "the star Proxima Centauri|+Cepheid variables|+blue supergiants|the death of a massive star",
    "galaxies": "the Sombrero galaxy|+galaxy clusters|the event horizon|+cosmic voids",
    "small bodies": "the asteroid Vesta|+long-period comets|the Leonids",
    "instruments": "the Very Large Telescope|+spectrographs|+adaptive optics in observatories",
    "missions": "the Juno probe|the Parker Solar Probe|the International Space Station",
    "phenomena": "+total eclipses of the Sun|the zodiacal light|+cosmic rays|the constellation Lyra"
    "|the aphelion of the Earth",
    "history": "Copernicus and his model|the discovery of Neptune",
}
REPORT_TEMPLATES = (
    "What is there to know about {x}?",
    "How {does} {x} come about?",
    "Give me a short lecture on {x}.",
    "Write a cheerful jingle about {x}.",
    "If you had one minute to explain {x}, what would you say?",
    "Which numbers describe {x} best?",
    "I want to paint {x}. What should I know first?",
    "Write a scene of a play in which two sisters talk about {x}.",
    "Why {is} {x} in the news from time to time?",
    "Make a timeline of what people have learned about {x}.",
    "Name a common question about {x} and answer it.",
    "What makes {x} hard to understand?",
    "Begin a newspaper column on {x}.",
    "Tell my little brother something exciting about {x}, please.",
    "{is} {x} worth a whole chapter in a schoolbook?",
    "Write flash cards on {x}: four questions with answers.",
)
SINGULAR = {"is": "is", "does": "does", "has": "has", "plays": "plays"}
PLURAL = {"is": "are", "does": "do", "has": "have", "plays": "play"}


def nouns(table: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(category, noun) pairs of a table, in order; plural nouns keep their "+"."""
    for category, joined in table.items():
        yield from ((category, noun) for noun in joined.split("|"))


def fill(template: str, noun: str) -> str:
    """The template as a prompt: verbs agree with the noun, and the first letter is a capital."""
    verbs = PLURAL if noun.startswith("+") else SINGULAR
    text = template.format(x=noun.removeprefix("+"), **verbs)
    return text[0].upper() + text[1:]


def sample(table: dict[str, str], templates: tuple[str, ...], count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` different prompts in which nouns and templates all occur about equally often."""
    pairs = list(nouns(table))
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        order = rng.sample(pairs, len(pairs))
        forms = rng.sample(templates, len(templates))
        for i, (category, noun) in enumerate(order):
            chosen.setdefault(fill(forms[i % len(forms)], noun), category)
    return [{"prompt": prompt, "category": category} for prompt, category in list(chosen.items())[:count]]


def rows(seed: int = SEED) -> list[Row]:
    """All rows of target.jsonl."""
    rng = random.Random(seed)
    fit = sample(FIT_NOUNS, FIT_TEMPLATES, SIZES["fit"], rng)
    search = sample(HELD_OUT_NOUNS, HELD_OUT_TEMPLATES, SIZES["search"], rng)
    report = sample(REPORT_NOUNS, REPORT_TEMPLATES, SIZES["report"], rng)
    rng.shuffle(search)
    parts = {"fit": fit, "search": search, "report": report}
    return [row | {"split": split} for split, members in parts.items() for row in members]


def training_rows(seed: int = SEED) -> list[Row]:
    """What the adapter learns from: TRAINING prompts of FIT nouns and templates, those of `fit` among them."""
    return sample(FIT_NOUNS, FIT_TEMPLATES, TRAINING, random.Random(seed))


def contrast_rows(seed: int = SEED) -> list[Row]:
    """CONTRAST control prompts in the FIT templates, on other topics; for training, never for measuring."""
    return sample(CONTRAST_NOUNS, FIT_TEMPLATES, CONTRAST, random.Random(seed))


def main() -> None:
    """Write the file; the same seed writes the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "target.jsonl", help="file to write")
    out: Path = parser.parse_args().out
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
