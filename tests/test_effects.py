"""Values that have no effect: which are said, and that those really have none."""

import pytest
import torch
from test_configs import EXPERIMENTS, load

from models import create_model

# --- attention where no level has it --------------------------------------------------------------


def remarks(path, **model):
    config = load(path)
    config.data.image_size = model.pop("image_size", config.data.image_size)
    config.data.num_channels = config.data.num_channels or 3
    config.model.update(**model)
    with torch.device("meta"):
        return getattr(create_model(config), "remarks", [])


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_networks_of_all_experiments_have_the_attention_that_is_asked_for(path):
    assert remarks(path) == []


@pytest.mark.parametrize("size, levels", [(12, "12, 6, 3"), (20, "20, 10, 5"), (28, "28, 14, 7")])
@pytest.mark.parametrize("name", ["ncsnpp", "ddpm", "edm_unet", "adm"])
def test_attention_that_no_level_has_is_said(name, size, levels):
    (line,) = remarks(
        "pfgmpp/images16_ddpmpp.py", image_size=size, name=name, nf=64, attn_resolutions=(16, 4)
    )
    assert f"no attention at 16, 4: the levels of the network are {levels} wide" in line


@pytest.mark.parametrize(
    "resolutions, missing", [((8,), None), ((8, 16), None), ((4, 5), "5"), ((0,), None), ((), None)]
)
def test_only_attention_that_falls_away_is_said(resolutions, missing):
    lines = remarks("pfgmpp/images16_ddpmpp.py", attn_resolutions=resolutions)
    assert len(lines) == bool(missing)
    assert all(f"no attention at {missing}: " in line for line in lines)


@pytest.mark.parametrize("nf, where", [(32, "16"), (16, "16, 4, nor in the middle"), (64, None)])
def test_features_too_narrow_for_a_head_of_adm_are_said(nf, where):
    lines = remarks("pfgmpp/images16_ddpmpp.py", name="adm", nf=nf, attn_resolutions=(16, 4))
    assert len(lines) == bool(where)
    assert all(f"no attention at {where}: too few channels" in line for line in lines)
