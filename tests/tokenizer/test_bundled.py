"""The bundled tokenizer is what its card says."""

import json

from fastbeit.config.sections import DataConfig
from fastbeit.data.demo_photos import gather_photos
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_loader
from fastbeit.files import sha256
from fastbeit.tokenizer.disk import bundled_path, is_bundled, load_tokenizer
from fastbeit.tokenizer.quality import measure_quality


def test_it_is_small_and_carries_its_card():
    card = json.loads(bundled_path().with_suffix(".json").read_text())
    assert bundled_path().stat().st_size < 4_000_000
    assert card["sha256"] == sha256(bundled_path()) == load_tokenizer().fingerprint
    assert is_bundled(card["sha256"]) and not is_bundled("0" * 64)
    held_out = card["origin"]["held_out"].values()
    assert all(of["mean_abs_error"] < 0.08 and of["words_in_use"] > 512 for of in held_out)
    assert card["origin"]["command"].startswith("fastbeit tokenizer train")


def test_it_gives_photos_back_that_it_was_not_trained_on(tmp_path):
    gather_photos(tmp_path / "photos", None)
    build_index(tmp_path / "photos/held_out", tmp_path / "held_out.idx")
    batches = make_loader(
        DataConfig(image_size=(64, 64), jitter=0, tail="wrap", num_workers=0, pipeline="torch"),
        open_index(tmp_path / "held_out.idx"),
        token_size=None,
        batch_size=32,
        seed=0,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=8,
    )
    quality = measure_quality(load_tokenizer(), (batch.images for batch in batches))
    # 0.069 and 19.8 dB: photos of fur, cloth and foliage are harder than the card's, many of which show the night sky
    assert quality.mean_abs_error < 0.08 and quality.psnr_db > 19
    assert quality.usage.num_in_use > 512 and quality.usage.warning() is None
