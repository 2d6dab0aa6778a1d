"""The README's pictures: the stored dashboard is what the code draws today, and lanes can be drawn of any trace."""

from pathlib import Path
from xml.etree import ElementTree

from aspec.planning.sim_backend import SimCosts
from tests.test_chrome import recorded
from tools import picture

PICTURES = Path(picture.__file__).parent / "pictures"


def test_the_stored_dashboard_is_drawn_again_to_the_byte():
    assert picture.dashboard_svg() == (PICTURES / "dashboard.svg").read_text(encoding="utf-8")


def test_the_lanes_of_a_trace():
    timeline = recorded(SimCosts(copy_bytes_per_s=20e9, layer_s=1e-3))
    svg = picture.lanes_svg(timeline, timeline.start_s, 0.2)
    ElementTree.fromstring(svg)
    for word in ("rounds", "disk", "h2d", "target", "draft", "round 1", "-bound"):
        assert word in svg
