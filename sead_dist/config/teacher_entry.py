"""A teacher's entry of a configuration: a model, a file of predictions, or a language model.

Below each field stands what it is for, as in sections.py.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from sead_dist.config.registered import ENDPOINT, LANGUAGE_MODEL, MODEL, names
from sead_dist.config.sections import MANY, Labels, Placed, Precision, Section, allowed_name

# what the values of a file of predictions are; auto: what its columns say
VALUE_KINDS = (
    *("auto", "probabilities", "log_probabilities", "logits"),
    *("labels", "votes", "top_k", "scores"),
)
# keys that only a language model has, and keys that only one at an endpoint has
PROMPT_KEYS = ("prompt", "words", "chat", "shots", "contextual_calibration")
ENDPOINT_KEYS = ("endpoint", "concurrency", "max_requests")


def kind_of_teacher(name: Any, info: ValidationInfo) -> Any:
    """The given kind: a registered one, or for a file of predictions what its values are.

    Raises ValueError for any other name.
    """
    is_file = info.data.get("predictions") is not None
    return allowed_name(name, VALUE_KINDS if is_file else names("kind of teacher"))


def with_kind(raw: Any) -> Any:
    """The entry with its `model` as its path, and with the kind that its other keys mean.

    Raises ValueError for a model without a prompt, for a prompt without a model, and for a model
    and a path.
    """
    if not isinstance(raw, Mapping):
        return raw
    entry = dict(raw)
    if "model" in entry:
        if entry.get("path") is not None:
            raise ValueError("model and path mean the same; leave one out")
        if entry.get("prompt") is None:
            raise ValueError(
                "a language model needs a prompt and words; add them, or give path for a classifier"
            )
        entry["path"] = entry.pop("model")
    elif entry.get("path") is None and entry.get("predictions") is None:
        for key, what in (("endpoint", "an endpoint"), ("prompt", "a language model")):
            if entry.get(key) is not None:
                raise ValueError(f"{what} needs model: NAME; add the name of its language model")
    if entry.get("kind") is None and entry.get("prompt") is not None:
        entry["kind"] = LANGUAGE_MODEL if entry.get("endpoint") is None else ENDPOINT
    return entry


def prompt_mistake(kind: str, given: Mapping[str, Any]) -> str | None:
    """What is wrong with the keys of a prompt, as the end of an error message, or None.

    kind: of a teacher. given: the keys that differ from their defaults.
    """
    if kind not in (LANGUAGE_MODEL, ENDPOINT):
        of_prompt = [key for key in (*PROMPT_KEYS, *ENDPOINT_KEYS) if key in given]
        if not of_prompt:
            return None
        key, fix = of_prompt[0], f"leave {of_prompt[0]} out"
        if "predictions" in given:
            what = "a file of predictions"
        elif kind == MODEL:
            what = "a classifier"
            other_fix = "leave kind out" if "prompt" in given else "give a prompt and words too"
            fix = f"{other_fix}, or {fix}"
        else:
            what = f"kind: {kind}"
        return f"{key} is for a language model, and this is {what}; {fix}"
    for key in ("prompt", "words"):
        if key not in given:
            return f"a language model needs a prompt and words, and {key} is missing; add it"
    if kind == LANGUAGE_MODEL:
        remote = [key for key in ENDPOINT_KEYS if key in given]
        return f"{remote[0]} is for kind: {ENDPOINT}; leave it out" if remote else None
    if "endpoint" not in given:
        return "endpoint is missing; give the URL of an OpenAI-compatible interface, ending in /v1"
    return _url_mistake(given["endpoint"])


def words_mistake(words: Mapping[str, list[str]]) -> str | None:
    """What is wrong with the words of the classes, as the end of an error message, or None."""
    class_of: dict[str, str] = {}
    for name, words_of_class in words.items():
        if not words_of_class:
            return f"the class {name!r} has no words; give it one, with the blank that precedes it"
        for word in words_of_class:
            if not word.strip():
                return f"the class {name!r} has the word {word!r}, which is empty; give letters"
            if word in class_of:
                return (
                    f"the word {word!r} is given twice, for {class_of[word]} and {name}; "
                    "leave one out"
                )
            class_of[word] = name
    return None


def _url_mistake(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        return "endpoint is not a URL of http or https; give one, such as http://localhost:8000/v1"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return (
            "endpoint has a user, a password, a query or a fragment, and a run stores its "
            "configuration; give the URL alone, and the API key in the variable OPENAI_API_KEY"
        )
    return None


class TeacherConfig(Section):
    """An entry of `teachers` or `encoders`: a model, a file of predictions, a language model, an
    endpoint, or a registered kind."""

    any_text: ClassVar[frozenset[str]] = frozenset({"prompt", "words"})
    # keys that only a model has, and keys that only a file of predictions has
    of_models: ClassVar[tuple[str, ...]] = (
        *("revision", "offload", "dtype", "quantization", "max_length"),
    )
    of_files: ClassVar[tuple[str, ...]] = (
        *("id", "column", "confidence", "annotator"),
        *("abstain", "unknown", "duplicates", "smoothing"),
    )

    path: str
    """a folder, a run, or a hub id"""
    name: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    """what it is called; null: the last part of its path"""
    predictions: str | None = None
    """a file of predictions instead of a path (docs/teachers.md)"""
    kind: Annotated[str, BeforeValidator(kind_of_teacher)] = MODEL
    """model: a classifier that Transformers loads; language_model and endpoint: what has a prompt;
    or one of a plugin; of a file of predictions what its values are: auto | probabilities |
    log_probabilities | logits | labels | votes | top_k | scores"""
    placement: Placed | None = None
    """where it runs; null: where the run's placement puts it"""
    offload: bool = False
    """true: the weights of a sharded teacher lie in the CPU's memory"""
    labels: Labels | dict[str, str] = None
    """the order of its classes, [a, b, c] or task_order, if its own names do not give it; of a file
    of predictions {NAME: LABEL}"""
    revision: str | None = None
    """revision of a hub id"""
    dtype: Precision | None = None
    """fp32 | bf16 | fp16: the precision in which it computes; null: teacher_precision"""
    quantization: Literal["int8"] | None = None
    """int8: 8-bit weights (needs the extra `quantize`)"""
    max_length: Annotated[int | None, Field(gt=0, le=MANY)] = None
    """the most tokens of a row that it reads; null: as many as it can, up to the run's max_length.
    Of a language model these are tokens of prompt and word; null: as many as the fixed part of the
    prompt has, and the run's max_length"""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """its weight, with ensemble=fixed"""
    calibrate: Literal["on", "off"] | None = None
    """on | off: whether a temperature is fitted to its logits on the selection split, if it
    predicts at least 200 rows there; null: on for files of predictions and language models, else
    off"""
    id: str | None = None
    """of a file: the column of the ids that `sead-dist labels --rows` writes; null: rows are found
    by the task's text columns, else by `id`"""
    column: str | None = None
    """of a file: the column of labels or scores; null: the first of prediction, predicted_label,
    answer and label, or for scores of prediction, predicted_score, score and label"""
    confidence: str | None = None
    """of a file: the column of a label's probability; null: confidence or probability, if any"""
    annotator: str | None = None
    """of a file: the column that names whose vote a row is; null: annotator or sample, if any"""
    abstain: tuple[str, ...] = ()
    """of a file: what stands for no prediction, such as [unsure, ""]"""
    unknown: Literal["reject", "skip"] = "reject"
    """reject | skip: of a file, labels that the task does not have; reject: they are an error;
    skip: their rows have no prediction"""
    duplicates: Literal["reject", "mean"] = "reject"
    """reject | mean: of a file, different predictions of one row; reject: they are an error; mean:
    their mean is the prediction"""
    smoothing: Annotated[float, Field(ge=0, le=MANY)] = 0.1
    """of a file: what is added to the votes of each class"""
    prompt: Annotated[str | None, Field(min_length=1)] = None
    """of a language model: a template of the texts, after which it predicts a word of a class"""
    words: dict[str, list[str]] | None = None
    """of a language model: the words that stand for each class"""
    chat: bool = False
    """true: the prompt is put into the tokeniser's chat template"""
    shots: Annotated[int, Field(ge=0, le=1000)] = 0
    """the number of labelled training rows in the prompt"""
    contextual_calibration: bool = False
    """true: the logits that a language model gives for an empty text are subtracted"""
    endpoint: str | None = None
    """the URL of an OpenAI-compatible interface that has the language model"""
    concurrency: Annotated[int, Field(gt=0, le=1000)] = 8
    """the most requests to an endpoint at once"""
    max_requests: Annotated[int | None, Field(gt=0, le=MANY)] = None
    """most requests that a process sends to an endpoint; null: any number"""

    @model_validator(mode="before")
    @classmethod
    def file_stands_for_path(cls, given: Any) -> Any:
        """An entry with `predictions` has its file as its path, and the placement colocated: every
        rank reads the file."""
        if not isinstance(given, dict) or given.get("predictions") is None:
            return given
        if given.get("path") not in (None, given["predictions"]):
            raise ValueError("path names a model and predictions a file; give one of the two")
        known = {key: value for key, value in given.items() if value is not None}
        if isinstance(known.get("labels"), dict):  # YAML reads 0 as a number
            known["labels"] = {str(name): label for name, label in known["labels"].items()}
        return {"kind": "auto", "placement": "colocated", **known, "path": given["predictions"]}

    @model_validator(mode="after")
    def keys_fit(self) -> "TeacherConfig":
        """Rejects a key of a model for a file of predictions, and a key of a file for a model."""
        is_file, fields = self.predictions is not None, type(self).model_fields
        this, other = "file of predictions", "model"
        if not is_file:
            this, other = other, this
        for key in self.of_models if is_file else self.of_files:
            if getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} is for a {other}, and this is a {this}; leave {key} out")
        if is_file and self.placement != "colocated":
            raise ValueError(
                f"a file of predictions has no placement {self.placement}; leave placement out"
            )
        is_mapping = isinstance(self.labels, dict)
        if self.labels is not None and is_mapping != is_file:
            wrong, form = "a list or task_order", "{NAME: LABEL}"
            if is_mapping:
                wrong, form = "a mapping", "a list of names, or task_order"
            raise ValueError(f"labels is {wrong}, as for a {other}; give labels as {form}")
        return self

    _kind_of_its_keys = model_validator(mode="before")(with_kind)

    @field_validator("words")
    @classmethod
    def distinct_words(cls, words: dict[str, list[str]] | None) -> dict[str, list[str]] | None:
        if words is not None and (problem := words_mistake(words)):
            raise ValueError(problem)
        return words

    @model_validator(mode="after")
    def keys_of_its_kind(self) -> "TeacherConfig":
        fields = type(self).model_fields
        given = {key: value for key, value in self if value != fields[key].default}
        if problem := prompt_mistake(self.kind, given):
            raise ValueError(problem)
        return self

    @property
    def is_model(self) -> bool:
        """Whether it is a classifier that Transformers loads: no file, no language model, and of no
        kind that a plugin registered."""
        return self.kind == MODEL

    @property
    def calibrates(self) -> bool:
        """Whether a temperature is fitted to its logits on the selection split."""
        by_itself = self.predictions is not None or self.prompt is not None
        return by_itself if self.calibrate is None else self.calibrate == "on"

    @property
    def class_names(self) -> Labels:
        """The order of a model's classes as its entry gives it; None for a file of predictions."""
        return None if isinstance(self.labels, dict) else self.labels
