"""
What stands in a model's folder beside its weights, so that other libraries read and stop as this code does.

    write_model(model, folder, tokenizer, base, chat)         # config.json, weights, and the rest:
    write_tokenizer(folder, tokenizer, base, chat)            # the base's files, but for what training has changed
    write_generation(folder, tokenizer, chat, base)           # the ends

Three things that training decides stand in no file of the base: with which token a text ends, which one stands before
it, and how a conversation is rendered. transformers takes the first from generation_config.json, llama.cpp from
config.json and tokenizer_config.json, which hold one end only: that of the training.
"""

import json
from pathlib import Path

from lib.checkpoint import save_base
from lib.files import read_bytes, write_atomic, write_json
from lib.origin import origin_of
from lib.pieces import tokenizer_json
from lib.template import KEPT, source_in
from lib.tokenizer import parse_pieces, read_json_if_there, template_ids, tokenizers_package

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "vocab.json",
                   "merges.txt", "tokenizer_config.json", KEPT)
CONFIG = "tokenizer_config.json"

# -----------------------------------------------------------------------------
# the whole, and its ends


def write_model(model, folder, tokenizer, base=None, chat=None, dtype=None, widened=False):
    """
    Writes a model without methods (or merged) as a folder for transformers. dtype: of the weights; None: each as the base
    has it. The other arguments are those of write_tokenizer.
    """
    ids = token_ids(tokenizer, chat, origin_of(model).content)
    save_base(model, folder, ids | {"vocab_size": model.config.vocab_size}, dtype)
    write_tokenizer(folder, tokenizer, base, chat, widened)
    write_generation(folder, tokenizer, chat, base)


def trained_end(tokenizer, chat):
    """The id with which the run's texts end, None where they have no end. chat: a lib.template.Chat or None."""
    return tokenizer.eos if chat is None else min(chat.ends)


def token_ids(tokenizer, chat, content):
    """{"bos_token_id": id or None, ..} of the run; what its tokenizer does not know is as the base's files say it."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": trained_end(tokenizer, chat), "pad_token_id": None}
    padding = tokenizer.special_tokens.get(tokenizer.names.get("pad_token"))
    if padding is not None:
        ids["pad_token_id"] = padding.id
    return {key: content.get(key) if i is None else i for key, i in ids.items()}


def write_generation(folder, tokenizer, chat=None, base=None):
    """
    Writes generation_config.json: the base's own, if there is one, with the run's ids. All ends are named with which
    generation stops here, the trained one first. Returns the ids.
    """
    said = [read_json_if_there(Path(base, name)) if base else {}
            for name in ("config.json", "generation_config.json")]
    ids = token_ids(tokenizer, chat, said[0] | said[1])
    end = ids["eos_token_id"]
    others = [i for i in tokenizer.stops if i != end]
    if others:
        ids["eos_token_id"] = [end, *others]
    content = said[1] | ids
    content.pop("_from_model_config", None)              # With it transformers would take the ids of config.json.
    write_json(Path(folder, "generation_config.json"), content)
    return ids


# -----------------------------------------------------------------------------
# the tokenizer


def write_tokenizer(folder, tokenizer, base, chat=None, widened=False):
    """
    Writes the tokenizer's files: byte for byte the base's, but for what training has changed.

    base: the folder of the base, or None where it is made here and keeps to its tokenizer.model. chat: the run's lib.template.Chat, or None. widened:
    whether the run has added tokens, so that its own files hold.
    """
    paths = [Path(base, name) for name in TOKENIZER_FILES] if base else []
    files = {path.name: read_bytes(path) for path in paths if path.is_file()}
    for name, content in tokenizer._files.items():
        is_new = name not in files and name != CONFIG            # Of a vocab.json: its tokenizer.json.
        if widened or is_new:
            files[name] = content
    names = names_of(tokenizer, chat)
    usual, changed = {"tokenizer_class": "PreTrainedTokenizerFast"}, dict(names)
    if "tokenizer.json" not in files:
        model, _ = parse_pieces(files["tokenizer.model"])
        usual = settings_of_pieces(model, tokenizer.begin)
        content = tokenizer_json(model, tokenizers_package()) if base else None
        if content:
            files["tokenizer.json"] = content
            changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "tokenizer.json" in files:
        files["tokenizer.json"] = with_beginning(files["tokenizer.json"], tokenizer.begin, names)
    gone = ()
    if chat is not None:
        files[KEPT] = chat.source.encode()
        gone = ("chat_template",) if base and chat.source != source_in(base) else ()
    change(files, CONFIG, usual, changed, gone)
    if "special_tokens_map.json" in files:               # transformers 4 takes the names from here where it is.
        change(files, "special_tokens_map.json", {}, names)
    for name, content in files.items():
        write_atomic(Path(folder, name), content)


def change(files, name, usual, changed, gone=()):
    """
    Changes one of the files, a JSON object: `usual` where it lacks these keys, `changed` in any case, and keys that go. A
    file that says all of it already stays as it is.
    """
    before = json.loads(files[name]) if name in files else {}
    after = usual | before
    for key, text in changed.items():
        named = after.get(key)
        named = named.get("content") if isinstance(named, dict) else named
        if named != text:
            after[key] = text
    for key in gone:
        after.pop(key, None)
    if after != before:
        files[name] = json.dumps(after, indent=2).encode()


def names_of(tokenizer, chat):
    """{"bos_token": text, "eos_token": text} of the run; what has no text is left out."""
    texts = {added.id: text for text, added in tokenizer.special_tokens.items()}
    for key, i in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if key in tokenizer.names:                       # A run may have taken bos as its end.
            texts.setdefault(i, tokenizer.names[key])
    ids = {"bos_token": tokenizer.bos, "eos_token": trained_end(tokenizer, chat)}
    return {key: texts[i] for key, i in ids.items() if i in texts}


def settings_of_pieces(model, begin):
    """
    tokenizer_config.json for a SentencePiece model that stands alone. transformers 5 would split texts in a way of its own
    if it were not told that the pieces are of Llama's kind.
    """
    return {"tokenizer_class": "LlamaTokenizer", "unk_token": model.id_to_piece(model.unk_id()),
            "add_bos_token": bool(begin), "add_eos_token": False}


def with_beginning(content, begin, names):
    """
    The bytes of a tokenizer.json that puts the token of `begin` before a text, where it says nothing of what stands
    there: a post-processor. (add_bos_token in tokenizer_config.json does not do it for GPT-2's class.)
    """
    parts = json.loads(content)
    if not begin or template_ids(parts) is not None:
        return content
    token = names["bos_token"]
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": begin, "tokens": [token]}}}
    before = parts.get("post_processor")
    if before is not None:
        others = before["processors"] if before["type"] == "Sequence" else [before]
        template = {"type": "Sequence", "processors": [*others, template]}
    parts["post_processor"] = template
    return json.dumps(parts, ensure_ascii=False).encode()
