"""A run's own figures say of split layers what they say of whole ones."""

import pytest

from aspec.observe.batch_progress import BatchProgress
from aspec.observe.recorder import Recorder
from aspec.planning.sim_backend import SimCosts
from aspec.planning.simulation import measured_profile, simulate
from tests.simulate import make_plan


@pytest.mark.parametrize(("attention", "micro_batches"), [("compute", 1), ("cpu", 1), ("cpu", 2)])
def test_a_layer_in_pieces_is_measured_as_a_whole(attention, micro_batches):
    plan = make_plan(attention_resource=attention, micro_batches=micro_batches, num_rows=4)
    profile = SimCosts(layer_s=6e-3, layer_token_s=1e-4)
    recorder, tally = Recorder(), BatchProgress(total=4)
    simulate(plan, profile, [(10, 20), (40, 20), (10, 30), (10, 9)], [recorder, tally])
    timeline = recorder.timeline()
    found = measured_profile(timeline)
    assert found.layer_s == pytest.approx(profile.layer_s, rel=1e-6)
    assert found.layer_token_s == pytest.approx(profile.layer_token_s, rel=1e-6)
    layers = sum(s.stop_s - s.start_s for s in timeline.slices if s.layer >= 0 and s.part < 0)
    assert tally.compute_s == pytest.approx(
        layers + sum(s.stop_s - s.start_s for s in timeline.slices if s.name in ("embed", "head"))
    )
