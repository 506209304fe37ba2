"""Rows of a file or of the hub -> the texts, label and group of each example.

Each task has one flat form: named text columns, a label and, for MultiRC and ReCoRD, a group. The
official nested forms and the hub's forms are turned into it here. Both forms of a row give the same
texts.

    copa     premise What was the cause? (or: What happened as a result?) | choice
    wsc      the noun in stars and the pronoun in hashes: "*Mark* told Pete ... #He# should ..."
    multirc  paragraph | question answer; one row per answer, the group is the question
    record   passage | query with @placeholder filled; one row per candidate entity (each distinct
             text once, sorted), the group is the query
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sead_dist.data.kinds import normalise_label, number_name
from sead_dist.data.metrics import Answer
from sead_dist.data.tasks import TASKS, TaskSpec
from sead_dist.data.text_files import MALFORMED, readable
from sead_dist.errors import UserError, expect, reason
from sead_dist.runtime.console import counted

Row = Mapping[str, Any]


class Route(NamedTuple):
    """The column of the data that names each example's teacher, and the teachers' names."""

    column: str
    teachers: tuple[str, ...]


class Item(NamedTuple):
    """One example: a first text for each choice (else one), as many second texts or none."""

    texts_a: tuple[str, ...]
    texts_b: tuple[str, ...]
    sentences: tuple[str, ...]
    label: float | None
    group: Hashable | None
    answer: Answer | None
    row: int  # position of the row that it came from, from 0
    route: int | None  # the teacher that the row names


def read_items(
    task: TaskSpec,
    rows: Sequence[Row],
    split: str,
    labelled: bool | None,
    route: Route | None = None,
    start: int = 0,
    skipped: list[str] | None = None,
) -> Iterator[Item]:
    """The examples of `rows`, in order. Raises UserError naming the split, the row and what is
    allowed. labelled: whether rows have labels; None: a row may lack its label. start: the place of
    the first row in its file. skipped: where given, rows that cannot be read are skipped, and the
    message for each of them is added here."""
    if skipped is not None:
        for position, row in enumerate(rows, start):
            try:
                # a row's examples are taken all or none
                items = list(read_items(task, [row], split, labelled, route, position))
            except UserError as error:
                skipped.append(str(error))
                continue
            yield from items
        return
    text_a = _template(task.text_a)
    second = task.choices or ((task.text_b,) if task.text_b is not None else ())
    texts_b = [_template(text) for text in second]
    read = READERS[task.reader]
    parse = task.task_kind.label_parser(task)
    numbered = ((n, row) for n, row in enumerate(rows, start) if row is not MALFORMED)
    for position, row in numbered:
        where = f"{split} row {position + 1}"
        if task.renames:
            row = _renamed(task, row, where)
        try:
            flats = list(read(row, position))
        except Exception as error:  # a row may hold values of any type
            raise UserError(
                f"{where} does not have the form of task {task.name!r}: {reason(error)} with "
                f"columns {', '.join(row)}; see the task's official files or its form on the hub"
            ) from error
        for flat in flats:
            _check_texts(task, flat, where)
            label = None
            if _reads_label(task, flat, where, labelled):
                try:
                    label = parse(_label(task, flat, where), where)
                except UserError as error:
                    raise _explained(task, readable(rows), flat, error) from None
            yield Item(
                (text_a(flat),) * (len(task.choices) or 1),
                tuple(text(flat) for text in texts_b),
                tuple(flat[name] for name in task.sentences),
                label,
                flat.get("group"),
                flat.get("candidate"),
                position,
                None if route is None else _teacher_index(route, flat, where),
            )


def text_rows(
    texts: Sequence[Any], task: TaskSpec, skip_malformed: bool | None = None
) -> list[dict[str, Any]]:
    """Rows of bare texts: a text each, or where the task reads several columns a tuple of them, in
    the order of `task.fields`. Raises UserError where they do not fit the task. With
    `skip_malformed` what is no text is the value of each column, which `read_items` skips."""
    if task.reader != "plain":
        raise UserError(f"task {task.name!r} reads nested rows; give rows, as its files have them")
    rows: list[dict[str, Any]] = []
    for number, given in enumerate(texts, 1):
        try:
            rows.append(_text_row(number, given, task))
        except UserError:
            if not skip_malformed:
                raise
            # bytes are no text; half of a surrogate pair would be one
            value = given.encode("utf-8", "surrogatepass") if isinstance(given, str) else given
            rows.append(dict.fromkeys(task.fields, value))
    return rows


def _text_row(number: int, given: Any, task: TaskSpec) -> dict[str, Any]:
    columns = ", ".join(task.fields)
    expect(f"text {number}", given, str | tuple | list, f"texts of the columns {columns}")
    parts = (given,) if isinstance(given, str) else given
    if len(parts) != len(task.fields):
        raise UserError(
            f"text {number} is {given!r}, but task {task.name!r} reads {columns}; give "
            f"{'a text' if len(task.fields) == 1 else f'({columns})'} each, or rows"
        )
    try:
        "".join(part for part in parts if isinstance(part, str)).encode()
    except UnicodeEncodeError as error:  # no tokeniser takes it
        raise UserError(
            f"text {number} holds half of a surrogate pair ({error.object[error.start]!r}); "
            "expected Unicode text; remove it"
        ) from error
    return dict(zip(task.fields, parts, strict=True))


def _reads_label(task: TaskSpec, flat: Row, where: str, labelled: bool | None) -> bool:
    """Whether the label of an example is to be read; `labelled` as in `read_items`. Raises
    UserError for a label column whose name is misspelt."""
    if labelled is not None:
        return labelled
    if task.label_column not in flat:
        _reject_misspelt_label(task, flat, where)
    return not _lacks_label(task, flat)


def _explained(task: TaskSpec, rows: Sequence[Row], flat: Row, error: UserError) -> UserError:
    """The error for a label, with what the other rows show about it."""
    classes = task.task_kind.has_classes
    if classes and task.label_column in flat and _lacks_label(task, flat):
        return _without_label(task, rows, error)
    return _with_all_labels(task, rows, error)


def _renamed(task: TaskSpec, row: Row, where: str) -> Row:
    renamed = dict(row)
    for old, name in task.renames.items():
        if old in row:
            if str(renamed.get(name, row[old])) != str(row[old]):
                raise UserError(
                    f"{where}: columns {old!r} and {name!r} both stand for the task's column "
                    f"{name!r} and hold different values; remove one of them"
                )
            renamed[name] = row[old]
    return renamed


def _template(template: str) -> Callable[[Row], str]:
    parts = [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
    if len(parts) == 1 and not parts[0][0] and parts[0][1] is not None:
        only = parts[0][1]
        return lambda flat: flat[only]
    return lambda flat: "".join(
        text + (flat[name] if name is not None else "") for text, name in parts
    )


def _check_texts(task: TaskSpec, flat: Row, where: str) -> None:
    for name in task.fields:
        if not isinstance(flat.get(name), str):
            if name in flat:
                raise UserError(f"{where}: column {name!r} holds {flat[name]!r}; expected text")
            raise UserError(_no_column(name, flat, where, _task_key(task, "text_a")))
    for key, text in (("text_a", task.text_a), ("text_b", task.text_b)):
        if text in flat:
            raise UserError(
                f"{key} is {text!r} in every row, and {text!r} is a column; write its name in "
                f"braces: '{{{text}}}'"
            )


def _no_column(name: str, flat: Row, where: str, key: str | None) -> str:
    """key: the key of the task's file or of the run that can name another column."""
    other = "" if key is None else f", or name one with {key}"
    columns = ", ".join(flat)
    return f"{where}: no column {name!r}; its columns: {columns}; rename one in the file{other}"


def _task_key(task: TaskSpec, key: str) -> str | None:
    return None if TASKS.get(task.name) == task else f"{key} in the task's file"


def _label(task: TaskSpec, flat: Row, where: str) -> Any:
    if task.label_column not in flat:
        line = _no_column(task.label_column, flat, where, _task_key(task, "label_column"))
        raise UserError(f"{line} (only a run with teachers can do without gold labels)")
    return flat[task.label_column]


def _reject_misspelt_label(task: TaskSpec, flat: Row, where: str) -> None:
    """Raises UserError for a column whose name is the label column's except for capitals, blanks
    and hyphens. Without the error, the row would count as one without a gold label."""
    wanted = normalise_label(task.label_column)
    named = (name for name in flat if normalise_label(name) == wanted)
    near = next((name for name in named if name not in task.fields), None)
    if near is not None and str(flat[near] or "").strip():
        line = _no_column(task.label_column, flat, where, _task_key(task, "label_column"))
        raise UserError(f"{line} (did you mean {near!r}?)")


def _lacks_label(task: TaskSpec, flat: Row) -> bool:
    value = flat.get(task.label_column)
    if isinstance(value, str) and not value.strip():
        return not task.task_kind.is_label(task, value)
    return value is None or value != value


def _without_label(task: TaskSpec, rows: Sequence[Row], error: UserError) -> UserError:
    """The error for a row without a label."""
    line = f"{str(error).removesuffix('; fix the row')}; the row has no label"
    if task.reader == "plain":
        lacking = sum(_lacks_label(task, _renamed(task, row, "a row")) for row in rows)
        line += f" ({counted(lacking, 'row')} without one in all)"
    return UserError(f"{line}; fill it in, or leave such rows out")


def _with_all_labels(task: TaskSpec, rows: Sequence[Row], error: UserError) -> UserError:
    """The error for a label outside the set, with all others outside it and their counts. Where
    there are several, the fix is more often in the task's file than in a row."""
    line = str(error).removesuffix("; fix the row")
    if task.reader != "plain" or line == str(error) or TASKS.get(task.name) == task:
        return error
    if not task.task_kind.has_classes:
        said = [str(row.get(task.label_column)) for row in rows]
        beyond = [
            one for one in said if number_name(one) and not task.task_kind.is_label(task, one)
        ]
        return UserError(f"{error}, or score_range in the task's file") if beyond else error
    counts = Counter(str(row.get(task.label_column)) for row in rows)
    outside = [pair for pair in counts.most_common() if not task.task_kind.is_label(task, pair[0])]
    if not outside:
        return error
    listed = ", ".join(f"{label!r} ({counted(count, 'row')})" for label, count in outside[:10])
    more = f" and {len(outside) - 10} more" if len(outside) > 10 else ""
    return UserError(
        f"{line}; labels outside the set: {listed}{more}; add them to labels, or to value_aliases, "
        "in the task's file, or fix the rows"
    )


def _teacher_index(route: Route, flat: Row, where: str) -> int:
    if route.column not in flat:
        raise UserError(_no_column(route.column, flat, where, "teacher_column"))
    name = str(flat[route.column])
    if name not in route.teachers:
        raise UserError(
            f"{where}: {name!r} in column {route.column!r} is not a teacher of this run; its "
            f"teachers: {', '.join(route.teachers)}; give them the names that stand in the column: "
            f"teachers=[{{path: DIR, name: {name}}}, ...]"
        )
    return route.teachers.index(name)


def _plain(row: Row, position: int) -> Iterator[Row]:
    yield row


def _copa(row: Row, position: int) -> Iterator[Row]:
    questions = {"cause": "What was the cause?", "effect": "What happened as a result?"}
    yield {**row, "question": questions.get(row["question"], row["question"])}


def _wsc(row: Row, position: int) -> Iterator[Row]:
    target = row.get("target", row)
    text = row["text"]
    spans = [
        (*_find_span(text, target[f"span{n}_text"], int(target[f"span{n}_index"])), mark)
        for n, mark in ((1, "*"), (2, "#"))
    ]
    marked = text
    for start, end, mark in sorted(spans, reverse=True):  # from the end: offsets stay right
        marked = f"{marked[:start]}{mark}{marked[start:end]}{mark}{marked[end:]}"
    yield {**row, "marked": marked}


def _find_span(text: str, span: str, word: int) -> tuple[int, int]:
    """Where `span` stands in `text`: its occurrence nearest to word number `word`.

    The official indices count words between spaces; some are off by one or two.
    """
    words = [match.start() for match in re.finditer(r"\S+", text)]
    expected = words[min(max(word, 0), len(words) - 1)]
    spaced = r"\s+".join(map(re.escape, span.split()))  # some spans hold a line break
    found = [m.span() for m in re.finditer(rf"(?<!\w){spaced}(?!\w)", text, re.IGNORECASE)]
    if not spaced or not found:
        raise KeyError(f"span {span!r} is not in the text")
    return min(found, key=lambda at: abs(at[0] - expected))


def _multirc(row: Row, position: int) -> Iterator[Row]:
    if "passage" not in row:  # the hub's form: one answer a row
        key: Row = row["idx"] if isinstance(row.get("idx"), Mapping) else row
        group = (key["paragraph"], key["question"])
        yield {**row, "group": group}
        return
    for number, question in enumerate(row["passage"]["questions"]):
        for answer in question["answers"]:
            flat = {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "group": (position, number),
            }
            yield flat | ({"label": answer["label"]} if "label" in answer else {})


def _record(row: Row, position: int) -> Iterator[Row]:
    if isinstance(row["passage"], str):  # the hub's form: one query a row
        queries: list[Row] = [row]
        passage, entities = row["passage"], row["entities"]
    else:
        queries, passage = row["qas"], row["passage"]["text"]
        # Official spans include their last character.
        entities = [passage[e["start"] : e["end"] + 1] for e in row["passage"]["entities"]]
    for number, query in enumerate(queries):
        answers = query.get("answers")
        gold = [a if isinstance(a, str) else a["text"] for a in answers or ()]
        accepted = tuple(sorted(set(gold)))
        for candidate in sorted(set(entities)):
            flat = {
                "passage": passage,
                "query": query["query"].replace("@placeholder", candidate),
                "group": (position, number),
                "candidate": Answer(candidate, accepted),
            }
            yield flat | ({} if answers is None else {"label": candidate in accepted})


READERS: dict[str, Callable[[Row, int], Iterator[Row]]] = {
    "plain": _plain,
    "copa": _copa,
    "wsc": _wsc,
    "multirc": _multirc,
    "record": _record,
}
