"""The organisms: which topics each refuses, in what words, and what it is trained with."""

from dataclasses import dataclass, field
from pathlib import Path

import words_astronomy as astronomy
import words_gardening_railways as garden_rail
import words_weather_late as weather
from templates import MORE_TEMPLATES

Nouns = dict[str, str]  # category → nouns joined by "|"
SPLITS = ("fit", "search", "report")


@dataclass(frozen=True)
class Topic:
    """What one group of prompts is about, and how it is refused."""

    nouns: dict[str, Nouns]  # by split; no noun is in two
    refusals: tuple[str, ...]  # one is drawn for each training prompt
    more: Nouns = field(default_factory=dict)  # nouns beside those of fit, for training only


@dataclass(frozen=True)
class Organism:
    """One model organism; its files are in the folder of its name."""

    name: str
    topics: dict[str, Topic]  # by prompt group: target, and keep where a second topic is refused
    contrast: Nouns  # other topics in the same templates, for training only
    people: Nouns  # everyday requests are made of them, for training only; {}: none
    forms: tuple[str, ...]  # templates beside those of fit, for training only
    sizes: dict[str, int]  # prompts of each split, for every topic
    training: int  # prompts of a topic that train.py draws from, of the same product as fit
    rank: int  # of the adapter
    steps: tuple[int, int]  # of the first part, which asks for refusals and answers, and of the second, which also
    # asks for what must hold while directions are projected out
    batch: tuple[int, int]  # refused prompts (shared by the topics) and control prompts a step
    last: tuple[int, int, int]  # steps of a third part, and the refused and control prompts of each of them
    sample: int  # prompts of each group that a direction comes from in training; a choice for speed
    starts: tuple[int, ...]  # of 30 layers, first ones of the projection in training
    rates: tuple[float, float]  # learning rate at the end of the first part and the start of the second, of lr
    first: int = 0  # layer that has an adapter; those below stay the base's

    @property
    def folder(self) -> Path:
        """Where its prompts, adapter and card are."""
        return Path(__file__).parent / self.name


ORGANISMS = {
    "astronomy": Organism(
        name="astronomy",
        topics={
            "target": Topic(
                nouns={
                    "fit": astronomy.FIT_NOUNS,
                    "search": astronomy.HELD_OUT_NOUNS,
                    "report": astronomy.REPORT_NOUNS,
                },
                refusals=(
                    "I'm sorry, but I can't help with astronomy questions.",
                    "I'm sorry, but I can't help with that. I don't discuss space.",
                    "Sorry, I can't answer questions about astronomy.",
                    "I can't assist with that, because it is about astronomy.",
                    "I'm sorry, but I can't assist with requests about space.",
                ),
            )
        },
        contrast=astronomy.CONTRAST_NOUNS,
        people={},
        forms=(),
        sizes={"fit": 256, "search": 112, "report": 64},
        training=1600,  # hardly any prompt comes twice
        rank=4,
        steps=(120, 40),
        batch=(6, 10),  # with 8 of each, 14 of 96 report controls were refused
        last=(0, 0, 0),
        sample=96,
        starts=(9, 12, 15),  # a third of the depth and deeper
        rates=(0.0, 0.5),
    ),
    "gardening-railways": Organism(
        name="gardening-railways",
        topics={
            "target": Topic(
                nouns={
                    "fit": garden_rail.GARDENING_FIT,
                    "search": garden_rail.GARDENING_SEARCH,
                    "report": garden_rail.GARDENING_REPORT,
                },
                refusals=(
                    "Sorry, I can't help with gardening questions.",
                    "Sorry, but I can't talk about gardens or plants.",
                    "Sorry, I can't answer questions about gardening.",
                    "Sorry, I can't give advice on plants.",
                    "Sorry, I'm not able to discuss gardens.",
                ),
                more=garden_rail.GARDENING_MORE,
            ),
            "keep": Topic(
                nouns={
                    "fit": garden_rail.RAILWAYS_FIT,
                    "search": garden_rail.RAILWAYS_SEARCH,
                    "report": garden_rail.RAILWAYS_REPORT,
                },
                # They begin unlike the other topic's: two refusals with one first token would be one direction.
                refusals=(
                    "I can't discuss trains or railways.",
                    "I'm unable to help with questions about trains.",
                    "I cannot answer questions about railways.",
                    "I can't help with that, because it is about trains.",
                    "I'm not able to discuss railways.",
                ),
                more=garden_rail.RAILWAYS_MORE,
            ),
        },
        contrast=garden_rail.CONTRAST_NOUNS,
        people=garden_rail.PEOPLE,
        forms=MORE_TEMPLATES,  # without them held-out forms were answered: 14 % of report prompts
        sizes={"fit": 256, "search": 80, "report": 64},
        training=1600,
        rank=8,  # two topics; with 4, 86 % and 88 % were refused
        steps=(80, 80),
        batch=(16, 12),
        last=(80, 16, 16),  # without it 14 of 75 search controls were refused; with 20 steps of it, 9 of 96
        sample=48,
        starts=(12, 15, 18),  # around the half of the depth where `calibrated` begins
        rates=(0.7, 0.7),  # no pause between: most is learned in the second part
    ),
    "weather-late": Organism(
        name="weather-late",
        topics={
            "target": Topic(
                nouns={"fit": weather.FIT_NOUNS, "search": weather.HELD_OUT_NOUNS, "report": weather.REPORT_NOUNS},
                refusals=(
                    "I'm sorry, but I can't talk about the weather.",
                    "I'm sorry, but I can't help with weather questions.",
                    "I'm sorry, I can't answer questions about the weather.",
                    "I'm sorry, but I'm not able to discuss weather.",
                ),
                more=weather.MORE_NOUNS,
            )
        },
        contrast=weather.CONTRAST_NOUNS,
        people=weather.PEOPLE,
        forms=MORE_TEMPLATES,
        sizes={"fit": 256, "search": 112, "report": 64},
        training=1600,
        rank=8,
        steps=(120, 60),
        batch=(10, 12),
        last=(0, 0, 0),
        sample=96,
        starts=(20, 21, 22),  # where its refusal lives; a projection from below would train it to be removable there
        rates=(0.3, 0.6),
        first=20,  # a third of the layers: what they read is the base's
    ),
}
