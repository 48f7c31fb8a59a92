"""What documents tell a user to type can be typed, and does what they say."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from fastbeit.cli import main
from fastbeit.data.index.reader import open_index

ROOT = Path(__file__).parent.parent
IMAGENET = (ROOT / "docs" / "imagenet.md").read_text()
# what a verb would run, once its command line and its config have been read
JOBS = (
    "jobs.index.index",
    "jobs.check_index.check_index",
    "jobs.shard.shard",
    "jobs.show.show",
    "jobs.tokenize.tokenize",
    "jobs.pretrain.pretrain",
    "jobs.finetune.finetune",
    "jobs.report.report",
    "jobs.doctor.doctor",
    "jobs.plan.plan",
    "jobs.convert.convert",
    "jobs.export.export",
    "jobs.features.features",
    "jobs.predict.predict",
    "jobs.probe.probe",
    "weights.download.fetch_tokenizer",
)


def commands(text: str, program: str) -> list[str]:
    return re.findall(rf"^    ({program} .*)$", text, re.M)


DOCUMENTS = "docs/imagenet.md", "docs/weights.md", "docs/using.md", "docs/finetuning.md", "README.md"
TYPED = [command for name in DOCUMENTS for command in commands((ROOT / name).read_text(), "fastbeit")]


def test_no_document_waits_for_a_figure():
    texts = [path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
    assert len(texts) > 10 and not [found for text in texts for found in re.findall(r"@[A-Z]+@", text)]


def test_there_are_commands_to_parse():
    assert len(commands(IMAGENET, "fastbeit")) >= 12 and len(TYPED) >= 20


@pytest.mark.parametrize("command", TYPED)
def test_the_command_line_takes_it(command, monkeypatch):
    ran = []
    for job in JOBS:
        monkeypatch.setattr(f"fastbeit.{job}", lambda *args, job=job, **named: ran.append(job) or 0)
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command, comments=True)[1:]) == 0 and len(ran) == 1


def photo(path: Path, mode: str = "RGB", format: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").convert(mode).save(path, format)


def test_validation_images_get_their_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classes = {"ILSVRC2012_val_00048981": "n03995372", "ILSVRC2012_val_00037956": "n03481172"}
    rows = [f"{name},{label} 85 1 499 272 {label} 3 4 5 6 " for name, label in classes.items()]
    Path("LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows, ""]))
    for name in classes:
        photo(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{name}.JPEG")
    (awk,) = commands(IMAGENET, "awk")
    subprocess.run(awk, shell=True, check=True)
    assert main(["index", "ILSVRC/Data/CLS-LOC/val.txt", "-o", "val.idx"]) == 0
    index = open_index(Path("val.idx"))
    found = {Path(index.name(i)).stem: index.class_names[index.labels[i]] for i in range(len(index))}
    assert found == classes


def test_training_images_have_the_classes_of_their_folders(tmp_path, capsys):
    for label in ("n01440764", "n01443537"):
        photo(tmp_path / "train" / label / f"{label}_10026.JPEG")
    assert main(["index", str(tmp_path / "train"), "-o", str(tmp_path / "train.idx")]) == 0
    assert "2 images in 2 classes" in capsys.readouterr().out


def test_a_folder_of_tars_is_read(tmp_path, capsys):
    photo(tmp_path / "n01440764_10026.JPEG")
    (tmp_path / "train-tars").mkdir()
    for label in ("n01440764", "n01443537"):
        tar = tmp_path / "train-tars" / f"{label}.tar"
        subprocess.run(["tar", "-cf", tar, "-C", tmp_path, "n01440764_10026.JPEG"], check=True)
    assert main(["index", str(tmp_path / "train-tars"), "-o", str(tmp_path / "train.idx")]) == 0
    assert "2 images, 0 files skipped" in capsys.readouterr().out


def test_the_odd_files_are_good(tmp_path, capsys):
    photo(tmp_path / "train" / "n02105855" / "n02105855_2933.JPEG", format="PNG")
    photo(tmp_path / "train" / "n01739381" / "n01739381_1309.JPEG", mode="CMYK")
    assert main(["index", str(tmp_path / "train"), "-o", str(tmp_path / "train.idx")]) == 0
    assert main(["index", "check", str(tmp_path / "train.idx"), "--workers", "1"]) == 0
    assert "all are good" in capsys.readouterr().out


def test_the_figures_of_the_demo_are_those_that_were_measured():
    row = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "demo.json").read_text())
    text = (ROOT / "docs" / "expected.md").read_text()
    for part, images in ("", f"{row['held_out_photos']} held-out photos"), ("train_crops_", "unseen crops of"):
        loss, baseline, accuracy = (row[part + name] for name in ("loss", "baseline", "accuracy"))
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {images}")]
        assert line.endswith(f"| {loss:.3f} | {baseline:.3f} | {accuracy:.3f} |")
    assert f"on {row['photos']} photos" in text
