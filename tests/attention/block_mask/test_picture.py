import sys

import numpy as np
import pytest
from block_mask_definitions import states_listed

from jaxkern import BlockMask


def test_pictures():
    mask = BlockMask.causal(64, 50, block_size=16)
    assert repr(mask) == (
        "BlockMask(1, 1, 64, 50): block_size=16, 6 full and 4 partial blocks, "
        "density 0.62"
    )
    picture = "+...\n#+..\n##+.\n###+"
    assert mask.to_string() == picture
    assert str(mask) == f"{mask!r}\n{picture}"
    assert mask.to_string(width=2) == "+.\n#+"
    assert mask.to_string(width=3) == "+.\n#+"
    heads = BlockMask.from_blocks(np.array([[[True]], [[False]]]))
    assert [heads.to_string(head=h) for h in (0, 1)] == ["#", "."]
    with pytest.raises(IndexError, match="to_string: head must be below 2, got 2"):
        heads.to_string(head=2)


def test_plot(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    mask = BlockMask.causal(64, 64, block_size=16)
    axes = mask.plot()
    assert axes.get_xlabel() == "key block"
    np.testing.assert_array_equal(axes.images[0].get_array(), states_listed(mask)[0, 0])
    assert mask.plot(ax=axes) is axes
    matplotlib.pyplot.close(axes.figure)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        ImportError, match="BlockMask.plot: matplotlib must be installed"
    ):
        mask.plot()
