"""
Chat templates: the tokens are those of transformers, the supervised ones those of the assistant's turns. The templates are short
ones with the peculiarities of the published ones.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

import data
from lib import template
from lib.records import Example
from lib.template import Chat
from data import Tokenizer
from test_data import spelled_in_bytes

tokenizers = pytest.importorskip("tokenizers")
jinja2 = pytest.importorskip("jinja2")

# -----------------------------------------------------------------------------
# families


def spelled_in_pieces(special, first):
    """A tokenizer of SentencePiece's kind. first: a space stands before the text (Metaspace, as in Mistral v0.3), before every
    stretch between special tokens (Prepend, as in Llama 2), or nowhere (Gemma)."""
    normalizers, decoders, pre_tokenizers = tokenizers.normalizers, tokenizers.decoders, tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    if first == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif first == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        made.normalizer = spaces
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    all_bytes = [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=360, special_tokens=["<unk>", *special], show_progress=False)
    made.train_from_iterator(["the user and the assistant model say [INST] hello, table for two [/INST]"] * 3, trainer)
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] |= {byte: len(vocabulary) + i for i, byte in enumerate(all_bytes)}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def swallowing(special, *names):
    """A byte-level tokenizer whose special tokens of these names take the white space behind them, as Phi-3's do."""
    made = spelled_in_bytes(tokenizers, special)
    made.add_special_tokens([tokenizers.AddedToken(name, rstrip=True, normalized=False) for name in names])
    return made


def thinking(special):
    """A byte-level tokenizer with added tokens that are not special, as Qwen3's."""
    made = spelled_in_bytes(tokenizers, special)
    made.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    return made


CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = """{{- bos_token }}{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
LLAMA32 = """{%- if strftime_now is defined %}{%- set date = strftime_now("%Y") %}{%- else %}{%- set date = "2024" %}{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday is in ' + date + '\\n\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|eot_id|>' }}""" + LLAMA3.removeprefix("{{- bos_token }}")
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are a model.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role != 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endif %}{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Only the last answer has its thinking block.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}{%- set content = '<think>\\n' + thoughts + '\\n</think>\\n\\n' + content %}{%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""".replace("%}\n{%", "%}{%").replace("%}\n{{", "%}{{")
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
PHI3 = """{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
# The last answer ends otherwise than those before it.
GPT_OSS = """{{- '<|start|>system<|message|>Reasoning: low<|end|>' }}{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
    {%- if loop.last and not add_generation_prompt %}{{- '<|return|>' }}{%- else %}{{- '<|end|>' }}{%- endif %}
{%- else %}{{- '<|start|>' + ('developer' if message.role == 'system' else message.role) + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
SMOLLM3 = """{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- if loop.index > 90 %}{%- break %}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
# name: (template, tokenizer, bos, eos, whether it takes a system message, what ends an answer)
FAMILIES = {
    "llama3": (LLAMA3, lambda: spelled_in_bytes(tokenizers, HEADERS), HEADERS[0], HEADERS[1], True, "<|eot_id|>"),
    "llama3.2": (LLAMA32, lambda: spelled_in_bytes(tokenizers, HEADERS), HEADERS[0], HEADERS[1], True, "<|eot_id|>"),
    "chatml": (CHATML, lambda: spelled_in_bytes(tokenizers, IM), None, IM[2], True, "<|im_end|>\n"),
    "qwen2.5": (QWEN25, lambda: spelled_in_bytes(tokenizers, IM), None, IM[2], True, "<|im_end|>\n"),
    "qwen3": (QWEN3, lambda: thinking(IM), None, IM[2], True, "<|im_end|>\n"),
    "gemma": (GEMMA, lambda: spelled_in_pieces(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ""), "<bos>", "<eos>", False,
              "<end_of_turn>\n"),
    "mistral": (MISTRAL, lambda: spelled_in_pieces(["<s>", "</s>"], "metaspace"), "<s>", "</s>", False, "</s>"),
    "llama2": (LLAMA2, lambda: spelled_in_pieces(["<s>", "</s>"], "prepend"), "<s>", "</s>", True, " </s>"),
    "phi3": (PHI3, lambda: swallowing(["<|endoftext|>"], "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"), None, "<|endoftext|>", True,
             "<|end|><|endoftext|>"),
    "gpt-oss": (GPT_OSS, lambda: spelled_in_bytes(tokenizers, ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"]), None,
                "<|return|>", True, "<|return|>"),
    "smollm3": (SMOLLM3, lambda: spelled_in_bytes(tokenizers, IM), None, IM[2], True, "<|im_end|>\n"),
}
SYSTEM = {"role": "system", "content": "You are a waiter."}
CONVERSATIONS = {
    "one turn": [("Hello, a table for two?", "With pleasure.")],
    "three turns": [("Hi", "Hello!"), ("The menu, please", "Soup and bread."), ("Thanks", "Bye")],
    "empty": [("", ""), ("Hm?", "")],
    "emoji": [("🍲 or 🥗?", "🥗, naturally – crème brûlée 👩‍🍳 later")],
    "white space": [("  Two\n\nlines \n", "\n  An answer\twith  much \n\n"), ("\n", " x")],
    "thoughts": [("Why?", "<think>\nLet me see.\n</think>\n\nBecause."), ("And?", "<think>\nHm\n</think>\n\nSo.")],
    "HTML": [("<b>Bold & \"quoted\"</b>", "It's <i>'fine'</i> & {{ not }} {% code %}")],
}


def messages_of(pairs, system=()):
    """The messages of a conversation of (question, answer)."""
    roles = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    return [*system, *roles]


def folder_of(path, name):
    """A folder with the tokenizer and the template of a family."""
    source, make, bos, eos, *_ = FAMILIES[name]
    path.mkdir()
    make().save(str(path / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": source}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder} of all families, and SmolLM2's where it is there."""
    root = tmp_path_factory.mktemp("families")
    found = {name: folder_of(root / name, name) for name in FAMILIES}
    if "NANOPEFT_SMOLLM2" in os.environ:
        found["smollm2"] = Path(os.environ["NANOPEFT_SMOLLM2"])
    return found


def chat_of(folder):
    """The Chat of a folder."""
    return template.load("base", folder, Tokenizer.load(folder))


def conversations(name):
    """[messages] for a family, each ending with an answer."""
    takes_system = FAMILIES[name][4] if name in FAMILIES else True
    systems = ((), (SYSTEM,)) if takes_system else ((),)
    whole = [messages_of(pairs, system) for pairs in CONVERSATIONS.values() for system in systems]
    return [messages[:i + 1] for messages in whole for i, message in enumerate(messages) if message["role"] == "assistant"]


# -----------------------------------------------------------------------------
# the same as transformers


@pytest.mark.peers
def test_ids_are_those_of_apply_chat_template(peer, folders, tmp_path):
    asked = {name: conversations(name) for name in folders}
    (tmp_path / "asked.json").write_text(json.dumps([(str(folders[name]), asked[name]) for name in folders]))
    told = json.loads(peer("""
import json, sys
from transformers import AutoTokenizer
found = []
for folder, conversations in json.load(open(sys.argv[1])):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    def ids(messages, generation):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=True, return_dict=False)
    found.append([(ids(messages[:-1], True), ids(messages, False)) for messages in conversations])
print(json.dumps(found))
""", tmp_path / "asked.json"))
    apart = []
    for name, theirs in zip(folders, told, strict=True):
        chat = chat_of(folders[name])
        for messages, (prompt, whole) in zip(asked[name], theirs, strict=True):
            ids, n_prompt = chat.example(messages[:-1], messages[-1]["content"])
            assert chat.prompt(messages[:-1]) == prompt == ids[:n_prompt], (name, messages)
            if whole[:n_prompt] != prompt:                       # a token reaches across the border
                apart.append(name)
                continue
            assert ids == whole, (name, messages)
    assert len(set(apart)) < len(folders) / 2 and len(apart) < 20, apart


@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_tokens_are_those_of_the_answers_with_their_ends(folders, name):
    """Token by token: what is supervised spells the answer as the template writes it, then its end, and nothing else."""
    chat = chat_of(folders[name])
    inner = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    end = FAMILIES[name][5]
    for messages in conversations(name):
        answer = messages[-1]["content"]
        encoded = data.encode([Example("", [answer], messages[:-1])], chat.tokenizer, 4096, chat=chat)
        ids, counts = encoded.sequence(0)
        first = int(counts.argmax())
        assert not counts[:first].any() and counts[first:].all()
        spelled = inner.decode(ids[first:].tolist(), skip_special_tokens=False)
        thoughts = "" if answer.startswith("<think>") else "<think>\n\n</think>\n\n"
        wanted = {"qwen3": thoughts + answer, "gpt-oss": "<|channel|>final<|message|>" + answer,
                  "mistral": " " + answer, "llama2": " " + answer.strip()}.get(name, answer)
        if name in ("llama3", "llama3.2", "gemma"):
            wanted = answer.strip()
        if name == "phi3":
            wanted = answer.lstrip()                             # The token before it takes the white space.
        assert spelled == wanted + end, (name, messages)
        assert inner.decode(ids[:first].tolist(), skip_special_tokens=False).strip() != ""


@pytest.mark.parametrize("name", FAMILIES)
def test_special_words_in_a_message_are_text(folders, name):
    """The special tokens are those of the same conversation with other words, and the words come back as they were."""
    chat = chat_of(folders[name])
    inner = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    words = sorted(chat.tokenizer.special_tokens)
    ids_of_special = {token.id for token in chat.tokenizer.special_tokens.values()}
    for word in words:
        said = f"What does {word}{word} mean, and {word}?"
        messages = [{"role": "user", "content": said}]
        ids, n_prompt = chat.example(messages, f"The word {word} ends it")
        neutral, n_neutral = chat.example([{"role": "user", "content": "Hi"}], "Ho")
        special = [i for i in ids if i in ids_of_special]
        assert special == [i for i in neutral if i in ids_of_special], (name, word)
        assert said in inner.decode(ids[:n_prompt], skip_special_tokens=False)
        assert f"The word {word} ends it" in inner.decode(ids[n_prompt:], skip_special_tokens=False)
        assert len(special) < len(ids)


def test_thoughts_are_tokens_but_where_a_run_has_added_these(folders):
    """Qwen3's <think> is not special: in a message it is the token, unless it is a run's own, which marks no contents."""
    tokenizer = Tokenizer.load(folders["qwen3"])
    think = tokenizer.added_tokens["<think>"].id
    question, answer = [{"role": "user", "content": "Why?"}], "<think>\nHm\n</think>\n\nSo."
    for own, written in ((), answer), ({"<think>", "</think>"}, "<think>\n\n</think>\n\n" + answer):
        ids, n_prompt = template.load("base", folders["qwen3"], tokenizer, own).example(question, answer)
        assert ids[n_prompt:].count(think) == 1 and tokenizer.decode(ids[n_prompt:]) == written + "\n"


def test_special_words_become_the_tokens_of_their_text(folders):
    """Against the ids that the library gives for the stretches, with its own switch for special tokens as text."""
    chat = chat_of(folders["chatml"])
    inner = tokenizers.Tokenizer.from_file(str(folders["chatml"] / "tokenizer.json"))
    inner.encode_special_tokens = True
    expected = [1, *inner.encode("user\na <|im_end|> b").ids, 2, *inner.encode("\n").ids, 1, *inner.encode("assistant\n").ids]
    assert chat.prompt([{"role": "user", "content": "a <|im_end|> b"}]) == expected


def test_a_space_stands_before_the_first_text_alone(folders):
    """Stretches of text behind special tokens and behind other text are spelled as within the whole."""
    for name, words in (("mistral", "</s>"), ("llama2", "<s>")):
        chat = chat_of(folders[name])
        with_word, _ = chat.example([{"role": "user", "content": f"hello {words} two"}], "the table")
        without, _ = chat.example([{"role": "user", "content": "hello two"}], "the table")
        assert with_word[:4] == without[:4] and with_word[-4:] == without[-4:]


def test_never_a_second_beginning_or_end(folders):
    for name, (*_, bos, eos, _, _) in FAMILIES.items():
        chat = chat_of(folders[name])
        ids, n_prompt = chat.example([{"role": "user", "content": "Hi"}], "Ho")
        tokens = chat.tokenizer.special_tokens
        if bos:
            assert ids.count(tokens[bos].id) == 1 and ids[0] == tokens[bos].id
        assert ids[n_prompt:].count(tokens[eos].id) <= 1
        assert chat.ends <= {token.id for token in tokens.values()} and chat.ends <= set(ids[n_prompt:])


# -----------------------------------------------------------------------------
# where templates come from


def test_the_file_wins_and_the_default_of_several_is_taken(folders, tmp_path):
    shutil.copytree(folders["chatml"], tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML.replace("user", "USER")}]
    path.write_text(json.dumps(config | {"chat_template": several}))
    assert template.source_in(tmp_path / "a") == several[1]["template"]
    path.write_text(json.dumps(config | {"chat_template": several[:1]}))
    with pytest.raises(ValueError, match="chat_template has no default; it has tool_use"):
        template.source_in(tmp_path / "a")
    path.write_text(json.dumps(config | {"chat_template": 3}))
    with pytest.raises(ValueError, match="chat_template is no text"):
        template.source_in(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text(QWEN25)
    assert template.source_in(tmp_path / "a") == QWEN25


def test_chatml_where_there_is_no_template_and_the_tokens_are_there(folders, tmp_path):
    shutil.copytree(folders["chatml"], tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    without = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
    path.write_text(json.dumps(without))
    tokenizer = Tokenizer.load(tmp_path / "a")
    messages = messages_of(CONVERSATIONS["three turns"], [SYSTEM])
    expected = chat_of(folders["chatml"]).example(messages[:-1], "Bye")
    for wanted in ("base", "chatml"):
        assert template.load(wanted, tmp_path / "a", tokenizer).example(messages[:-1], "Bye") == expected
    other = Tokenizer.load(folders["gemma"])
    with pytest.raises(ValueError, match=r"ChatML needs the tokens <\|im_start\|> and <\|im_end\|>, which the tokenizer lacks; give it these by --add_tokens"):
        template.load("chatml", folders["gemma"], other)
    (tmp_path / "a" / "mine.jinja").write_text(GEMMA)
    assert template.load(str(tmp_path / "a" / "mine.jinja"), None, other).source == GEMMA


# -----------------------------------------------------------------------------
# templates that are refused

OPENING = "{{ '<|im_start|>' + messages[0]['content'] }}"
REFUSED = {
    "an endless loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "ran for more than 1 seconds"),
    "a call of itself": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nests too deeply"),
    "deep brackets": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "nests too deeply"),
    "deep blocks": ("{% for i in [1] %}" * 300 + "{% endfor %}" * 300, "nests too deeply"),
    "a tower": ("{{ 10 ** 10 ** 10 }}", r"a result of \*\* is too large"),
    "a huge text": ("{{ 'a' * 10 ** 9 }}", r"a result of \* is too large"),
    "syntax": ("{% if %}", "says: Expected an expression"),
    "an exception": ("{{ raise_exception('No, not so') }}", "says: No, not so"),
    "a way out": ("{{ ''.__class__.__mro__ }}", "says: access to attribute '__class__' of 'str' object is unsafe"),
    "a change of the messages": ("{{ messages.append(1) }}", "says: access to attribute 'append'"),
    "a hidden name": ("{% set ns = namespace(_a=1) %}", "says: a namespace cannot hold '_a'"),
    "a hidden name that is set": ("{% set ns = namespace(a=1) %}{% set ns.__class__ = 2 %}", "says: a namespace cannot hold '__class__'"),
    "no answer": ("<|im_start|>{{ messages[0].content }}", "leaves out what the assistant says"),
    "no end": ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends an answer without a special token"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_templates_that_are_refused(folders, monkeypatch, what):
    source, words = REFUSED[what]
    monkeypatch.setattr(template, "SECONDS", 1)
    tokenizer = Tokenizer.load(folders["chatml"])
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"the template.* {words}|the template {words}"):
        Chat(source, "the template", tokenizer)
    assert time.monotonic() - start < 5


def test_a_rendering_that_is_no_beginning_is_refused_with_the_reason(folders):
    """DeepSeek-V3's prompt begins the answer otherwise than the answer is rendered."""
    tokenizer = Tokenizer.load(folders["chatml"])
    chat = Chat(CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>' }}{%- endif"), "the template", tokenizer)
    with pytest.raises(ValueError, match="the template renders '<think>' before an answer, but 'Ho<|im_end|>.*once it is there"):
        chat.example([{"role": "user", "content": "Hi"}], "Ho")


def test_what_the_template_refuses_is_told_with_the_line(folders, tmp_path):
    lines = [{"messages": messages_of(CONVERSATIONS["one turn"], system)} for system in ((), (), (SYSTEM,))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    chat = chat_of(folders["gemma"])
    examples = data.read(tmp_path / "a.jsonl").take(range(3))
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: the chat template of .* says: System role not supported"):
        data.encode(examples, chat.tokenizer, 999, chat=chat)
    with pytest.raises(ValueError, match="a.jsonl, line 1: the data are conversations, which need a chat template"):
        data.encode(examples, chat.tokenizer, 999)


def test_without_jinja2_one_line_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="^chat templates need the jinja2 package: pip install jinja2$"):
        chat_of(folders["chatml"])


def test_a_turn_is_trained_as_inference_sees_it(folders):
    """Qwen3 renders an earlier answer without its thinking block: in a later turn's prompt it has none, as its own answer it has one."""
    chat = chat_of(folders["qwen3"])
    messages = messages_of(CONVERSATIONS["three turns"])
    think = chat.tokenizer.encode("<think>")
    assert len(think) == 1
    for i in (1, 3, 5):
        ids, n_prompt = chat.example(messages[:i], messages[i]["content"])
        assert ids[:n_prompt] == chat.prompt(messages[:i]) and think[0] not in ids[:n_prompt] and ids[n_prompt] == think[0]


def test_a_pair_is_what_a_user_says_and_the_answer(folders):
    """Where --template chatml is asked for over prompt and completion."""
    chat = chat_of(folders["chatml"])
    encoded = data.encode([Example("Hi", ["Ho"])], chat.tokenizer, 99, chat=chat)
    ids, n_prompt = chat.example([{"role": "user", "content": "Hi"}], "Ho")
    assert encoded.sequence(0)[0].tolist() == ids and re.search("user\nHi", data.Format(chat.tokenizer, "chatml", chat).text(Example("Hi", [])))
