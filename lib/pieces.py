"""
A SentencePiece model as a tokenizer.json.

    content = tokenizer_json(model)          # bytes, or None where it would not say the same

transformers needs protobuf to read a tokenizer.model, and version 5 leaves out the space that SentencePiece puts
before a text which begins with one. A tokenizer.json needs no package and says all of it. The merges of a byte-pair
encoding stand in no such model, but follow from it: two pieces merge to a third where that is one, the best first.
Models of other kinds (unigram, with normalized texts) are not merged so; whatever they are, the two are compared over
texts of all pieces before the file is believed.
"""

import json
import random

PROBES = ["", " two  spaces ", "\n\ttabs\n", "Ünïcode £20 日本語 🙂", "The cat sat on the mat, didn't it?", "1984 x**2 </>", "ﬁ ½ ＡＢ"]
SPACE = "▁"


def tokenizer_json(model, package):
    """
    The bytes of a tokenizer.json that encodes as a SentencePieceProcessor does, without bos and eos; None where there is
    none. package: the optional package tokenizers, or None where it is not installed, without which nothing is known.
    """
    if package is None:
        return None
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    special = [i for i in vocabulary.values() if model.is_control(i) or model.is_unknown(i)]
    has_bytes = any(map(model.is_byte, vocabulary.values()))
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    parts = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": model.id_to_piece(i), "special": True} | usual for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE}, replacing(" ", SPACE)]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            replacing(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": model.id_to_piece(model.unk_id()), "fuse_unk": True,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": has_bytes,
            "ignore_merges": False, "vocab": vocabulary, "merges": merges(model, vocabulary)}}
    content = json.dumps(parts, ensure_ascii=False)
    other = package.Tokenizer.from_str(content)
    other.encode_special_tokens = True
    theirs = [other.encode(text, add_special_tokens=False).ids for text in probes(model)]
    return content.encode() if theirs == model.encode(probes(model)) else None


def replacing(text, other):
    """The part of a tokenizer.json that writes `other` for a text."""
    return {"type": "Replace", "pattern": {"String": text}, "content": other}


def merges(model, vocabulary):
    """[[left piece, right piece]] in the order in which they merge: by what they make, the best score first."""
    found = []
    for piece, i in vocabulary.items():
        if model.is_byte(i) or model.is_control(i) or model.is_unknown(i):
            continue
        for at in range(1, len(piece)):
            left, right = vocabulary.get(piece[:at]), vocabulary.get(piece[at:])
            if left is not None and right is not None:
                found.append((-model.get_score(i), left, right))
    return [[model.id_to_piece(left), model.id_to_piece(right)] for _, left, right in sorted(found)]


def probes(model):
    """Texts to compare over, in which every piece occurs."""
    ids = [i for i in range(model.vocab_size()) if not model.is_control(i) and not model.is_unknown(i)]
    random.Random(0).shuffle(ids)
    parts = [ids[start:start + 32] for start in range(0, len(ids), 32)]
    return [*PROBES, *map(model.decode, parts)]
