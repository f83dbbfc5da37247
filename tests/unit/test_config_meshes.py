"""The example of meshes can be loaded, and what makes one thing at a time has one slot."""

from __future__ import annotations

from pathlib import Path

from controlplane.config import load_config
from rung.types import ResidencyClass, ServiceEngine

ROOT = Path(__file__).parents[2]


def test_the_example_of_meshes_has_one_slot_for_each_engine() -> None:
    mesh, picture = load_config(ROOT / "deploy" / "rung.meshes.yaml").deployment_specs()
    assert mesh.engine.engine == ServiceEngine(dialect="hunyuan3d")
    assert picture.engine.engine == ServiceEngine(dialect="sana")
    assert (mesh.slots, picture.slots) == (1, 1)
    # Nothing but its end frees the one; the other can be unloaded.
    assert (mesh.residency_class, picture.residency_class) == (
        ResidencyClass.ON_DEMAND,
        ResidencyClass.SLEEPABLE,
    )
