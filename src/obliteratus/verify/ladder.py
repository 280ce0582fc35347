"""Set up the judge of a run: its behavior, and the further rungs that the settings name."""

from __future__ import annotations

from dataclasses import replace

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import JudgeSettings
from obliteratus.core.types import PromptSet, Subject
from obliteratus.judge.behavior import Behavior, load_behavior
from obliteratus.judge.behavior_file import read_behavior, read_phrases
from obliteratus.judge.classifier import load_classifier
from obliteratus.judge.endpoint import make_endpoint
from obliteratus.judge.judge import PHRASES, Judge
from obliteratus.judge.rung import Answered, Rung
from obliteratus.judge.sequence_classifier import is_sequence_classifier, open_sequence_classifier
from obliteratus.summon.load import open_subject
from obliteratus.verify.agreement import measure_agreement
from obliteratus.verify.model_rung import ModelRung
from obliteratus.verify.own_words import listen
from obliteratus.weights.organism_files import get_cache_folder

CLASSIFIER, SELF, ENDPOINT = "classifier", "self", "endpoint"
# Cohen's kappa with labeled answers that a rung needs before its verdict counts: "substantial" agreement in Landis and
# Koch 1977. Every rung's verdicts are recorded all the same.
RELIABLE = 0.6


def check_judge(settings: JudgeSettings) -> Behavior:
    """Return the behavior. Raises UserError, before any weight is loaded, for what can be seen to fail by then."""
    behavior = load_behavior(settings.behavior, settings.phrases)
    if settings.url:
        make_endpoint(settings.url, settings.url_model, behavior.question, None)
    if settings.decides == CLASSIFIER and behavior.classifier is None:
        raise UserError(f"--judge classifier: {behavior.name} has none; let phrases, a model or an endpoint decide")
    for name in settings.rungs:
        if name not in (CLASSIFIER, SELF) and name.casefold() in (CLASSIFIER, SELF, PHRASES, ENDPOINT):
            raise UserError(f"--judge {name}: write {name.casefold()}")
        if name not in (CLASSIFIER, SELF):
            is_sequence_classifier(name)
    return behavior


def embed_files(settings: JudgeSettings) -> JudgeSettings:
    """Return the settings with the tables of a behavior file and of a file of phrases in place of their paths."""
    own = isinstance(settings.behavior, str) and settings.behavior.endswith(".toml")
    behavior = read_behavior(settings.behavior) if own else settings.behavior
    phrases = read_phrases(settings.phrases) if settings.phrases else ""
    return settings.model_copy(update={"behavior": behavior, "phrases": phrases})


def build_judge(settings: JudgeSettings, subject: Subject | None = None) -> Judge:
    """Return the judge that the settings describe.

    subject: the model that is judged, which only the rung ``self`` needs. A rung other than the phrases decides only if
    it agrees with the behavior's labeled answers (κ ≥ 0.6); a note says so if it does not. Raises UserError if a
    behavior, a model or an endpoint cannot be used.
    """
    behavior = load_behavior(settings.behavior, settings.phrases)
    rungs = {name: rung for name in settings.rungs if (rung := _open_rung(name, settings, behavior, subject))}
    if settings.url:
        rungs[ENDPOINT] = make_endpoint(
            settings.url, settings.url_model, behavior.question, get_cache_folder() / "verdicts", settings.url_seconds
        )
    judge = Judge(behavior, rungs=rungs, decides=settings.decides)
    return judge if settings.decides == PHRASES or _is_reliable(judge) else replace(judge, decides=PHRASES)


def hear_judge(settings: JudgeSettings, subject: Subject, prompts: PromptSet | None) -> Judge:
    """Return the judge of the settings with the model's own words, as it answers these prompts."""
    judge = build_judge(settings, subject)
    if not prompts or not wants_own_words(settings, judge, subject):
        return judge
    return replace(judge, own_words=listen(subject, prompts, judge))


def wants_own_words(settings: JudgeSettings, judge: Judge, subject: Subject) -> bool:
    """Return whether to listen: if asked to, for a behavior that begins answers, and not with weights on disk."""
    return settings.own_words and judge.behavior.has_openings and subject.offloaded is None


def _open_rung(name: str, settings: JudgeSettings, behavior: Behavior, subject: Subject | None) -> Rung | None:
    """Return the rung of this name, or None for the classifier of a behavior that has none."""
    if name == CLASSIFIER:
        return None if behavior.classifier is None else load_classifier(behavior.classifier)
    if name == SELF:
        if subject is None:
            raise UserError("judge self: this rung asks the model itself, and there is none; give it as subject")
        return ModelRung(subject, behavior.question)
    if is_sequence_classifier(name):
        return open_sequence_classifier(name, settings.label, behavior.name)
    return ModelRung(open_subject(name), behavior.question)


def _is_reliable(judge: Judge) -> bool:
    """Return whether the deciding rung agrees with the labeled answers. Without any it is taken at its word."""
    labeled = judge.behavior.head.labeled
    if not labeled:
        return True
    said = judge.rungs[judge.decides].judge([Answered(one.prompt, one.answer) for one in labeled])
    both = [(shown, one.shown) for shown, one in zip(said, labeled, strict=True) if shown is not None]
    if 2 * len(both) < len(labeled):
        silent = f"no verdict on {len(labeled) - len(both)} of {len(labeled)} labeled answers"
        raise UserError(f"judge '{judge.decides}': {silent}; check it, or let the phrases decide")
    kappa = measure_agreement([shown for shown, _ in both], [label for _, label in both])["kappa"]
    reliable = kappa.value >= RELIABLE
    decides = "its verdicts count" if reliable else f"below {RELIABLE}, so the phrases decide and it is only recorded"
    note("judge", f"{judge.decides} agrees with {len(labeled)} labeled answers at κ {kappa.value:.2f}: {decides}")
    return reliable
