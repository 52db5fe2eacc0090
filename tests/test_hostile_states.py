"""States that were changed from outside: loaded with right results, or refused in one line."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import train_state
from many_lives import small_config

import run_lib
from models import create_model
from models.weights import load_ema
from storage import run_config
from storage.checkpoints import fit, load_checkpoint, open_checkpoint, save_checkpoint
from storage.run_checkpoints import written_steps


def few_tensors():
    """A run whose checkpoints hold 12 weights, each four times, and are read at once."""
    mlp = {"model.name": "mlp", "model.num_res_blocks": 1}
    return small_config(**mlp, **{"training.n_iters": 3})


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The newest checkpoint of a run of `few_tensors`."""
    workdir = tmp_path_factory.mktemp("few")
    assert run_lib.train(few_tensors(), workdir)
    return load_checkpoint(newest(workdir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir after three steps of a tiny run."""
    workdir = tmp_path_factory.mktemp("trained")
    assert run_lib.train(small_config(**{"training.n_iters": 3}), workdir)
    return workdir


def newest(workdir):
    return workdir / "checkpoints-meta/checkpoint.pth"


# --- mutations ------------------------------------------------------------------------------------

VALUES = [
    None,
    "word",
    "",
    True,
    -1,
    0,
    7,
    10**30,
    -0.5,
    0.5,
    float("inf"),
    float("nan"),
    [],
    {},
    (),
    [1, "a"],
    {"a": 1},
    torch.ones(()),
    torch.ones(0),
]
TENSORS = [
    lambda x: x[..., None],
    lambda x: x.sum(),
    lambda x: x.flatten()[:1],
    lambda x: x.double(),
    lambda x: x.to(torch.int8),
    lambda x: x.bool(),
    lambda x: x.to(torch.complex64),
    lambda x: x.half(),
    lambda x: x * torch.nan,
    lambda x: x - torch.inf,
    lambda x: -x - 1,
    lambda x: x * 0 + 0.5,
    lambda x: x.T if x.dim() == 2 else x.flip(0) if x.dim() else x,
    lambda x: x.to_sparse() if x.dim() else x,
    lambda x: x.to("meta"),
    lambda x: x.flatten()[:1].expand(x.numel()).view_as(x) if x.dim() else x,
    lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
]


def places(entry, path=()):
    """The paths of everything in `entry`."""
    yield path
    numbered = enumerate(entry) if isinstance(entry, list) else ()
    for key, value in entry.items() if isinstance(entry, dict) else numbered:
        yield from places(value, (*path, key))


def mutate(state, chance):
    """Make one change to `state` in place: a value, a type, a shape, an order or a key."""
    by_section = {}
    for path in places(state):
        if path:
            by_section.setdefault(path[0], []).append(path)
    *above, key = chance.choice(by_section[chance.choice(sorted(by_section))])
    owner = state
    for step in above:
        owner = owner[step]
    value = owner[key]
    kind = chance.choice(("value", "tensor", "tensor", "missing", "added", "order"))
    if kind == "tensor" and isinstance(value, torch.Tensor):
        owner[key] = chance.choice(TENSORS)(value.clone())
    elif kind == "missing":
        del owner[key]
    elif kind == "added" and isinstance(value, dict):
        value[chance.choice(("unknown", 3, 10**6))] = chance.choice(VALUES)
    elif kind == "added" and isinstance(value, list):
        value.append(chance.choice([*VALUES, *value]))
    elif kind == "order" and isinstance(value, list):
        value.reverse()
    elif kind == "order" and isinstance(value, dict):
        keys, values = list(value), list(value.values())
        chance.shuffle(values)
        value.update(zip(keys, values, strict=True))
    else:
        owner[key] = chance.choice(VALUES)


def tensors(state):
    """All that a state holds."""
    moments = (m for each in state.optimizer.state.values() for m in each.values())
    return [*state.model.state_dict().values(), *state.ema.shadow_params, *moments]


def sound(state):
    return all(tensor.isfinite().all() for tensor in tensors(state))


def test_500_mutated_states_are_loaded_or_refused(few, tmp_path):
    config, chance, refused = few_tensors(), random.Random(5), 0
    path = tmp_path / "mutated.pth"
    resumed = train_state(config)
    for number in range(500):
        resumed.load_state_dict(few)
        state = copy.deepcopy(few)
        mutate(state, chance)
        torch.save(state, path)
        before = [tensor.clone() for tensor in tensors(resumed)]
        try:
            loaded = load_checkpoint(path)
            run_config.changes(path, loaded, run_config.flatten(config))
            written_steps(loaded, path)
            fit(resumed.load_state_dict, loaded, path)
        except ValueError as error:
            assert str(error).isprintable(), number
            assert str(path) in str(error), number
            assert all(map(torch.equal, before, tensors(resumed))), number
            refused += 1
            continue
        assert sound(resumed), number
        for parameter in resumed.parameters:
            parameter.grad = torch.ones_like(parameter)
        resumed.apply_gradient(torch.tensor(True))
        assert sound(resumed), number
    assert 250 < refused < 500


def test_200_mutated_states_that_are_opened_give_finite_weights_or_are_refused(few, tmp_path):
    """Opening takes or refuses what loading does, but for raw weights and moments, not read."""
    config, chance, refused = few_tensors(), random.Random(6), 0
    path = tmp_path / "mutated.pth"
    networks = create_model(config), create_model(config)
    for number in range(200):
        state = copy.deepcopy(few)
        mutate(state, chance)
        torch.save(state, path)
        outcomes = []
        for network, read in zip(networks, (open_checkpoint, load_checkpoint), strict=True):
            load_ema(network, few)
            try:
                outcomes.append(fit(partial(load_ema, network), read(path), path))
            except ValueError as error:
                assert str(error).isprintable() and str(path) in str(error), number
                outcomes.append(None)
        opened, whole = outcomes
        refused += opened is None
        if opened is not None:
            assert all(value.isfinite().all() for value in networks[0].state_dict().values())
        if whole is not None:
            assert opened == whole, number
            assert all(map(torch.equal, *(n.state_dict().values() for n in networks))), number
    assert 50 < refused < 190


def groups(state):
    return state["optimizer"]["param_groups"]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s["optimizer"]["param_groups"][0]["params"].reverse(), "in another order"),
        (
            lambda s: [m.update(exp_avg=torch.ones(())) for m in s["optimizer"]["state"].values()],
            r"state\.0\.exp_avg has the shape \(\)",
        ),
        (lambda s: s["optimizer"]["state"].pop(1), r"optimizer\.state has no 1"),
        (lambda s: s["optimizer"]["state"][0]["step"].fill_(1e6), "step is not a number of steps"),
        (lambda s: s["ema"]["shadow_params"][0].fill_(torch.nan), r"ema\..*\.0 is not finite"),
        (lambda s: s["ema"].update(num_updates="word"), r"ema\.num_updates is not a number"),
        (lambda s: s.update(step=10**30), "no intact checkpoint"),
        (lambda s: s.update(step=-1), "no intact checkpoint"),
        (lambda s: s.update(step=float("inf")), "no intact checkpoint"),
        (lambda s: s.update(written=3), "holds no steps"),
        (lambda s: s.update(written=[1, 10**12]), r"holds no steps up to 3: \[1, 1000000000000\]"),
        (lambda s: s.update(model=[1]), "model is no dictionary but of type list"),
        (lambda s: s.update(model={3: torch.ones(1)}), "have the name 3, which is no string"),
        (lambda s: s.update(model={"all": 3}), "the weights lack 'all_modules"),
        (
            lambda s: s["model"].update(dict.fromkeys(s["model"], 3)),
            r"model\..* is no dense tensor but of type int",
        ),
        (
            lambda s: [g.update(params=[torch.ones(2)] * len(g["params"])) for g in groups(s)],
            "in another order",
        ),
    ],
)
def test_states_that_broke_earlier_programs(trained, tmp_path, change, says):
    """Memory corruption, tracebacks and ruined weights that were once accepted, by resuming."""
    state = load_checkpoint(newest(trained))
    change(state)
    save_checkpoint(newest(tmp_path), state)
    with pytest.raises(ValueError, match=says):
        run_lib.train(small_config(**{"training.n_iters": 4}), tmp_path)


def test_options_of_a_stored_optimizer_change_nothing(trained, tmp_path):
    """The resumed optimizer has the options of the config."""
    config = small_config(**{"training.n_iters": 4})
    for name in ("plain", "hostile"):
        state = load_checkpoint(newest(trained))
        if name == "hostile":
            group = state["optimizer"]["param_groups"][0]
            group |= {"differentiable": True, "maximize": True, "lr": "much", "fused": None}
        save_checkpoint(newest(tmp_path / name), state)
        run_lib.train(config, tmp_path / name)
    plain, hostile = (load_checkpoint(newest(tmp_path / n))["model"] for n in ("plain", "hostile"))
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


def test_evaluation_refuses_what_training_does(trained, tmp_path):
    config = small_config(**{"training.n_iters": 3, "eval.enable_loss": True})
    state = load_checkpoint(newest(trained))
    state["ema"]["shadow_params"][0].fill_(np.nan)
    save_checkpoint(tmp_path / "checkpoints/checkpoint_3.pth", state)
    with pytest.raises(ValueError, match=r"checkpoint_3\.pth does not fit .*is not finite"):
        run_lib.evaluate(config, tmp_path)
