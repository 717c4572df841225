"""Grids show the pictures themselves, enlarged without smoothing, with room for any caption."""

import io

import numpy as np
import pytest
from PIL import Image

from arra.errors import ArraError
from arra.report.grids import GridColumn, data_url, png_bytes, readme_grid, sample_grid, strip


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_a_strip_holds_every_pixel_enlarged() -> None:
    images = pictures(3, 8, 10)
    pixels = np.asarray(strip(images, scale=3))
    assert pixels.shape == (24, 3 * 30 + 2 * 3, 4)
    for i, picture in enumerate(images):
        left = i * 33
        assert (pixels[:, left : left + 30, :3] == picture.repeat(3, 0).repeat(3, 1)).all()
    assert (pixels[:, 30:33, 3] == 0).all()


def test_png_is_lossless() -> None:
    image = strip(pictures(2, 8, 8))
    assert (np.asarray(Image.open(io.BytesIO(png_bytes(image)))) == np.asarray(image)).all()
    assert data_url(image).startswith("data:image/png;base64,")


@pytest.mark.parametrize("grid", [sample_grid, readme_grid])
def test_a_grid_contains_the_pictures_of_every_column(grid) -> None:
    one, other = pictures(2, 1, 16, 16, seed=1), pictures(2, 3, 16, 16, seed=2)
    captions = ["short", "a very long caption with <markup> and\nnew lines " * 8]
    pixels = np.asarray(
        grid([GridColumn("reconstruction", one), GridColumn("baseline", other, "#3d7ec7")], captions=captions)
    )
    for picture in (one[0, 0], one[1, 0], other[0, 0], other[1, 2]):
        big = picture.repeat(3, 0).repeat(3, 1)
        corners = np.argwhere((pixels[:, :, :] == big[0, 0]).all(-1))
        assert any(
            (pixels[y : y + 48, x : x + 48] == big).all()
            for y, x in corners
            if pixels[y : y + 48, x : x + 48].shape == big.shape
        )


def test_captions_never_leave_the_grid() -> None:
    long = sample_grid([GridColumn("a", pictures(1, 1, 16, 16))], captions=["word" * 400])
    short = sample_grid([GridColumn("a", pictures(1, 1, 16, 16))], captions=["word"])
    assert long.size == short.size


def test_columns_of_other_prompts_are_refused() -> None:
    with pytest.raises(ArraError, match="column 'baseline' has 1 rows for 2 captions"):
        sample_grid([GridColumn("baseline", pictures(1, 1, 8, 8))], captions=["a", "b"])
