"""The organisms: the topics that each refuses, its refusals, and the settings of its training."""

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
    """The subject of one group of prompts, and how it is refused."""

    nouns: dict[str, Nouns]  # by split; no noun is in two
    refusals: tuple[str, ...]  # one is drawn for each training prompt
    more: Nouns = field(default_factory=dict)  # additional nouns, for training only


@dataclass(frozen=True)
class Organism:
    """One model organism; its files are in the folder of its name."""

    name: str
    topics: dict[str, Topic]  # by prompt group: target, and keep if a second topic is refused
    contrast: Nouns  # other topics in the same templates, for training only
    people: Nouns  # people for everyday requests, for training only; {} for no such requests
    forms: tuple[str, ...]  # additional templates, for training only
    sizes: dict[str, int]  # prompts of each split, for every topic
    training: int  # topic prompts that train.py draws from: fit nouns × fit templates, like the fit prompts
    rank: int  # of the adapter
    steps: tuple[int, int]  # of the first part, which trains refusals and answers, and of the second, which also
    # trains what must hold while directions are projected out
    batch: tuple[int, int]  # refused prompts (shared by the topics) and control prompts in each step
    last: tuple[int, int, int]  # steps of a third part, and the refused and control prompts in each of them
    sample: int  # prompts of each group from which training computes directions; few, for speed
    starts: tuple[int, ...]  # first layers (of 30) of the projection in training, one of which is drawn for each step
    rates: tuple[float, float]  # share of lr at the end of the first part and at the start of the second
    first: int = 0  # first layer with an adapter; the layers below are the base's

    @property
    def folder(self) -> Path:
        """The folder of its prompts, adapter and card."""
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
        training=1600,  # hardly any prompt is drawn twice
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
                # They begin unlike the other topic's, since refusals with the same first token would share a direction.
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
        forms=MORE_TEMPLATES,  # without them 14 % of report prompts, whose templates are held out, were answered
        sizes={"fit": 256, "search": 80, "report": 64},
        training=1600,
        rank=8,  # two topics; with 4, 86 % and 88 % were refused
        steps=(80, 80),
        batch=(16, 12),
        last=(80, 16, 16),  # without it 14 of 75 search controls were refused; with 20 steps of it, 9 of 96
        sample=48,
        starts=(12, 15, 18),  # around half of the depth, where `calibrated` begins
        rates=(0.7, 0.7),  # no dip in between: most is learned in the second part
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
        starts=(
            20,
            21,
            22,
        ),  # where its refusal is; from lower layers it would be trained to be removable there
        rates=(0.3, 0.6),
        first=20,  # only the last third is trained, and it reads the base's activations
    ),
}
