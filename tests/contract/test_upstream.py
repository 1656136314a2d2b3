"""TRL is the version, and has the private names, that `_upstream.py` says."""

import asyncio
import configparser
import inspect
import re
from pathlib import Path

import pytest
import trl

import trl_cancel
from tests.runs import build
from trl_cancel.evaluation import rewards_of
from trl_cancel.upstream import trl as _upstream


ROOT = Path(__file__).parents[2]
TRL_SOURCE = set(re.findall(r"\b_\w+", inspect.getsource(inspect.getmodule(trl.GRPOTrainer))))


@pytest.mark.parametrize("version", ["1.16.0", "1.16.3", "1.16.0.dev0"])
def test_tested_versions_are_accepted(version):
    _upstream.check_trl_version(version)


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "1.17.0.dev0", "0.26.0", "2.0.0"])
def test_other_versions_are_refused_with_what_to_install(version):
    with pytest.raises(
        ImportError, match=rf"trl {re.escape(version)} is installed. Run: pip install 'trl>=1.16,<1.17'"
    ):
        _upstream.check_trl_version(version)


def test_range_is_the_one_in_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirement = f"trl>={_upstream.TRL_MIN},<{_upstream.TRL_BELOW}"
    assert requirement in setup["options"]["install_requires"].split()


def test_installed_trl_is_accepted():
    _upstream.check_installation()


def method(signature):
    """A trainer like TRL's, one of whose methods has another signature."""
    return type("Changed", (trl.GRPOTrainer,), {signature.__name__: signature})


def test_changed_signature_is_refused():
    def _prepare_inputs(self, batch, mode):
        pass

    with pytest.raises(ImportError, match=r"_prepare_inputs takes \['self', 'batch'\], expected"):
        _upstream.check_signatures(method(_prepare_inputs))


def test_changed_return_is_refused():
    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep) -> tuple[int, int]:
        pass

    with pytest.raises(ImportError, match="expected 3 values"):
        _upstream.check_signatures(method(_get_per_token_logps_and_entropies))


def test_missing_method_is_refused():
    class Without:
        pass

    with pytest.raises(ImportError, match="takes None, expected"):
        _upstream.check_signatures(Without)


async def awaited(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize("name", _upstream.ATTRIBUTES)
def test_attributes_exist(tiny_model, name):
    arguments = {"reward_funcs": awaited}  # with an event loop, which other trainers lack
    assert hasattr(build(tiny_model, trl.GRPOTrainer, arguments=arguments), name)


def test_what_rewards_are_called_with(tiny_model):
    """Evaluation gives the same, and runs async ones in the same event loop."""
    seen = {}

    async def watch(completions, **columns):
        seen.update(columns, loop=asyncio.get_running_loop())
        return [0.0] * len(completions)

    trainer = build(tiny_model, trl.GRPOTrainer, arguments={"reward_funcs": watch}, max_steps=1)
    trainer.train()
    trained = dict(seen)
    seen.clear()
    rewards_of(watch, trainer.processing_class, [trainer.train_dataset[0]], [[1]], trainer)
    assert seen.keys() == trained.keys()
    assert seen["trainer_state"] is trained["trainer_state"] is trainer.state
    assert seen["loop"] is trained["loop"] is trainer.async_loop


def test_private_names_of_trl_are_used_only_as_declared():
    """Whatever the trainer overrides or reads of TRL's private names is declared, with a reason."""
    declared = {*_upstream.METHODS, *_upstream.ATTRIBUTES}
    files = Path(trl_cancel.__file__).parent.rglob("*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    used = set(re.findall(r"(?:self|super\(\)|trainer)\.(_(?!_)\w+)", source))
    of_trl = {name for name in used if name in TRL_SOURCE}
    assert of_trl - declared == set()
    assert {"_metrics", "_prepare_inputs", "_tokenizer"} <= of_trl, "the search must find something"
