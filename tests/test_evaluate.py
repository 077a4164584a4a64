"""Runs and files of predictions as rows of a table, and the texts that runs write."""

import json

import pytest

import evaluate
from evaluate import SCORE_COLUMNS, TRAINING_COLUMNS, table, training_row
from lib.config import Config, write_toml
from lib.scores import bleu


def test_official_files(tmp_path, script, refused):
    (tmp_path / "p.txt").write_text("The Fig is a pub.\nA bar.\n")
    (tmp_path / "r.txt").write_text("The Fig is a pub.\nThe Fig, a pub.\n\nThere is a bar.\n")
    done = script("evaluate.py", "--predictions", tmp_path / "p.txt", "--references", tmp_path / "r.txt", "--json")
    row = json.loads(done.stdout)[0]
    assert row["BLEU"] == pytest.approx(bleu(["The Fig is a pub.", "A bar."], [["The Fig is a pub.", "The Fig, a pub."], ["There is a bar."]]))
    (tmp_path / "p.txt").write_text("One line.\n")
    assert "1 predictions for 2 groups" in refused("evaluate.py", "--predictions", tmp_path / "p.txt", "--references", tmp_path / "r.txt")
    assert "nothing to evaluate" in refused("evaluate.py")


def row(**changes):
    """A row of the table."""
    return {"method": "lora", "trainable": 1234, "settings": "a", "BLEU": .5, "NIST": 5.0, "METEOR": None, "ROUGE-L": .5, "CIDEr": 1.0, "SER": .1, "exact": None} | changes


def test_table_gathers_seeds():
    text = table([row(), row(BLEU=.6), row(settings="b")], SCORE_COLUMNS)
    lines = text.splitlines()
    assert len(lines) == 3 and "55.0 ± 7.1" in lines[1] and "1,234" in lines[1] and " - " in lines[1] and lines[1].endswith("2")
    assert len({len(line) for line in lines}) == 1
    assert "SER" in text and "exact" not in text
    assert "SER" not in table([row(SER=None, exact=.5)], SCORE_COLUMNS)
    assert table([row()], SCORE_COLUMNS, markdown=True).splitlines()[1].startswith("| --- |")


def test_training_runs_of_two_seeds_are_one_row(tmp_path):
    for seed in (1, 2):
        folder = tmp_path / f"lora-{seed}"
        folder.mkdir()
        metrics = {"method": "lora", "trainable": 1234, "loss_before": 3.0, "val_loss": 1.0 + seed, "seconds": 60, "peak_bytes": 5e8, "adapter_bytes": 12345}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "config.toml").write_text(write_toml(Config(seed=seed, out_dir=str(folder))))
    rows = [training_row(tmp_path / f"lora-{seed}") for seed in (1, 2)]
    assert table(rows, TRAINING_COLUMNS, markdown=True).splitlines() == [
        "| run | trained | loss before | loss after | seconds | peak, MB | adapter, kB | runs |", "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| lora | 1,234 | 3.000 ± 0.000 | 2.500 ± 0.707 | 60 ± 0 | 500 ± 0 | 12 ± 0 | 2 |"]
    with pytest.raises(ValueError, match="no finished run there"):
        training_row(tmp_path)


def test_texts_are_in_the_order_of_their_prompts(monkeypatch):
    """Whatever the batches: each text is the upper case of its own prompt."""
    class Letters:
        encode = list
    monkeypatch.setattr(evaluate, "continue_prompts", lambda model, tokenizer, prompts, args: [f" {prompt.upper()} " for prompt in prompts])
    prompts, done = ["bbb", "a", "dddd", "cc", "eeeee"], []
    args = evaluate.parse(["run", "--batch_size", "2"])
    assert evaluate.write_texts(None, Letters, prompts, args, done.append) == ["BBB", "A", "DDDD", "CC", "EEEEE"]
    assert done == [2, 4, 5]
