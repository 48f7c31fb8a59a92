"""A codebook of patches as a tokenizer: the nearest word, whatever made it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d

from fastbeit.cli import main
from fastbeit.errors import CHECKPOINT_UNUSABLE, TokenizerError
from fastbeit.tokenizer.codebook import (
    CodebookArchitecture,
    CodebookTokenizer,
    import_codebook,
    to_images,
    to_patches,
)
from fastbeit.tokenizer.disk import load_tokenizer, save_tokenizer
from helpers.kinds import CHW, HWC, photo, random_images, write_codebook


def naive_patches(images: torch.Tensor, size: int, order: str) -> torch.Tensor:
    """[B, N, 3 p p] in [0, 1], float64, one patch after the other."""
    num, height, width, _ = images.shape
    rows = [
        images[i, y : y + size, x : x + size].permute((2, 0, 1) if order == CHW else (0, 1, 2)).reshape(-1)
        for i in range(num)
        for y in range(0, height, size)
        for x in range(0, width, size)
    ]
    return torch.stack(rows).view(num, -1, 3 * size**2).double() / 255


def imported(path: Path) -> CodebookTokenizer:
    """What `load_tokenizer` gives for an imported file."""
    save_tokenizer(path.parent / "imported", *import_codebook(path))
    tokenizer = load_tokenizer(path.parent / "imported")
    assert isinstance(tokenizer, CodebookTokenizer)
    return tokenizer


def distances(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared, [..., V], in float64, from differences."""
    return torch.stack([(vectors.double() - word.double()).square().sum(-1) for word in codebook], -1)


def assert_nearest(ids: torch.Tensor, vectors: torch.Tensor, codebook: torch.Tensor) -> None:
    """The nearest words; where two are so near to one another that float32 cannot tell them, either."""
    exact = distances(vectors, codebook)
    excess = exact.gather(-1, ids[..., None])[..., 0] - exact.min(-1).values
    # a dot product of up to a few hundred terms of size 1
    assert excess.max() < 1e-4
    assert (ids == exact.argmin(-1)).double().mean() > 0.999


@pytest.mark.parametrize("order", [CHW, HWC])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_patch_is_laid_out_as_its_order_says(order, size):
    arch = CodebookArchitecture(vocab_size=1, patch_size=size, order=order)
    images = random_images(2, 2 * size, 3 * size)
    patches = to_patches(images, arch)
    assert torch.equal(patches.flatten(1, 2).double() / 255, naive_patches(images, size, order))
    assert torch.equal(to_images(patches, arch), images)


@pytest.mark.parametrize("order", [CHW, HWC])
@pytest.mark.parametrize("size", [4, 16])
def test_tokens_are_the_nearest_words(tmp_path, order, size):
    images = torch.cat([photo("astronaut.png", 64), photo("coffee.png", 64)])
    patches = naive_patches(images, size, order)
    # words near to the patches, and all as near to one another as patches of one photo are
    words = patches.flatten(0, 1)[::3] + 0.05 * torch.randn(len(patches.flatten(0, 1)[::3]), patches.shape[-1])
    tokenizer = imported(write_codebook(tmp_path / "c.safetensors", order, codebook=words.float()))
    ids = tokenizer.encode(images)
    assert ids.shape == (2, (64 // size) ** 2) and ids.dtype == torch.int64
    assert_nearest(ids, patches, words.float())
    assert len(ids.unique()) > len(words) / 4


@pytest.fixture(scope="module")
def fitted() -> tuple[KMeans, KMeans, PCA]:
    """scikit-learn's k-means of 4 x 4 patches of a photo, of their pixels and of 20 principal components."""
    image = photo("astronaut.png", 128)[0].numpy()
    patches = extract_patches_2d(image, (4, 4), max_patches=3000, random_state=0).reshape(3000, 48) / 255
    pca = PCA(20, random_state=0).fit(patches)
    plain = KMeans(64, init="random", max_iter=20, random_state=0).fit(patches)
    return plain, KMeans(64, init="random", max_iter=20, random_state=0).fit(pca.transform(patches)), pca


def test_tokens_are_those_of_scikit_learn(tmp_path, fitted):
    """Its patches are pixel by pixel: hwc."""
    plain, _, _ = fitted
    centres = torch.tensor(plain.cluster_centers_)
    tokenizer = imported(write_codebook(tmp_path / "c.safetensors", HWC, codebook=centres))
    image = photo("chelsea.png", 128)
    ids = tokenizer.encode(image)
    assert (ids.flatten().numpy() == plain.predict(naive_patches(image, 4, HWC)[0].numpy())).all()
    pixels = to_images(centres[ids].unflatten(1, (32, 32)), tokenizer.arch)
    assert (tokenizer.decode(ids).double() - 255 * pixels.clamp(0, 1)).abs().max() <= 0.5 + 1e-3


def test_tokens_after_a_projection_are_those_of_scikit_learn(tmp_path, fitted):
    _, compressed, pca = fitted
    components, mean = torch.tensor(pca.components_), torch.tensor(pca.mean_)
    path = write_codebook(
        tmp_path / "c.safetensors",
        HWC,
        codebook=torch.tensor(compressed.cluster_centers_),
        projection__weight=components,
        projection__bias=-components @ mean,
        decoder__weight=components.T,
        decoder__bias=mean,
    )
    tokenizer, image = imported(path), photo("chelsea.png", 128)
    vectors = pca.transform(naive_patches(image, 4, HWC)[0].numpy())
    ids = tokenizer.encode(image)
    assert (ids.flatten().numpy() == compressed.predict(vectors)).all()
    pixels = torch.tensor(pca.inverse_transform(compressed.cluster_centers_))[ids].unflatten(1, (32, 32))
    wanted = 255 * to_images(pixels, tokenizer.arch).clamp(0, 1)
    assert (tokenizer.decode(ids).double() - wanted).abs().max() <= 0.5 + 1e-3


def test_without_a_decoder_what_the_projection_cannot_see_is_grey(tmp_path):
    torch.manual_seed(0)
    weight, bias, codebook = torch.randn(5, 12), torch.randn(5), torch.randn(7, 5)
    tensors = {"codebook": codebook, "projection__weight": weight, "projection__bias": bias}
    _, decoder = import_codebook(write_codebook(tmp_path / "c.safetensors", CHW, **tensors))
    pixels = decoder(codebook).detach()
    torch.testing.assert_close(pixels @ weight.T + bias, codebook, atol=1e-4, rtol=1e-4)
    # off grey only along the rows of the projection: any other pixels that it maps there are further from grey
    unseen = torch.linalg.svd(weight)[2][5:]
    torch.testing.assert_close((pixels - 0.5) @ unseen.T, torch.zeros(7, 7), atol=1e-5, rtol=0)


def test_of_equal_words_the_first_is_taken(tmp_path):
    """Not so in the product alone: at its edges sums have another order, and a copy's score may end in another bit."""
    torch.manual_seed(0)
    distinct = torch.rand(13, 192)
    tokenizer = imported(write_codebook(tmp_path / "c.safetensors", codebook=distinct.repeat(5, 1)))
    images = random_images(200, 8, 8)
    ids = tokenizer.encode(images)
    assert ids.max() < 13
    assert_nearest(ids, naive_patches(images, 8, HWC), distinct)


def test_the_most_words(tmp_path):
    """65,536: every colour of 64 x 32 x 32; the last is that of white."""
    levels = [torch.linspace(0, 1, num) for num in (64, 32, 32)]
    tokenizer = imported(write_codebook(tmp_path / "c.safetensors", codebook=torch.cartesian_prod(*levels)))
    white = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    assert tokenizer.vocab_size == 1 << 16 and tokenizer.encode(white).tolist() == [[65535] * 4]
    assert torch.equal(tokenizer.decode(torch.full((1, 4), 65535)), white)


def test_a_codebook_is_compared_in_float32_whatever_is_asked(tmp_path):
    path = write_codebook(tmp_path / "c.safetensors", codebook=torch.rand(500, 48).half())
    full = imported(path)
    half = load_tokenizer(tmp_path / "imported", dtype=torch.bfloat16)
    image = photo("rocket.jpg", 64)
    assert torch.equal(full.encode(image), half.encode(image))
    assert_nearest(full.encode(image), naive_patches(image, 4, HWC), load_file(path)["codebook"])


def test_the_command_imports_a_codebook(tmp_path, capsys):
    path = write_codebook(tmp_path / "words.safetensors", CHW, codebook=torch.rand(30, 48))
    assert main(["tokenizer", "import", str(path), "-o", str(tmp_path / "dvae")]) == 0
    assert "30 words" in capsys.readouterr().out
    image = photo("rocket.jpg", 32)
    ids = load_tokenizer(tmp_path / "dvae").encode(image)
    assert_nearest(ids, naive_patches(image, 4, CHW), load_file(path)["codebook"])
    write_codebook(path, None, codebook=torch.rand(30, 48))
    assert main(["tokenizer", "import", str(path), "-o", str(tmp_path / "other")]) == CHECKPOINT_UNUSABLE
    assert len(capsys.readouterr().err.splitlines()) == 1


RGB = torch.rand(8, 48, generator=torch.Generator().manual_seed(0))
NO_CODEBOOK = {
    "no codebook": ({"words": RGB}, {}, r"wants a tensor 'codebook' \[V, C\]; found {'words': \[8, 48\]}"),
    "one dimension": ({"codebook": RGB[0]}, {}, "wants a tensor 'codebook'"),
    "no words": ({"codebook": RGB[:0]}, {}, "wants a tensor 'codebook'"),
    "too many words": ({"codebook": torch.zeros(65537, 3)}, {}, "has 65537 words.*65536 are the most"),
    "no square": ({"codebook": RGB[:, :45]}, {}, "codebook has 45 columns; patches of p x p pixels want 3 p p"),
    "another patch size": ({"codebook": RGB}, {"patch_size": "8"}, "has 48 columns.*patch_size 8"),
    "no order": ({"codebook": RGB}, {"order": ""}, "order 'chw' .* or 'hwc' .*found ''"),
    "left over": ({"codebook": RGB, "mean": RGB.clone()}, {}, r"mean wants not to be there, found \[8, 48\]"),
    "bias alone": ({"codebook": RGB, "projection.bias": RGB[:, 0]}, {}, "projection.bias wants not to be there"),
    "projection": (
        {"codebook": RGB, "projection.weight": torch.rand(12, 48)},
        {},
        r"projection.weight wants \[48, 48\], found \[12, 48\]",
    ),
    "decoder": ({"codebook": RGB, "decoder.weight": torch.rand(48, 48)}, {}, "decoder.weight wants not to be there"),
    "decoder bias": (
        {"codebook": RGB, "projection.weight": torch.rand(48, 48), "decoder.bias": torch.rand(48)},
        {},
        "decoder.bias wants decoder.weight",
    ),
    "NaN": ({"codebook": RGB / 0 - RGB / 0}, {}, "codebook wants finite floats"),
    "bytes": ({"codebook": (RGB * 255).byte()}, {}, "codebook wants finite floats; found torch.uint8"),
    "scale": ({"codebook": RGB * 255}, {}, "pixels in .0, 1.; found .* to 25.*scale it, by 1 / 255"),
}


@pytest.mark.parametrize("tensors, metadata, message", NO_CODEBOOK.values(), ids=list(NO_CODEBOOK))
def test_what_is_no_codebook_is_refused_by_name(tmp_path, tensors, metadata, message):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "c", {"order": HWC, **metadata})
    with pytest.raises(TokenizerError, match=message):
        import_codebook(tmp_path / "c")


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "c").write_text("<html>404</html>")
    for path in (tmp_path / "c", tmp_path / "nowhere", tmp_path):
        with pytest.raises(TokenizerError, match="no safetensors file"):
            import_codebook(path)
