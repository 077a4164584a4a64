"""Runs and files of predictions as rows of a table, and the texts that runs write."""

import json
import subprocess
import sys

import pytest

import evaluate
from evaluate import Kept, as_flags, result_row, training_row
from lib import results
from lib.config import Config, command_line, write_toml
from lib.results import RESULT_COLUMNS, SCORE_COLUMNS, TRAINING_COLUMNS, table
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


def test_texts_are_those_of_their_prompts(monkeypatch):
    """Whatever the batches: each text is the upper case of its own prompt."""
    class Letters:
        encode = list
    monkeypatch.setattr(evaluate, "continue_prompts", lambda model, tokenizer, prompts, args: [f" {prompt.upper()} " for prompt in prompts])
    prompts, kept = {0: "bbb", 1: "a", 3: "dddd", 4: "cc", 7: "eeeee"}, []
    evaluate.write_texts(None, Letters, prompts, evaluate.parse(["run", "--batch_size", "2"]), kept.append)
    assert kept == [{1: "A", 4: "CC"}, {0: "BBB", 3: "DDDD"}, {7: "EEEEE"}]


def test_texts_are_kept(tmp_path):
    """Those of the same question, up to a line that was torn when the process died."""
    path, asked = tmp_path / "texts.jsonl", {"beams": 4}
    Kept(path, asked).add({2: "two", 0: "£ null"})
    with open(path, "ab") as file:
        file.write(b'{"index": 1, "te')
    again = Kept(path, asked)
    assert again.texts == {2: "two", 0: "£ null"}
    again.add({1: "one"})
    assert Kept(path, asked).texts == {2: "two", 0: "£ null", 1: "one"}
    other = Kept(path, {"beams": 1})
    assert other.texts == {} and len(Kept(path, asked).texts) == 3      # Nothing is lost before there is something else to keep.
    other.add({0: "more"})
    assert Kept(path, {"beams": 1}).texts == {0: "more"} and Kept(path, asked).texts == {}


def finished_run(folder, **metrics):
    """A run's folder, as train.py leaves it, without its tensors."""
    folder.mkdir(parents=True)
    config = Config(method="lora", rank=4, base="models/tiny", data="DIR/e2e", seed=2, packing=True, out_dir=str(folder))
    (folder / "config.toml").write_text(write_toml(config))
    content = {"method": "lora", "trainable": 1234, "loss_before": 3.0, "val_loss": 1.0, "seconds": 60, "peak_bytes": 5e8, "adapter_bytes": 12345, "seed": 2, "steps": 9}
    (folder / "metrics.json").write_text(json.dumps(content | metrics))
    return config


def test_results_are_kept_and_shown(tmp_path, script, refused):
    config = finished_run(tmp_path / "out" / "lora-2")
    args = evaluate.parse([str(tmp_path / "out" / "lora-2"), "--beams", "10", "--results", "r"])
    scored = row(run=args.runs[0], settings=evaluate.settings_but_seed(config), texts=3)
    done = result_row(scored, args)
    assert done["run"] == "lora-2" and done["val_loss"] == 1.0 and done["seed"] == 2 and "--beams 10" in done["commands"][1]
    train, *flags = done["commands"][0].split()[1:]
    again = command_line(flags)
    assert train == "train.py" and evaluate.settings_but_seed(again) == scored["settings"] and again.seed == 2 and again.packing
    file = tmp_path / "results" / "r.jsonl"
    results.add(file, [done | {"BLEU": 0.1}, done | {"run": "full-1", "trainable": 10**6}])
    results.add(file, [done, done | {"run": "lora-1", "seed": 1, "BLEU": 0.6}])
    rows = results.read(file)
    assert [found["run"] for found in rows] == ["full-1", "lora-1", "lora-2"]
    shown = script("evaluate.py", "--results", file, "--markdown").stdout
    assert shown == table(rows, RESULT_COLUMNS, markdown=True) + "\n" and "| lora | 1,234 | 55.0 ± 7.1 |" in shown
    assert len(json.loads(script("evaluate.py", "--results", file, "--json").stdout)) == 3
    with open(file, "a") as appended:
        appended.write('{"run": 3}\n')
    assert "r.jsonl, line 5: run is 3; it must be text" in refused("evaluate.py", "--results", file)
    assert "No such file" in refused("evaluate.py", "--results", tmp_path / "none.jsonl")
    assert as_flags({"a": True, "b": "x y"}) == "--a true --b 'x y'"


def test_a_file_of_results_is_checked_before_it_is_written(tmp_path, refused):
    """A last line without its end gets one; a file of something else stays as it is, and is refused before any work."""
    path, kept = tmp_path / "r.jsonl", row(run="lora-1", seed=1)
    path.write_text(json.dumps(kept))
    results.add(path, [row(run="lora-2", seed=2)])
    assert [found["run"] for found in results.read(path)] == ["lora-1", "lora-2"]
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="r.jsonl, line 1: not JSON"):
        results.add(path, [kept])
    assert "r.jsonl, line 1: not JSON" in refused("evaluate.py", tmp_path / "none", "--results", path) and path.read_text() == "my notes\n"
    path.write_text(json.dumps(kept | {"seed": [1]}))
    assert "line 1: seed is [1]; it must be a whole number" in refused("evaluate.py", "--results", path)


def test_runs_of_one_name_keep_their_rows(tmp_path, monkeypatch):
    """Those of another seed or other settings beside each other; a run that is repeated in the place of its old row."""
    path = tmp_path / "r.jsonl"
    results.add(path, [row(run="ia3", seed=1), row(run="ia3", seed=2), row(run="ia3", seed=1, settings="b"), row(run="ia3", seed=1, BLEU=.9)])
    assert sorted(found["BLEU"] for found in results.read(path)) == [.5, .5, .9]
    for name in ("a", "b"):
        finished_run(tmp_path / name / "ia3")
    runs = [str(tmp_path / name / "ia3") for name in ("a", "b")]
    with pytest.raises(ValueError, match="one name, settings and seed, so that r.jsonl would show only the last"):
        evaluate.check_runs(evaluate.parse([*runs, "--results", "r.jsonl"]))
    evaluate.check_runs(evaluate.parse(runs))
    monkeypatch.chdir(runs[0])
    assert result_row(training_row("."), evaluate.parse(["."]))["run"] == "ia3"


def test_only_seeds_become_one_row(tmp_path):
    """Data or bases that lie in different folders are not those of one method, nor are two rows of one seed."""
    settings = [evaluate.settings_but_seed(Config(base=base, data=data)) for base, data in
                (("X/instruct", "d/A/train.jsonl"), ("X/instruct/", "d/A/train.jsonl"), ("Y/instruct", "d/A/train.jsonl"), ("X/instruct", "d/B/train.jsonl"))]
    assert settings[0] == settings[1] and len(set(settings)) == 3
    rows = [row(seed=seed) for seed in (1, 2, 2, 1, 3)]
    assert [[found["seed"] for found in group] for group in results.by_settings(rows)] == [[1, 2, 3], [2, 1]]
    two = results.table([row(run="out/ia3", seed=1), row(run="out/ia3-2", seed=1), row(run="out/lora-1", seed=1)], results.SCORE_COLUMNS)
    assert [line.split()[0] for line in two.splitlines()[1:]] == ["out/ia3", "out/ia3-2", "lora"]


def test_files_are_scored_alone(tmp_path, refused):
    files = ("--predictions", tmp_path / "p.txt", "--references", tmp_path / "r.txt")
    for others in (["run"], ["--results", tmp_path / "r.jsonl"], ["run", "--results", tmp_path / "r.jsonl"]):
        assert "--predictions and --references are scored alone" in refused("evaluate.py", *others, *files)


def test_what_cannot_be_kept_is_refused_before_the_first_text(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no metrics.json there, so no run of train.py that has ended"):
        evaluate.check_runs(evaluate.parse([str(tmp_path), "--results", "r.jsonl"]))
    evaluate.check_runs(evaluate.parse([str(tmp_path)]))
    for name in ("predictions.txt", "references.txt", "scores.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} would be overwritten"):
            evaluate.check_runs(evaluate.parse([str(tmp_path)]))
        (tmp_path / "texts.jsonl").write_text("")
        evaluate.check_runs(evaluate.parse([str(tmp_path)]))
        (tmp_path / "texts.jsonl").unlink()
        (tmp_path / name).unlink()


def test_a_table_is_there_without_torch(tmp_path):
    code = "import sys; sys.argv = ['evaluate.py']; import runpy; runpy.run_path('lib/results.py'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=evaluate.__file__.rpartition("/")[0]).returncode == 0


def test_an_evaluation_goes_on(tmp_path, script, real_data):
    """Texts that are there are not written again, nor is a model then needed; another question writes anew. Without Java, for METEOR, it goes faster."""
    data = tmp_path / "data"
    data.mkdir()
    for name, lines in (("devset.csv", 60), ("testset_w_refs.csv", 40)):
        text = (real_data / "e2e" / name).read_text(encoding="utf-8-sig").splitlines(keepends=True)
        (data / name).write_text("".join(text[:lines]))
    made = script("train.py", "--method", "ia3", "--base", real_data / "stories260k", "--data", data, "--max_iters", 2, "--out_dir", tmp_path / "run", "--sample_count", 0,
                  "--eval_sequences", 8, "--dtype", "float32")
    assert made.returncode == 0, made.stderr
    command = ("evaluate.py", tmp_path / "run", "--max_new_tokens", 5, "--batch_size", 4)
    first = script(*command, PATH="")
    path = tmp_path / "run" / "texts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3].replace('"text": "', '"text": "kept '), ""]))
    second = script(*command, PATH="")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[1:]]
    assert first.returncode == second.returncode == 0 and len(texts) == len(lines) - 1
    assert sum(text.startswith("kept ") for text in texts) == 1
    (tmp_path / "run" / "adapter.pt").unlink()
    assert script(*command, PATH="").stdout == second.stdout
    assert script(*command, "--beams", 2).returncode == 2
