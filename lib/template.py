"""
Chat templates: conversations as the tokens that an instruct model was trained on.

    chat = load("base", folder, tokenizer)           # the template that the model in the folder brings
    chat.prompt(messages)                            # ids of what stands before an answer
    chat.example(messages, "Yes, we do.")            # (ids, n_prompt) of a conversation that ends with it

Templates are programs in the language of the optional package jinja2. They come with downloaded models, so
they run in its sandbox, as transformers runs them, and for five seconds at most. A signal ends them then
(SIGALRM, which only reaches a process's main thread), and products that would take memory instead of time are
refused beforehand. A process of their own would bound them more strictly, at a millisecond a conversation.

What a template writes and what a message says are told apart: the words of special tokens within a message
are broken up with a character that occurs nowhere else, so that only the template's are recognized, and the
character is taken out again before the text becomes tokens. Tokens that a base's tokenizer does not call
special, as Qwen3's <think>, are meant for contents, and are found there.
"""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lib.checks import check, timed
from lib.files import read_bytes, read_json, some

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATES = ("base", "chatml")      # and the path of a .jinja file
KEPT = "chat_template.jinja"             # the file's name, in a model's folder and in a run's
SECONDS = 5                              # that a template may take
LARGEST = 10**6                          # characters or items that a product may have


@dataclass(frozen=True)
class Added:
    """A special token: its id, and whether it swallows the white space beside it, as Phi-3's do."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


# -----------------------------------------------------------------------------
# the sandbox


@contextmanager
def limited(what):
    """ValueError(what it says, or how long it ran) where a template raises, or takes more than SECONDS."""
    with timed(what, SECONDS):
        try:
            yield
        except RecursionError:
            raise ValueError(f"{what} nests too deeply") from None
        except Exception as error:       # whatever a template makes jinja2 or Python raise
            raise ValueError(f"{what} says: {' '.join(str(error).split()) or type(error).__name__}") from None


def environment():
    """jinja2's sandboxed environment, with what transformers adds to it."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError("chat templates need the jinja2 package: pip install jinja2") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} .. {% endgeneration %}: what is inside, as it is."""

        tags = {"generation"}

        def parse(self, parser):
            """Called by jinja2 behind the tag's name."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Without the two operators whose results may be huge at once, where no signal comes through."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            """Called by jinja2 instead of the operator."""
            check_size(operator, left, right)
            return super().call_binop(context, operator, left, right)

    class Namespace(jinja2.utils.Namespace):
        """jinja2's, without the names that begin with _, through which Python's inner parts can be reached."""

        def __init__(*args, **kwargs):           # As jinja2's: self is in args, so that it may be a name too.
            for name in dict(*args[1:], **kwargs):
                check_name(name)
            jinja2.utils.Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name, value):
            check_name(name)
            super().__setitem__(name, value)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = strftime_now
    sandbox.globals["namespace"] = Namespace
    sandbox.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return sandbox


def check_name(name):
    """ValueError for a name that a template must not give to a namespace's attribute."""
    check(not str(name).startswith("_"), f"a namespace cannot hold {name!r}, because that begins with _")


def check_size(operator, left, right):
    """ValueError for a power or a product of a size that no template needs."""
    if operator == "**":
        small = max(abs(left), abs(right)) <= 1000
    else:
        lengths = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
        sized = any(hasattr(side, "__len__") for side in (left, right))
        small = lengths[0] * lengths[1] <= LARGEST or not sized
    check(small, f"a result of {operator} is too large")


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter of that name, which does not escape for HTML as jinja2's own does."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form):
    """The time, as a template may ask for it."""
    return datetime.now().strftime(form)


# -----------------------------------------------------------------------------
# where a template is found


def source_in(folder):
    """The text of the template that a model's folder brings, None where there is none.

    tokenizer_config.json may hold several with names; "default" is the one for conversations.
    """
    path = Path(folder, KEPT)
    if path.is_file():
        return read_template(path)
    path = Path(folder, "tokenizer_config.json")
    found = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        shaped = all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in found)
        check(shaped, f"{path}: chat_template is a list of something else than name and template")
        named = {item["name"]: item["template"] for item in found}
        check("default" in named, f"{path}: chat_template has no default; it has {some(named)}; give one as --template FILE.jinja")
        found = named["default"]
    check(found is None or isinstance(found, str), f"{path}: chat_template is no text")
    return found


def read_template(path):
    """The text of a file."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None


def load(wanted, folder, tokenizer, own=()):
    """The Chat of a template: "base" is what the model's folder brings, or else ChatML; "chatml" is that;
    any other the path of a file. own: words of tokens that a run has added to the tokenizer.

    ChatML needs its two tokens in the tokenizer; ValueError that says what to do where they are missing.
    """
    if wanted not in CHAT_TEMPLATES:
        return Chat(read_template(wanted), wanted, tokenizer, own)
    source = source_in(folder) if wanted == "base" else None
    if source is not None:
        return Chat(source, f"the chat template of {folder}", tokenizer, own)
    known = tokenizer.special_tokens | tokenizer.added_tokens
    missing = [token for token in CHATML_TOKENS if token not in known]
    reason = f"{folder} brings no chat template, and " if wanted == "base" else ""
    check(not missing, f"{reason}ChatML needs the tokens {' and '.join(missing)}, which the tokenizer lacks; "
                       "give it these by --add_tokens FILE, or a template of tokens that it has by --template FILE.jinja")
    start = "{{ bos_token }}" if tokenizer.begin and tokenizer.names.get("bos_token") else ""
    return Chat(start + CHATML, "ChatML", tokenizer, own)


# -----------------------------------------------------------------------------
# conversations as tokens


class Chat:
    """A template with the tokenizer that it is for. Its tokens are the tokenizer's special ones, and of those
    that were added later the ones that it writes. Within a message the words of the special ones, of ChatML's,
    and of a run's own are text.

    ends: the ids with which it ends an answer. ValueError where there is none, because a model could not
    learn to stop then.
    """

    def __init__(self, source, name, tokenizer, own=()):
        self.source, self.name, self.tokenizer = source, name, tokenizer
        sandbox = environment()
        with limited(name):
            self.template = sandbox.from_string(source)
        self.added = {word: token for word, token in tokenizer.added_tokens.items() if word in source}
        self.tokens = tokenizer.special_tokens | self.added
        self.guarded = {*tokenizer.special_tokens, *CHATML_TOKENS, *own}
        words = sorted(self.tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, words)) or "(?!)")
        self.ends = self.find_ends()

    def find_ends(self):
        """The id of the first special token behind an answer, as a set."""
        probe = "zqzqz"
        conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": probe}]
        text = self.render(conversation, False, mark_for(conversation))
        _, answered, after = text.rpartition(probe)
        check(answered, f"{self.name} leaves out what the assistant says")
        found = self.special.search(after)
        check(found, f"{self.name} ends an answer without a special token, so that no model could learn to stop; "
                     "write {{ eos_token }} behind it")
        return frozenset({self.tokens[found[0]].id})

    def render(self, messages, generation, mark):
        """The rendering of messages, in whose contents the guarded words are broken up with the mark.
        generation: whether it goes on to where the assistant begins."""
        broken = [message | {"content": self.broken(message["content"], mark)} for message in messages]
        given = self.tokenizer.names | {"tools": None, "documents": None, "add_generation_prompt": generation}
        with limited(self.name):
            return self.template.render(messages=broken, **given)

    def broken(self, text, mark):
        """The text with the mark between all characters of guarded words."""
        def replaced(found):
            word = found[0]
            return mark.join(word) if word in self.guarded else word
        return self.special.sub(replaced, text)

    def unbroken(self, text, mark):
        """The text without the mark, in a list. Where it holds the word of an added token, which the tokenizer
        would find, the parts between the marks."""
        whole = text.replace(mark, "")
        if any(word in whole for word in self.added):
            return text.split(mark)
        return [whole]

    def text(self, messages):
        """What stands before an answer, for people to read."""
        mark = mark_for(messages)
        return self.render(messages, True, mark).replace(mark, "")

    def prompt(self, messages):
        """The ids of what stands before an answer."""
        mark = mark_for(messages)
        return self.ids(self.render(messages, True, mark), mark)

    def example(self, messages, answer):
        """(ids, n_prompt): the tokens of the messages and the answer with its end, and how many of them stand
        before the answer. ValueError where the rendering before the answer is no beginning of the whole.

        The whole is tokenized at once. Where a token would reach across the border, the two parts are
        tokenized apart, since the model sees the first one alone when it answers.
        """
        conversation = [*messages, {"role": "assistant", "content": answer}]
        mark = mark_for(conversation)
        before = self.render(messages, True, mark)
        whole = self.render(conversation, False, mark)
        self.check_prefix(before, whole)
        prompt, ids = self.ids(before, mark), self.ids(whole, mark)
        if ids[:len(prompt)] != prompt:
            ids = prompt + self.ids(whole[len(before):], mark, goes_on=True)
        return ids, len(prompt)

    def check_prefix(self, before, whole):
        """ValueError that shows where the two renderings part, unless one is the beginning of the other."""
        if whole.startswith(before):
            return
        pairs = enumerate(zip(before, whole))
        at = next((i for i, (one, other) in pairs if one != other), min(len(before), len(whole)))
        raise ValueError(
            f"{self.name} renders {before[at:at + 40]!r} before an answer, but {whole[at:at + 40]!r} once it is there, so that "
            "training would show the model what it never sees when it answers; give another as --template FILE.jinja")

    def ids(self, text, mark, goes_on=False):
        """The tokens of a rendering. goes_on: whether other text stands before it."""
        tokenizer = self.tokenizer
        if tokenizer.encode_special is not None and mark not in text and not goes_on:
            return tokenizer.encode_special(text)
        parts = re.split(f"({self.special.pattern})", text)      # text, token, text, token, .., text
        tokens = [None, *(self.tokens[word] for word in parts[1::2]), None]
        ids = []
        for i, part in enumerate(parts[::2]):
            before, behind = tokens[i], tokens[i + 1]
            texts = self.unbroken(part, mark)
            if before is not None and before.rstrip:
                texts[0] = texts[0].lstrip()
            if behind is not None and behind.lstrip:
                texts[-1] = texts[-1].rstrip()
            start = "inside" if goes_on else "first"
            place = "behind" if i else start
            ids += tokenizer.encode_at(texts[0], place)
            for text in texts[1:]:
                ids += tokenizer.encode_at(text, "inside")
            if behind is not None:
                ids.append(behind.id)
        return ids


def mark_for(messages):
    """A character that occurs in none of the messages, and in no text at all: Unicode gives it no meaning."""
    contents = "".join(message["content"] for message in messages)
    mark = next((chr(i) for i in range(0xFDD0, 0xFDF0) if chr(i) not in contents), None)
    check(mark, "a conversation holds all of the characters U+FDD0 to U+FDEF, which have no meaning")
    return mark
