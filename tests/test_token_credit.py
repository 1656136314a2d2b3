"""NTHR and DelTA in the trainer: what is applied, from which states, and what it costs."""

import math

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import references
from trl_cancel import CancelGRPOTrainer, DelTAConfig, DelTATrainer, NTHRConfig, NTHRTrainer
from trl_cancel.batch.states import LMHead, StateStore
from trl_cancel.methods import delta
from trl_cancel.pipeline import credit as stage
from trl_cancel.playground.tokenizer import build_tokenizer
from trl_cancel.playground.warm_start import build_model

from .methods import ON_POLICY, SEQUENCE
from .runs import OFF_POLICY, assert_same_weights, build, noisy_reward, train
from .test_methods import of_trl


# Where the states come from: TRL's pass for the old log-probs, the loss's own, or one more.
THRESHOLD = 1.8  # nats
LAYOUTS = {
    "old log-probs": OFF_POLICY,
    "old log-probs, torn": {**OFF_POLICY, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "on policy": {**ON_POLICY, "per_device_train_batch_size": 8},
    "on policy, accumulated": {**OFF_POLICY, "num_iterations": 1, "gradient_accumulation_steps": 4},
    "on policy, torn": {
        **OFF_POLICY,
        "num_iterations": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
}
LORA = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}


class Watch:
    """Recomputes each application of token credits from the model's full logits, in float64, and compares."""

    def __init__(self, monkeypatch, expected, sees_all=False):
        self.expected, self.applied, self.sees_all = expected, 0, sees_all
        self.trainer, self.most = None, 0.0
        credited = stage.credited

        def watched(advantages, used, rollouts):
            result = credited(advantages, used, rollouts)
            if used:
                self.compare(advantages, result, rollouts)
            return result

        monkeypatch.setattr(stage, "credited", watched)

    @torch.no_grad()
    def compare(self, advantages, result, rollouts):
        self.applied += 1
        groups = rollouts.group_ids.view(-1, rollouts.num_generations)
        assert (groups == groups[:, :1]).all(), "groups are whole and in order"
        active = rollouts.mask.bool()
        hidden, logits = self.pass_over(rollouts)
        probabilities = (logits / self.trainer.temperature).softmax(-1)
        expected = self.expected(rollouts, hidden, probabilities, active)
        base = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        found = (result.unsqueeze(1) if result.dim() == 1 else result).expand_as(active)
        torch.testing.assert_close(found[active], (base * expected).to(found)[active], rtol=1e-4, atol=1e-5)
        self.most = max(self.most, (expected[active] - 1).abs().max().item())

    def pass_over(self, rollouts):
        """Last hidden states and logits."""
        ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
        seen = torch.ones_like(rollouts.mask) if self.sees_all else rollouts.mask
        attention = torch.cat([rollouts.prompt_mask, seen], dim=1)
        output = self.trainer.model(input_ids=ids, attention_mask=attention, output_hidden_states=True)
        predicting = slice(-rollouts.mask.size(1) - 1, -1)
        return output.hidden_states[-1][:, predicting].double(), output.logits[:, predicting].double()

    def train(self, model, **settings):
        self.trainer = build(model, **settings)
        self.trainer.train()
        assert self.applied > 1
        assert self.most > 0.05, "nothing to compare"


def nthr_expected(rollouts, hidden, probabilities, active):
    coefficients = torch.ones_like(active, dtype=torch.double)
    for first in range(0, len(active), rollouts.num_generations):
        rows = slice(first, first + rollouts.num_generations)
        advantages = rollouts.advantages[rows].tolist()
        positive = [advantage > 0 for advantage in advantages]
        scores, threshold = references.nthr_scores(
            hidden[rows].tolist(),
            probabilities[rows].tolist(),
            rollouts.completion_ids[rows].tolist(),
            active[rows].long().tolist(),
            positive,
        )
        success = sum(positive) / len(positive)
        for i, advantage in enumerate(advantages):
            for t in range(active.size(1)):
                if any(positive) and advantage < 0 and active[first + i, t] and scores[i][t] > 0.5 * threshold:
                    coefficients[first + i, t] = 2 * abs(0.5 - success)
    return coefficients


def delta_expected(rollouts, hidden, probabilities, active):
    chosen = probabilities.gather(-1, rollouts.completion_ids.unsqueeze(-1))
    proxies = ((1 - chosen) * hidden)[active]
    advantages = rollouts.advantages.unsqueeze(1).expand_as(active)[active]
    return spread(references_of(proxies, advantages), active)


def references_of(proxies, advantages):
    return references.delta_coefficients(
        proxies.tolist(), advantages.tolist(), 0.5, 1.5, refinements=1, gamma=None, normalize=True
    )


def hidden_gradient_expected(rollouts, hidden, probabilities, active, head):
    occurring = rollouts.completion_ids[active].unique()
    weight = head[occurring].double()
    proxies = []
    for token, row in zip(rollouts.completion_ids[active], probabilities[active], strict=True):
        words = row[occurring]
        likeliest = words.topk(min(20, len(words))).indices
        proxies.append(head[token].double() - words[likeliest] @ weight[likeliest])
    advantages = rollouts.advantages.unsqueeze(1).expand_as(active)[active]
    return spread(references_of(torch.stack(proxies), advantages), active)


def spread(values, active):
    coefficients = torch.ones_like(active, dtype=torch.double)
    coefficients[active] = torch.tensor(values, dtype=torch.double)
    return coefficients


NTHR = {"nthr": True, "nthr_beta": 0.5, "learning_rate": 1e-3}
FILTER = {"max_completion_entropy": THRESHOLD}
DELTA = {"delta_credit": True, "delta_lambda_min": 0.5, "delta_lambda_max": 1.5, "learning_rate": 1e-3}


@pytest.mark.parametrize("arguments", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("method", "expected"), [(NTHR, nthr_expected), (DELTA, delta_expected)], ids=["nthr", "delta"]
)
def test_applied_coefficients_are_those_of_full_logits(monkeypatch, tiny_model, method, expected, layout, arguments):
    watch = Watch(monkeypatch, expected)
    settings = {**LAYOUTS[layout], **method, "max_steps": 9, "beta": 0.05 if arguments else 0.0, "temperature": 0.8}
    watch.train(tiny_model, **settings, arguments=arguments)


def filter_expected(rollouts, hidden, probabilities, active):
    entropies = torch.special.entr(probabilities).sum(-1) * active
    return (entropies.sum(1, keepdim=True) / active.sum(1, keepdim=True) <= THRESHOLD).double().expand_as(active)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entropies_are_those_of_full_logits(monkeypatch, tiny_model, layout):
    """In every layout: of the loss's pass, of TRL's for the old log-probs, and of one that is made for them."""
    watch = Watch(monkeypatch, filter_expected)
    settings = {"max_completion_entropy": THRESHOLD, "max_steps": 9, "temperature": 0.8, "beta": 0.05}
    watch.train(tiny_model, **{**LAYOUTS[layout], **settings})


@pytest.mark.parametrize("gib", [2.0, 2e-6, 0.0], ids=["on the device", "offloaded", "computed again"])
@pytest.mark.parametrize("layout", ["old log-probs", "on policy, torn"])
@pytest.mark.parametrize(
    ("method", "expected"), [(NTHR, nthr_expected), (DELTA, delta_expected)], ids=["nthr", "delta"]
)
def test_memory_for_states(monkeypatch, tiny_model, method, expected, layout, gib):
    stores = []
    reserve = StateStore.reserve

    def watched(store, size):
        reserve(store, size)
        stores.append((store.keeps, store.offloads))

    monkeypatch.setattr(StateStore, "reserve", watched)
    watch = Watch(monkeypatch, expected)
    watch.train(tiny_model, **{**LAYOUTS[layout], **method, "max_steps": 9, "state_cache_gib": gib})
    assert set(stores) == {(gib > 0, gib < 1)}


@pytest.mark.parametrize("gib", [2.0, 2e-6, 0.0], ids=["on the device", "offloaded", "computed again"])
def test_hidden_gradient(monkeypatch, tiny_model, gib):
    watch = Watch(monkeypatch, lambda *seen: hidden_gradient_expected(*seen, watch.trainer.model.lm_head.weight))
    monkeypatch.setattr(delta, "HELD_LOGITS", 200)  # a few tokens at a time
    settings = {**DELTA, "delta_proxy": "hidden_gradient", "state_cache_gib": gib, "temperature": 0.7}
    watch.train(tiny_model, **{**OFF_POLICY, **settings, "max_steps": 9})


def passes_of(monkeypatch, tiny_model, trainer, **settings):
    """Rollouts that pass through the model for their log-probs."""
    rows = 0
    forward = trl.GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self, model, input_ids, *args, **kwargs):
        nonlocal rows
        rows += len(input_ids)
        return forward(self, model, input_ids, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
        train(tiny_model, trainer, **settings)
    return rows


@pytest.mark.parametrize(
    ("layout", "method", "extra"),
    [
        ("old log-probs", NTHR, 0),
        ("old log-probs", DELTA, 0),
        ("old log-probs, torn", NTHR, 0),
        ("old log-probs, torn", DELTA, 0),
        ("on policy", NTHR, 0),
        ("on policy, accumulated", NTHR, 0),
        ("on policy, torn", NTHR, 1),
        ("on policy", FILTER, 0),
        ("on policy, torn", FILTER, 1),
        ("old log-probs", FILTER, 0),
        ("on policy", DELTA, 1),
        ("on policy, accumulated", DELTA, 1),
        ("on policy", {**NTHR, **DELTA}, 1),
        ("old log-probs", {**NTHR, **DELTA, "beta": 0.05}, 0),  # the reference's pass is not mistaken for the policy's
        # Where there is no room for states, each use is a pass.
        ("old log-probs", {**NTHR, "state_cache_gib": 0}, 1),
        ("old log-probs", {**DELTA, "state_cache_gib": 0}, 4),
        ("on policy", {**DELTA, "delta_refinements": 2, "state_cache_gib": 0}, 7),
    ],
)
def test_forward_passes(monkeypatch, tiny_model, layout, method, extra):
    settings = {**LAYOUTS[layout], "max_steps": 1}
    beta = method.get("beta", 0.0)
    arguments = LORA if beta else {}  # so that policy and reference are one model
    theirs = passes_of(monkeypatch, tiny_model, trl.GRPOTrainer, **settings, beta=beta, arguments=arguments)
    ours = passes_of(monkeypatch, tiny_model, CancelGRPOTrainer, **{**settings, **method}, arguments=arguments)
    rows = settings.get("per_device_train_batch_size", 4) * settings["steps_per_generation"]
    assert ours - theirs == extra * rows


@pytest.mark.parametrize("selection", ["score", "random"])
def test_nthr_selects_among_wrong_rollouts_of_mixed_groups(monkeypatch, tiny_model, selection):
    seen = []
    credited = stage.credited

    def watched(advantages, used, rollouts):
        result = credited(advantages, used, rollouts)
        seen.append((rollouts, result))
        return result

    monkeypatch.setattr(stage, "credited", watched)
    settings = {**OFF_POLICY, "nthr": True, "nthr_eta": 0.25, "nthr_beta": 0.1, "nthr_selection": selection}
    run = train(tiny_model, **{**settings, "max_steps": 24})
    selected = counted = 0
    for rollouts, result in seen:
        result = result if result.dim() == 2 else result.unsqueeze(1).expand_as(rollouts.mask)
        factor = result / rollouts.advantages.unsqueeze(1)
        down = ((factor - 0.25).abs() < 1e-5) & rollouts.mask.bool()
        assert not down[rollouts.advantages >= 0].any()
        same = ((factor - 1).abs() < 1e-5) | (rollouts.advantages == 0).unsqueeze(1)
        assert (down | same)[rollouts.mask.bool()].all()
        selected += down.sum().item()
        counted += rollouts.mask[rollouts.advantages < 0].sum().item()
    logged = [entry["nthr/selected_fraction"] for entry in run.logs if "nthr/selected_fraction" in entry]
    assert len(logged) == len(seen) == 3
    assert 0 < selected < counted
    assert min(logged) <= selected / counted <= max(logged)


def test_random_control_selects_as_many_without_disturbing_the_run(tiny_model):
    logs = {
        selection: train(tiny_model, **{**OFF_POLICY, **NTHR, "nthr_selection": selection, "learning_rate": 0.0}).logs
        for selection in ("score", "random")
    }
    for by_score, at_random in zip(logs["score"], logs["random"], strict=True):
        for name in ("reward", "nthr/selected_fraction", "entropy"):
            assert by_score.get(name) == at_random.get(name)
    assert logs["score"] != logs["random"], "other tokens, so another gradient"


@pytest.mark.parametrize("beta", [-math.inf, "-inf"])
def test_minus_infinity_selects_all(tiny_model, beta):
    if beta == "-inf":
        with pytest.raises(ValueError, match="nthr_beta='-inf' must be a number"):
            train(tiny_model, **OFF_POLICY, nthr=True, nthr_beta=beta)
        return
    logs = train(tiny_model, **OFF_POLICY, nthr=True, nthr_beta=beta).logs
    assert logs[0]["nthr/selected_fraction"] == 1


def test_a_threshold_of_no_group_is_not_logged(tiny_model):
    """Groups of one sign have none, and do not count in its mean."""

    def mostly_equal(completion_ids, **kwargs):
        return [float(sum(ids) % 5 == 0) for ids in completion_ids]

    arguments = {"reward_funcs": mostly_equal}
    logs = train(tiny_model, **{**OFF_POLICY, **NTHR, "max_steps": 24}, arguments=arguments).logs
    logged = [entry for entry in logs if "nthr/threshold" in entry]
    assert logged
    assert all(entry["nthr/threshold"] != 0 for entry in logged)


@pytest.mark.parametrize("assignment", ["soft", "hard", "random"])
def test_delta_assignments(tiny_model, assignment):
    run = train(tiny_model, **OFF_POLICY, **DELTA, delta_assignment=assignment)
    mean, std = run.logs[0]["delta/lambda_mean"], run.logs[0]["delta/lambda_std"]
    if assignment == "hard":
        assert std == pytest.approx(math.sqrt((1.5 - mean) * (mean - 0.5)), rel=1e-4), "only two values"
    else:
        soft = train(tiny_model, **OFF_POLICY, **DELTA).logs[0]
        assert (mean, std) == pytest.approx((soft["delta/lambda_mean"], soft["delta/lambda_std"]), rel=1e-4)


def test_top_fraction_keeps_the_tokens_of_highest_credit(monkeypatch, tiny_model):
    found = {}
    credited = stage.credited

    def watched(advantages, used, rollouts):
        result = credited(advantages, used, rollouts)
        active = rollouts.mask.bool() & (rollouts.advantages != 0).unsqueeze(1)
        factor = (result if result.dim() == 2 else result.unsqueeze(1)) / rollouts.advantages.unsqueeze(1)
        found[fraction] = factor.expand_as(active)[active]
        return result

    monkeypatch.setattr(stage, "credited", watched)
    for fraction in (None, 0.3):
        settings = {**OFF_POLICY, **DELTA, "delta_normalize": "none", "delta_top_fraction": fraction, "max_steps": 1}
        train(tiny_model, **settings)
    assert (found[0.3] == found[0.3].round()).all()
    kept = found[0.3] == 1
    assert set(found[0.3].tolist()) == {0.0, 1.0}
    assert kept.float().mean() == pytest.approx(0.3, abs=0.05)
    assert found[None][kept].min() >= found[None][~kept].max()


def test_own_credit_sees_states(tiny_model):
    """In the loss or after scoring, a credit that asks for states finds them, with what belongs to the rollouts."""

    class Shrink:
        scope = "group"
        needs_states = True

        def __init__(self):
            self.seen = []

        def coefficients(self, rollouts):
            self.seen.append(rollouts)
            assert rollouts.states[0:2].shape[:2] == rollouts.mask[:2].shape
            logits = rollouts.head.logits(rollouts.states[0:4], torch.arange(30)) / rollouts.temperature
            found = logits.log_softmax(-1).gather(-1, rollouts.completion_ids[:4].unsqueeze(-1)).squeeze(-1)
            mask = rollouts.mask[:4].bool()
            torch.testing.assert_close(found[mask], rollouts.old_logps[:4][mask], rtol=1e-4, atol=1e-5)
            lengths = rollouts.mask.sum(1).tolist()
            ids = [row[:length] for row, length in zip(rollouts.completion_ids.tolist(), lengths, strict=True)]
            assert rollouts.rewards.squeeze(1).tolist() == noisy_reward(ids)
            rollouts.log("shrink/length", rollouts.mask.sum(1).float())
            return torch.full_like(rollouts.mask, 0.5, dtype=torch.float)

    for layout, size in (("on policy", 8), ("old log-probs", 16), ("on policy, accumulated", 4)):
        credit = Shrink()
        run = train(tiny_model, **{**LAYOUTS[layout], "temperature": 0.9}, arguments={"credits": [credit]})
        assert {len(rollouts.mask) for rollouts in credit.seen} == {size}
        assert run.logs[0]["shrink/length"] > 0


def test_cold_start_of_a_model_whose_logits_are_not_linear_is_refused(monkeypatch, tiny_model):
    def refuse(model):
        raise ValueError("not linear")

    monkeypatch.setattr(LMHead, "of", refuse)
    with pytest.raises(ValueError, match="not linear"):
        build(tiny_model, **OFF_POLICY, **DELTA)


@pytest.mark.parametrize(
    ("trainer", "config", "tag", "paper"),
    [(NTHRTrainer, NTHRConfig, "nthr", "2505.18830"), (DelTATrainer, DelTAConfig, "delta", "2605.21467")],
)
def test_named_trainers(tiny_model, tmp_path, trainer, config, tag, paper):
    args = config(
        str(tmp_path),
        max_steps=1,
        max_completion_length=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
    )
    run = trainer(tiny_model, noisy_reward, args, build(tiny_model).train_dataset)
    run.train()
    run.save_model()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert tag in card
    assert paper in card
    assert any(name.startswith(f"{tag}/") for entry in run.state.log_history for name in entry)


def test_sequence_level_spreads_token_credit(monkeypatch, tiny_model):
    watch = Watch(monkeypatch, delta_expected)
    watch.train(tiny_model, **{**OFF_POLICY, **SEQUENCE, **DELTA, "max_steps": 9})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the watch's own pass
@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing(monkeypatch, tiny_model, checkpointing):
    watch = Watch(monkeypatch, nthr_expected)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    watch.train(tiny_model, **{**LAYOUTS["on policy"], **NTHR, **settings, "max_steps": 6})


@pytest.mark.parametrize("layout", ["old log-probs", "on policy"])
@pytest.mark.parametrize(
    ("method", "expected"), [(NTHR, nthr_expected), (DELTA, delta_expected)], ids=["nthr", "delta"]
)
def test_quantized_model(monkeypatch, tmp_path, method, expected, layout):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    tokenizer, sizes = build_tokenizer(), {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 64, "intermediate_size": 64}  # on a CPU, multiples of 64 and 32
    build_model(tokenizer, **sizes, initializer_range=0.4).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    assert model.is_loaded_in_4bit
    watch = Watch(monkeypatch, expected)
    settings = {**LAYOUTS[layout], **method, "max_steps": 9, "beta": 0.05}
    watch.train(model, **settings, arguments={**LORA, "processing_class": tokenizer})


def test_trained_head(monkeypatch, tiny_model):
    """A copy of the whole head that PEFT trains."""
    watch = Watch(monkeypatch, nthr_expected)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    watch.train(tiny_model, **{**OFF_POLICY, **NTHR, "max_steps": 9}, arguments={"peft_config": lora})


def test_first_version_of_fsdp_is_refused(monkeypatch, tiny_model):
    initialise = trl.GRPOTrainer.__init__

    def as_if_sharded(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", as_if_sharded)
    with pytest.raises(ValueError, match=r"nthr=True and delta_credit=True cannot read .* Set fsdp_version: 2"):
        build(tiny_model, **{**OFF_POLICY, **NTHR, **DELTA})
    build(tiny_model, **OFF_POLICY, advantage_sign="positive")  # reads no layer


@pytest.mark.parametrize("layout", ["old log-probs", "on policy, torn"])
def test_states_that_are_computed_again_can_be_cut_like_others(tiny_model, layout):
    class Slices:
        scope = "rollout"
        needs_states = True

        def coefficients(self, rollouts):
            rows = len(rollouts.mask)
            whole = rollouts.states[:]
            assert len(whole) == rows
            for some in (slice(None, 3), slice(rows - 2, None), slice(rows - 2, rows + 6)):
                mask = rollouts.mask[some].bool()
                torch.testing.assert_close(rollouts.states[some][mask], whole[some][mask], rtol=1e-4, atol=1e-5)
            return torch.ones_like(rollouts.mask, dtype=torch.float)

    train(tiny_model, **{**LAYOUTS[layout], "state_cache_gib": 0}, arguments={"credits": [Slices()]})


def test_too_little_memory_is_said(tiny_model, caplog):
    with caplog.at_level("WARNING"):
        train(tiny_model, **{**OFF_POLICY, **DELTA, "state_cache_gib": 1e-7})
    assert any("GiB, more than 4 x state_cache_gib=1e-07" in record.message for record in caplog.records)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's, while it compiles
@pytest.mark.slow
def test_compiled_model(monkeypatch, tiny_model):
    watch = Watch(monkeypatch, nthr_expected)
    settings = {**LAYOUTS["on policy"], **NTHR, "torch_compile": True, "torch_compile_backend": "eager"}
    watch.train(tiny_model, **{**settings, "max_steps": 3})


@pytest.mark.parametrize("layout", ["on policy", "on policy, torn", "old log-probs"])
def test_dropout_of_a_pass_of_its_own_changes_nothing_else(tiny_model, layout):
    arguments = {"peft_config": LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)}
    neutral = {"nthr": True, "nthr_eta": 1, "delta_credit": True, "delta_lambda_min": 1.0, "delta_lambda_max": 1.0}
    settings = {**LAYOUTS[layout], "query_preserved": False, "max_steps": 9}
    theirs = train(tiny_model, trl.GRPOTrainer, **of_trl(settings), arguments=arguments)
    ours = train(tiny_model, **settings, **neutral, arguments=arguments)
    assert_same_weights(ours.weights, theirs.weights)


def rollouts_with_tools(prompts, trainer):
    """Completions in whose middle stands what a tool has written."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    ids = [torch.randint(3, 30, (5,), generator=generator).tolist() for _ in prompts]
    return {
        "prompt_ids": [trainer.processing_class(prompt[0]["content"])["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[0.0] * 5 for _ in ids],
        "env_mask": [[1, 1, 0, 0, 1] for _ in ids],
    }


@pytest.mark.parametrize("layout", ["old log-probs", "on policy, torn", "on policy"])
@pytest.mark.parametrize(
    ("method", "expected"), [(NTHR, nthr_expected), (DELTA, delta_expected)], ids=["nthr", "delta"]
)
def test_tool_results_have_no_credit(monkeypatch, tiny_model, method, expected, layout):
    def tools_expected(rollouts, hidden, probabilities, active):
        assert (active.sum(1) == 3).all()
        return expected(rollouts, hidden, probabilities, active)

    watch = Watch(monkeypatch, tools_expected, sees_all=True)
    settings = {**LAYOUTS[layout], **method, "max_steps": 9}
    watch.train(tiny_model, **settings, arguments={"rollout_func": rollouts_with_tools})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nthr": True, "nthr_beta": math.nan}, "nthr_beta=nan must be a number"),
        ({"delta_credit": True, "delta_refinements": True}, "delta_refinements=True must be a whole number"),
        ({"delta": True}, r"delta=True: delta is TRL's name .* Did you mean delta_credit=True"),
        ({"state_cache_gib": "2"}, "state_cache_gib='2' must be a number of GiB"),
        ({"state_cache_gib": -1}, "state_cache_gib=-1 must be a number of GiB"),
        (
            {"delta_credit": True, "delta_top_fraction": 0.5, "delta_assignment": "hard"},
            "delta_top_fraction=0.5 ranks tokens by their assignment, but delta_assignment='hard' gives only",
        ),
    ],
)
def test_refused_values(tiny_model, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_model, **OFF_POLICY, **settings)


def test_states_that_were_not_asked_for(tiny_model):
    class Forgetful:
        scope = "rollout"

        def coefficients(self, rollouts):
            return rollouts.states[:].sum(-1)

    with pytest.raises(
        ValueError, match=r"rollouts\.states is there only for credits that ask for it\. Set needs_states"
    ):
        train(tiny_model, **OFF_POLICY, arguments={"credits": [Forgetful()]})
