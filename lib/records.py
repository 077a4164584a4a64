"""
Data files as examples: E2E's CSV, pairs of prompt and completion, conversations, plain text.

    source = read("train.jsonl")             # checks every record; ValueError names the line of a bad one
    source.form                              # "prompt/completion", "messages", "ShareGPT", "Alpaca", ..
    examples = source.take(range(10))        # a sequence of Example, of the first ten records

A file of JSON may be larger than memory: one pass over it checks the records and keeps where each lies, 40
bytes a record. An example is parsed when somebody asks for it.
"""

import csv
import io
import json
import mmap
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lib.checks import check, regular
from lib.files import check_no_pointer, located, read_bytes, some


@dataclass
class Example:
    """A prompt and the texts that answer it."""

    prompt: str                          # a representation, an instruction, a user's last words, or nothing
    references: list[str]                # different texts for it
    messages: list | None = None         # of a conversation: all before the answer, as read_messages has it
    is_representation: bool = False      # whether the prompt is a meaning representation

    @property
    def texts(self):
        """All texts in it."""
        before = [message["content"] for message in self.messages or ()]
        return [*(before or [self.prompt]), *self.references]


def shortened(text, length=80):
    """The text for a message: at most that many characters of it."""
    return text if len(text) <= length else text[:length - 3] + "..."


# -----------------------------------------------------------------------------
# ends that are written out
#
# Corpora that were prepared for another program often carry its end of text as characters. Left alone
# it would be spelled in ordinary tokens, before the end that training adds.

WRITTEN_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def without_end(text, told):
    """The text without the ends that stand written out at its end. Counts it in told["ends"] if it had one.

    An </s> that closes an <s> within the text is HTML.
    """
    rest = text.rstrip()
    while rest.endswith(WRITTEN_ENDS):
        end = next(end for end in WRITTEN_ENDS if rest.endswith(end))
        if end == "</s>" and rest.rfind("<s>") > 0:
            break
        rest = rest.removesuffix(end).rstrip()
    if rest == text.rstrip():
        return text
    told["ends"] += 1
    return rest


# -----------------------------------------------------------------------------
# records: an object of JSON, or a row of CSV, as a list of examples


def is_text(value):
    """Whether a value of JSON is text; half a surrogate pair is none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def read_pair(record, told):
    """prompt and completion -> one example. Both stay as they are."""
    for key in ("prompt", "completion"):
        check(is_text(record[key]), f"{key} is not text")
    completion = without_end(record["completion"], told)
    check(completion.strip(), "completion is empty")
    return [Example(record["prompt"], [completion])]


ROLES = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
UNSUPPORTED = ("tools", "functions", "images", "videos", "audios", "tool_calls", "function_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def check_supported(content):
    """ValueError where an object has what only other programs train on."""
    used = [key for key in UNSUPPORTED if content.get(key)]
    check(not used, f"has {', '.join(used)}; tools, images and sounds are not supported")
    apart = [key for key in THOUGHTS if content.get(key)]
    check(not apart, f"has {', '.join(apart)}; thoughts belong into the content, as the model is to write them")


def content_text(content):
    """The text of a message's content: text, or a list of parts of text, joined."""
    if not isinstance(content, list):
        check(is_text(content), "its content is not text")
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        check(kind == "text", f"a part of its content is of type {kind!r}; only text is supported")
        check(is_text(part.get("text")), "a part of its content is not text")
    return "".join(part["text"] for part in content)


def read_message(message, names):
    """{"role": system, user or assistant, "content": text}. names: the keys of role and content."""
    check(isinstance(message, dict), "is no object")
    check_supported(message)
    missing = [name for name in names if name not in message]
    check(not missing, f"has no {' and no '.join(missing)}")
    role, content = (message[name] for name in names)
    known = isinstance(role, str) and role in ROLES
    check(known, f"{names[0]} is {role!r}; it must be one of {', '.join(ROLES)}")
    check(message.get("weight", 1) != 0, "has weight 0, but every message of the assistant is learned; "
                                         "leave out the key, or the conversation from there on")
    return {"role": ROLES[role], "content": content_text(content)}


def read_messages(found, names, told, first=1):
    """The messages of a conversation as templates want them: an optional system message, then user and
    assistant in turn. first: the number of the first one in what is said of a bad one.

    Messages of one role in a row are joined with an empty line between them, and counted. ValueError for
    roles out of order: a system message that is not the first, an assistant before any user.
    """
    check(isinstance(found, list), "its messages are no list")
    messages = []
    for number, item in enumerate(found, first):
        with located(f"message {number}"):
            message = read_message(item, names)
        previous = messages[-1]["role"] if messages else "nothing"
        role = message["role"]
        if role == previous != "system":
            messages[-1]["content"] += "\n\n" + message["content"]
            told["joined"] += 1
            continue
        in_order = previous == "nothing" if role == "system" else role == "user" or previous == "user"
        check(in_order, f"message {number}: {role} after {previous}; the order is system (or none), "
                        "user, assistant, user, ..")
        messages.append(message)
    return messages


def turns(messages, told):
    """An example for each message of the assistant: what comes before it, and its content."""
    examples = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            message["content"] = without_end(message["content"], told)
            asked = messages[i - 1]["content"]
            examples.append(Example(asked, [message["content"]], messages[:i]))
    told["skipped"] += not examples
    return examples


def read_openai(record, told):
    """messages: a list of role and content."""
    check_supported(record)
    return turns(read_messages(record["messages"], ("role", "content"), told), told)


def read_sharegpt(record, told):
    """conversations: a list of from and value; system, where there is one, stands before them."""
    check_supported(record)
    found, first = record["conversations"], 1
    if record.get("system") and isinstance(found, list):
        found, first = [{"from": "system", "value": record["system"]}, *found], 0
    return turns(read_messages(found, ("from", "value"), told, first), told)


def read_alpaca(record, told):
    """instruction, input and output: the user's message is instruction and input, an empty line between."""
    fields = {key: record[key] for key in ("instruction", "output")}
    for key in ("input", "system"):                              # which may be missing, or null
        fields[key] = "" if record.get(key) is None else record[key]
    for key, value in fields.items():
        check(is_text(value), f"{key} is not text")
    asked = [part for part in (fields["instruction"], fields["input"]) if part]
    check(asked, "instruction is empty")
    question = {"role": "user", "content": "\n\n".join(asked)}
    messages = [question, {"role": "assistant", "content": fields["output"]}]
    if fields["system"]:
        messages.insert(0, {"role": "system", "content": fields["system"]})
    return turns(messages, told)


@dataclass(frozen=True)
class Form:
    """What the records of a file are."""

    keys: tuple                  # by which a record is recognized
    read: object                 # (record, told) -> list of Example


FORMS = {
    "messages": Form(("messages",), read_openai),
    "ShareGPT": Form(("conversations",), read_sharegpt),
    "prompt/completion": Form(("prompt", "completion"), read_pair),
    "Alpaca": Form(("instruction", "output"), read_alpaca),
}
CONVERSATIONS = ("messages", "ShareGPT", "Alpaca")


def form_of(record):
    """The name of a record's form, by its keys."""
    if isinstance(record, dict):
        for name, form in FORMS.items():
            if record.keys() >= set(form.keys):
                return name
        found = ", ".join(record) or "nothing"
    else:
        found = type(record).__name__
    raise ValueError(f"needs prompt and completion; found {shortened(found)} (messages, conversations, or instruction "
                     "and output would do as well)")


# -----------------------------------------------------------------------------
# where the records of a JSON file lie


class JsonFile:
    """The records of a file of JSON lines, or of one JSON array: where each begins and stops, in bytes."""

    def __init__(self, path):
        self.path = path
        try:
            with open(regular(path), "rb") as file:
                beginning = file.read(100)
                check_no_pointer(path, beginning)
                check(beginning, f"{path}: the file is empty")  # fault 23
                self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        self.first = 3 * beginning.startswith(b"\xef\xbb\xbf")       # A byte order mark is no content.
        self.is_array = beginning[self.first:].lstrip().startswith(b"[")
        spans = self.elements() if self.is_array else self.lines()
        flat = np.fromiter((place for span in spans for place in span), np.int64)
        self.starts, self.stops = flat.reshape(-1, 2).T
        check(len(self.starts), f"{path}: the file is empty")

    def __len__(self):
        return len(self.starts)

    def lines(self):
        """Yields (start, stop) of every line that is not blank."""
        self.content.seek(self.first)
        start = self.first
        while line := self.content.readline():
            stop = start + len(line)
            if not line.isspace():
                yield start, stop
            start = stop

    def elements(self):
        """Yields (start, stop) of every element of the array. The file's text is in memory meanwhile."""
        text = self.text_of(self.first, len(self.content))
        space, decoder = re.compile(r"\s*"), json.JSONDecoder()
        at = space.match(text, text.index("[") + 1).end()
        byte, before = self.first + len(text[:at].encode()), at
        while at < len(text) and text[at] != "]":
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                line = text.count("\n", 0, getattr(error, "pos", at)) + 1
                raise ValueError(f"{self.path}, line {line}: not JSON: {getattr(error, 'msg', error)}") from None
            start = byte + len(text[before:at].encode())
            byte, before = start + len(text[at:end].encode()), end
            yield start, byte
            at = space.match(text, end).end()
            line = text.count("\n", 0, at) + 1 if text[at:at + 1] not in (",", "]") else 0
            check(not line, f"{self.path}, line {line}: not JSON: no comma or ] after an element")
            if text[at] == ",":
                at = space.match(text, at + 1).end()
        check(not text[at + 1:].strip() and at < len(text), f"{self.path}: not JSON: the array does not end where the file does")

    def text_of(self, start, stop):
        """The text of these bytes; ValueError names the line of the first that is not UTF-8."""
        raw = self.content[start:stop]
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            line = self.content[:start + error.start].count(b"\n") + 1
            byte = raw[error.start]
            raise ValueError(f"{self.path}, line {line}: byte {byte:#04x} is not UTF-8") from None  # fault 24

    def where(self, i):
        """The place of record i for a message."""
        line = self.content[:self.starts[i]].count(b"\n") + 1
        return f"{self.path}, element {i + 1}, line {line}" if self.is_array else f"{self.path}, line {line}"

    def record(self, i):
        """The value of record i."""
        text = self.text_of(self.starts[i], self.stops[i])
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:            # ValueError: for thousands of digits, too
            reason = getattr(error, "msg", error)
            raise ValueError(f"{self.where(i)}: not JSON: {reason}") from None  # fault 24


@dataclass(frozen=True)
class Place:
    """The place of a record for a message. To find its line takes a while, so it waits until it is asked."""

    file: JsonFile
    i: int

    def __str__(self):
        return self.file.where(self.i)


# -----------------------------------------------------------------------------
# sources: what a file holds, before it is divided into splits
#
# A unit is what a split gets whole: a line of pairs, a conversation, a representation with its texts. Units
# with one key belong into one split if possible; the key is a hash of the prompt without white space around
# it. (Python's hashes have 64 bits: among a million prompts two fall together with a probability of 3e-8.)


def key_of(example):
    """The key of an example, and of the conversation that begins with it."""
    if example.messages:
        return hash(tuple((message["role"], message["content"].strip()) for message in example.messages))
    return hash(example.prompt.strip())


def grouped(examples):
    """Examples in order of first appearance, one for each prompt."""
    groups = {}
    for example in examples:
        first = groups.setdefault(example.prompt, replace(example, references=[]))
        first.references.extend(example.references)
    return list(groups.values())


class Listed:
    """A source in memory: CSV, text, the embedded world. A unit is an example."""

    def __init__(self, form, examples, told=None, path=""):
        check(examples, f"{path}: no examples in it")
        self.form, self.examples = form, examples
        self.told = told or Counter()
        self.keys = np.array([key_of(example) for example in examples])

    def take(self, units):
        """The examples of these units."""
        taken = [self.examples[i] for i in units]
        return grouped(taken) if self.form == "prompt/completion" else taken


class Stored:
    """A source in a file of JSON. A unit is a record: a pair, or a conversation of several examples."""

    def __init__(self, path):
        self.file = JsonFile(path)
        self.told = Counter()
        first = self.file.record(0)
        with located(Place(self.file, 0)):
            self.form = form_of(first)
        facts = np.fromiter((fact for i in range(len(self.file)) for fact in self.facts(i)), np.int64)
        self.keys, self.prompts, self.turns = facts.reshape(-1, 3).T
        check(self.turns.any(), f"{path}: no examples in it: no conversation has a message of the assistant")

    def facts(self, i):
        """(key, hash of the prompt as it is, number of examples) of record i."""
        examples = self.examples(i, self.told)
        first = examples[0] if examples else Example("", [])
        return key_of(first), hash(first.prompt), len(examples)

    def examples(self, i, told):
        """The examples of record i. ValueError where it is none of the file's form."""
        record = self.file.record(i)
        complete = isinstance(record, dict) and record.keys() >= set(FORMS[self.form].keys)
        with located(Place(self.file, i)):
            form = self.form if complete else form_of(record)
            check(form == self.form, f"a record of {form}, while the first of the file is of {self.form}; "
                                     "put each form into a file of its own")
            return FORMS[form].read(record, told)

    def take(self, units):
        """The examples of these units, as a sequence; pairs of one prompt make one example."""
        units = np.asarray(units, np.int64)
        counts = self.turns[units]
        records = np.repeat(units, counts)
        turn = np.arange(len(records)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.arange(len(records) + 1)
        if self.form == "prompt/completion" and len(records):
            order, starts = in_groups(self.prompts[records])
            records = records[order]
        return Examples(self, records, turn, starts)


def in_groups(values):
    """(order, starts): the indices of equal values side by side, in order of first appearance, and where
    each group starts among them, with the end."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    group = rank[group]
    order = np.argsort(group, kind="stable")
    return order, np.searchsorted(group[order], np.arange(len(first) + 1))


class Examples(Sequence):
    """Examples that lie in a file, each parsed when it is asked for. Example i consists of the turns from
    starts[i] to starts[i + 1]."""

    def __init__(self, source, records, turn, starts):
        self.source, self.records, self.turn, self.starts = source, records, turn, starts

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]                                  # IndexError, and negative indices
        span = range(self.starts[i], self.starts[i + 1])
        parts = [self.part(j) for j in span]
        references = [text for part in parts for text in part.references]
        return Example(parts[0].prompt, references, parts[0].messages)

    def part(self, j):
        """The example of one turn."""
        return self.source.examples(self.records[j], Counter())[self.turn[j]]

    def place(self, i):
        """Where example i begins, for a message."""
        return Place(self.source.file, self.records[self.starts[i]])


# -----------------------------------------------------------------------------
# readers


def read_text(path):
    """The text of a file. ValueError where it cannot be read, is empty, or is not UTF-8; then the
    message names the line."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8") from None  # fault 24
    check(text.strip(), f"{path}: the file is empty")  # fault 23
    return text


def csv_rows(path):
    """Yields ("path, line 3", list of cells) for each row. A blank line is a row without cells."""
    csv.field_size_limit(2**31 - 1)                              # not 131,072 characters
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    where = f"{path}, line 1"
    try:
        for row in reader:
            yield where, row
            where = f"{path}, line {reader.line_num + 1}"        # where the next row begins
    except csv.Error as error:
        raise ValueError(f"{where}: {error}") from None


MR = re.compile(r"\s*[\w ]+\[[^\[\]]+\]\s*(,\s*[\w ]+\[[^\[\]]+\]\s*)*")


def read_representation(cells, told):
    """mr and ref, the columns of the E2E challenge -> one example."""
    mr, ref = cells["mr"], cells["ref"]
    check(mr.strip(), "mr is empty")
    check(ref.strip(), "ref is empty")
    check(MR.fullmatch(mr), f"{shortened(mr)!r} is no representation; that is attribute[value], ...")
    return [Example(mr, [ref], is_representation=True)]


def read_csv(path):
    """A source: a header with mr and ref (E2E), prompt and completion, or instruction and output; then a row
    an example."""
    rows = csv_rows(path)
    _, header = next(rows)
    forms = [name for name in ("prompt/completion", "Alpaca") if set(FORMS[name].keys) <= set(header)]
    missing = [column for column in ("mr", "ref") if column not in header]
    is_e2e = not missing
    check(is_e2e or forms, f"{path}: no column {' and '.join(missing)}; found {', '.join(header) or 'nothing'} "
                           "(prompt and completion, or instruction and output would do as well)")
    twice = [column for column, n in Counter(header).items() if n > 1]
    check(not twice, f"{path}: {some(twice)} is the name of two columns")
    read = read_representation if is_e2e else FORMS[forms[0]].read
    told, examples = Counter(), []
    for where, row in rows:
        if not row:
            continue
        check(len(row) == len(header), f"{where}: {len(row)} columns where the header has {len(header)}")
        with located(where):
            examples += read(dict(zip(header, row)), told)
    if is_e2e:
        return Listed("representations", grouped(examples), told, path)
    return Listed(forms[0], examples, told, path)


def documents(text, told):
    """The texts in a text: what ends that are written out divide, or else its paragraphs; each once."""
    pattern = "|".join(map(re.escape, WRITTEN_ENDS))
    found = [part for part in re.split(pattern, text) if part.strip()]
    ends = len(re.findall(pattern, text))
    told["ends"] += ends
    if not ends:
        found = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    return dict.fromkeys(part.strip("\n") for part in found)


def read_txt(path):
    """A source of texts without prompts."""
    told = Counter()
    text = read_text(path).replace("\r\n", "\n")
    return Listed("text", [Example("", [part]) for part in documents(text, told)], told, path)


READERS = {".csv": read_csv, ".json": Stored, ".jsonl": Stored, ".txt": read_txt}


def read(path):
    """The source in a file, by its ending: .csv, .json, .jsonl or .txt."""
    path = Path(path)
    return READERS[path.suffix](path)
