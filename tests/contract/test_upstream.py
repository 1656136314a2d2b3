"""What this package needs of TRL is declared, and looked for when it is imported: old, changed and future versions."""

import configparser
import inspect
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import pytest
import trl
from packaging.requirements import Requirement

import trl_cancel
from tests.runs import build
from trl_cancel.upstream import names, versions
from trl_cancel.upstream import trl as upstream
from trl_cancel.upstream.checks import names_in_both


ROOT = Path(__file__).parents[2]
FORWARD = "_get_per_token_logps_and_entropies"
TRL_SOURCE = set(re.findall(r"\b_\w+", inspect.getsource(inspect.getmodule(trl.GRPOTrainer))))


@pytest.mark.parametrize("version", ["1.14.0", "1.14.2", "1.16.3", "1.16.0.dev0", "1.17.0", "2.0.0"])
def test_versions_that_are_taken(version):
    versions.check_trl_version(version)


@pytest.mark.parametrize("version", ["1.13.0", "0.26.0"])
def test_older_versions_are_refused_with_what_to_install(version):
    with pytest.raises(ImportError, match=rf"trl {version} is installed\. Run: pip install -U 'trl>=1\.14'$"):
        versions.check_trl_version(version)


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_a_version_that_cannot_train_here_is_refused():
    with pytest.raises(
        ImportError, match=r"trl 1\.15\.0 trains with Triton on a GPU only.* pip install 'trl!=1\.15\.\*'"
    ):
        versions.check_trl_version("1.15.0")


def test_requirement_is_the_one_in_setup_cfg():
    """The oldest version that works, without an upper bound."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (requirement,) = [each for each in setup["options"]["install_requires"].split() if Requirement(each).name == "trl"]
    assert requirement == f"trl>={versions.TRL_MIN}"


@pytest.mark.parametrize(
    ("version", "warned"), [("1.16.5", False), ("1.17.0", True), ("1.17.0.dev0", True), ("2.0", True)]
)
def test_newer_versions_are_warned_of_once(monkeypatch, version, warned):
    monkeypatch.setattr(trl, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        upstream.check_installation()
    texts = [str(each.message) for each in caught]
    assert len(texts) == warned
    assert all(f"trl {version} is newer than trl-cancel" in text and "`trl-cancel doctor`" in text for text in texts)


def trainer_with(**changes):
    """A trainer like TRL's with other methods; `None` takes one away."""
    kept = {name: value for name, value in vars(trl.GRPOTrainer).items() if changes.get(name, "") is not None}
    changed = {name: value for name, value in changes.items() if value is not None}
    return type("Changed", trl.GRPOTrainer.__bases__, {**kept, **changed, "__module__": "trl.changed"})


def changed_keyword(self, batch, mode):
    pass


def of_two_values(self, model, input_ids, attention_mask, logits_to_keep) -> tuple[int, int]:
    pass


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"_prepare_inputs": changed_keyword},
            r"_prepare_inputs takes \['self', 'batch'\], expected \['self', 'gener",
        ),
        ({"_calculate_rewards": None}, "_calculate_rewards is gone"),
        ({"_get_per_token_logps_and_entropies": of_two_values}, "expected 3 values"),
        ({"__init__": lambda self: None}, "has no _logs, .*epsilon_high"),
    ],
    ids=["keyword", "renamed", "returned", "attributes"],
)
@pytest.mark.parametrize(
    ("version", "remedy"), [("1.16.0", "--force-reinstall trl==1.16.0"), ("1.18.0", "'trl>=1.14,<1.17'")]
)
def test_a_trainer_that_differs_is_refused(monkeypatch, changes, found, version, remedy):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"trl {version} differs from what .*{found}.* run: pip install .*{remedy}"):
        upstream.check_installation(trainer_with(**changes))


def test_a_function_that_is_called_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(upstream, "unwrap_model_for_generation", lambda model, accelerator: None)
    with pytest.raises(
        ImportError, match=r"unwrap_model_for_generation\(\) is called otherwise .*gather_deepspeed3_params"
    ):
        upstream.check_installation()


def test_a_wrapper_that_hands_everything_on_is_taken():
    """As of 1.14."""

    def wrapper(self, model, *args, batch_size=None, compute_aux_loss=False, **kwargs):
        pass

    upstream.check_installation(trainer_with(_get_per_token_logps_and_entropies=wrapper))
    of_three = getattr(trl.GRPOTrainer, FORWARD).__get__(None, trl.GRPOTrainer)
    as_text = FunctionType(of_three.__code__, of_three.__globals__, closure=of_three.__closure__)
    as_text.__defaults__, as_text.__annotations__ = of_three.__defaults__, {"return": "tuple[Tensor, Tensor, Tensor]"}
    upstream.check_installation(trainer_with(_get_per_token_logps_and_entropies=as_text))


def test_a_property_in_place_of_a_method_is_refused():
    with pytest.raises(ImportError, match="_get_train_sampler takes no arguments, expected"):
        upstream.check_installation(trainer_with(_get_train_sampler=property(lambda self: None)))


def test_names_of_its_own_that_trl_has_too_are_refused(monkeypatch):
    assert names_in_both(trl_cancel.CancelGRPOTrainer, trl.GRPOTrainer) == []

    def setting(self):
        self._held = []

    def setting_of_others(self, other):
        other._signals = 3

    monkeypatch.setattr(trl.GRPOTrainer, "another_method", setting_of_others, raising=False)
    assert names_in_both(trl_cancel.CancelGRPOTrainer, trl.GRPOTrainer) == []
    monkeypatch.setattr(trl.GRPOTrainer, "finished_at", lambda self: None, raising=False)
    monkeypatch.setattr(trl.GRPOTrainer, "some_method", setting, raising=False)
    with pytest.raises(
        ImportError, match="its trainer has _held, finished_at too, which trl-cancel uses for something"
    ):
        upstream.check_names(trl_cancel.CancelGRPOTrainer)


class UnslothGRPOTrainer:
    """Stands for what Unsloth puts in the place of TRL's trainer when it is imported."""

    __module__ = "unsloth_compiled_cache"


def test_a_trainer_in_the_place_of_trls(monkeypatch, tiny_model):
    """Before this package is imported it is refused; after, the trainers are built on TRL's, and say so."""
    with pytest.raises(
        ImportError, match=r"is unsloth_compiled_cache\.Uns.*Import GRPOTrainer of trl_cancel before that"
    ):
        upstream.check_installation(UnslothGRPOTrainer)
    monkeypatch.setattr(trl, "GRPOTrainer", UnslothGRPOTrainer)
    with pytest.warns(UserWarning, match=r"trl\.GRPOTrainer is unsloth_.* built on TRL's own, without its changes"):
        trainer = build(tiny_model)
    assert isinstance(trainer, upstream.GRPOTrainer)


def test_private_names_of_trl_are_used_only_as_declared():
    """Whatever the trainer overrides or reads of TRL's private names is declared, with a reason."""
    declared = {*names.METHODS, *names.ATTRIBUTES}
    files = Path(trl_cancel.__file__).parent.rglob("*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    used = set(re.findall(r"(?:self|super\(\)|trainer)\.(_(?!_)\w+)", source))
    of_trl = {name for name in used if name in TRL_SOURCE}
    assert of_trl - declared == set()
    assert {"_metrics", "_prepare_inputs", "_tokenizer"} <= of_trl, "the search must find something"
