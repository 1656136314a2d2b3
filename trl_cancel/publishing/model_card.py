"""The model card: TRL's, with what was trained how, what came out and whom to cite."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment, StrictUndefined
from transformers import ProcessorMixin, TrainingArguments
from trl import GRPOConfig

from .. import playground
from ..config import CancelGRPOConfig
from ..diagnostics.reports.curves import first_tenth, last_tenth
from ..diagnostics.reports.runs import Run
from ..evaluation import Evaluation
from ..evaluation.callback import steps_trained
from ..evaluation.result import shown
from ..evaluation.scoring import chats
from ..methods import METHODS
from ..methods.method import ActiveMethod
from ..running.secrets import without_secrets
from ..texts import markdown, plain, python_string, write_text
from ..upstream.trl import get_config_model_id
from ..version import __version__
from .active_methods import cited


Trainer = Any  # a `CancelGRPOTrainer`, which writes cards and so cannot be imported here
FILE = "README.md"
# Of the many settings of transformers, those that decide what is learned; the others may hold paths and secrets.
OPTIMIZATION = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)
# Of TRL's, those that say where something is.
PLACES = (
    "vllm_server_",
    "vllm_group_",
    "log_",
    "chat_template_path",
    "trust_remote_code",
    "model_init_kwargs",
    "hub_",
)
METRICS = (
    "reward",
    "rewards/",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "kl",
    "cancel/",
    *dict.fromkeys(metric for method in METHODS for metric in method.logs),
    "shift/",
)
LIBRARIES = {"trl-cancel": "trl-cancel", "PEFT": "peft", "bitsandbytes": "bitsandbytes", "vLLM": "vllm"}
ADAPTER_SETTINGS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def complete_model_card(
    trainer: Trainer, model_name: str | None, datasets: Sequence[str], base_license: str | None = None
) -> None:
    """
    Rewrites the card that TRL has just written, keeping its metadata, links to trackers, versions and citation.

    Args:
        trainer ([`CancelGRPOTrainer`]):
            The trainer.
        model_name (`str`, *optional*):
            Name of the model; that of the output folder if not given.
        datasets (`Sequence[str]`):
            Names of the training data; those that are not of the Hub are not named.
        base_license (`str`, *optional*):
            License of the base model.
    """
    path = Path(str(trainer.args.output_dir)) / FILE
    card = ModelCard.load(path)
    model_name = model_name or path.parent.absolute().name
    subject = _Subject.of(trainer)
    named = [name for name in map(hub_id, datasets) if name]
    card.text = _render(trainer, model_name, subject, named, _sections(card.text))

    card.data.pop("licence", None)  # a placeholder of TRL's, under a name that the Hub does not know
    card.data.model_name = plain(model_name)
    card.data.base_model = subject.base_model
    card.data.license = base_license or _license_in(subject.base_folder)
    card.data.library_name = "peft" if subject.adapter else "transformers"
    if subject.adapter and subject.base_model:
        card.data.base_model_relation = "adapter"
    card.data.pipeline_tag = "image-text-to-text" if subject.sees_images else "text-generation"
    card.data.datasets = named or None
    card.data.tags = sorted({*(card.data.tags or ()), *(["lora"] if subject.adapter == "LoRA" else [])})
    card.data.eval_results = list(_eval_results(_evaluations(trainer))) or None
    write_text(path, str(card))


def hub_id(name: str | None) -> str | None:
    """A name if it can be one of the Hub's, `None` for what is on this machine."""
    if not name or name in playground.CHECKPOINTS or Path(name).exists() or not HUB_ID.fullmatch(name):
        return None
    return name


def datasets_of(dataset: Any) -> list[str]:
    """The Hub's data sets that a loaded data set says it comes from."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = (re.match(r"hf://datasets/([^@]+)@", source) for source in sources)
    return list(dict.fromkeys(match[1] for match in found if match))


@dataclass(frozen=True)
class _Subject:
    """
    What the card is about.

    Args:
        base_model (`str`, *optional*):
            Hub id of the model that training started from.
        base_folder (`Path`, *optional*):
            Its folder, where it is a local one. Never written into the card.
        adapter (`str`, *optional*):
            Kind of adapter, where only that was trained.
        chats (`bool`):
            Whether it has a chat template.
        sees_images (`bool`):
            Whether it takes images.
    """

    base_model: str | None
    base_folder: Path | None
    adapter: str | None
    chats: bool
    sees_images: bool

    @classmethod
    def of(cls, trainer: Trainer) -> "_Subject":
        model = trainer.accelerator.unwrap_model(trainer.model)
        name = get_config_model_id(model.config)
        processor: Any = trainer.processing_class
        return cls(
            base_model=hub_id(name),
            base_folder=Path(name) if name and Path(name).is_dir() else None,
            adapter=_adapter_config(model)["peft_type"] if is_peft_model(model) else None,
            chats=chats(processor),
            sees_images=isinstance(processor, ProcessorMixin),
        )

    @property
    def base(self) -> str:
        if self.base_model:
            return f"[{self.base_model}](https://huggingface.co/{self.base_model})"
        if self.base_folder and self.base_folder.resolve() == playground.CHECKPOINT.resolve():
            return "the playground model of trl-cancel"
        return "a model that is not on the Hub"

    def quick_start(self, model_id: str) -> str:
        """Code that loads the model and asks it something."""
        auto, library = ("AutoModelForCausalLM", "transformers")
        if self.sees_images:
            auto = "AutoModelForImageTextToText"
        elif self.adapter:
            auto, library = ("AutoPeftModelForCausalLM", "peft")
        processor = "AutoProcessor" if self.sees_images else "AutoTokenizer"
        imports = (
            f"from transformers import {auto}, {processor}"
            if library == "transformers"
            else f"from {library} import {auto}\nfrom transformers import {processor}"
        )
        ask = (
            'messages = [{"role": "user", "content": question}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ").to(model.device)"
            if self.chats
            else 'inputs = tokenizer(question, return_tensors="pt").to(model.device)'
        )
        return "\n".join(
            [
                imports,
                "",
                model_line(model_id),
                f"tokenizer = {processor}.from_pretrained(model_id)",
                f'model = {auto}.from_pretrained(model_id, device_map="auto")',
                "",
                'question = "What is 17 + 25?"',
                ask,
                "output = model.generate(**inputs, max_new_tokens=256)",
                'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
            ]
        )


def model_line(model_id: str) -> str:
    """The line of the quick start that names the model."""
    return f"model_id = {python_string(model_id)}"


def rename_in_card(path: Path, model_id: str) -> None:
    """Makes the quick start of a card load `model_id`."""
    text = path.read_text(encoding="utf-8")
    renamed = re.sub(r'^model_id = ".*"$', lambda _: model_line(model_id), text, count=1, flags=re.MULTILINE)
    if renamed != text:
        write_text(path, renamed)


def _render(trainer: Trainer, model_name: str, subject: _Subject, datasets: list[str], of_trl: dict[str, str]) -> str:
    source = files(__package__).joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    evaluations = _evaluations(trainer)
    rows = list(_evaluation_rows(evaluations))
    methods: list[ActiveMethod] = trainer.active_methods
    return template.render(
        model_name=markdown(model_name),
        adapter=subject.adapter,
        base=subject.base,
        datasets=" and ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets),
        quick_start=subject.quick_start(trainer.hub_model_id or trainer.args.hub_model_id or model_name),
        evaluations=rows,
        compared=any(row["first"] for row in rows),
        how_evaluated=list(_how_evaluated(evaluations)),
        badges="\n".join(re.findall(r"^\[<img .*$", of_trl.get("Training procedure", ""), re.MULTILINE)),
        methods=methods,
        explanation=plain(trainer.explain(), lines=True),
        settings=_settings(trainer),
        metrics=_metrics(trainer),
        steps=trainer.state.global_step,
        best=steps_trained(trainer),
        criterion=_cell(trainer.args.metric_for_best_model),
        versions=_versions(of_trl.get("Framework versions", ""), trainer),
        papers=cited(methods),
        trl_citation=_last_block(of_trl.get("Citations", "")),
    )


# What TRL has written


def _sections(text: str) -> dict[str, str]:
    """A Markdown text by its headings."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _last_block(text: str) -> str:
    blocks = re.findall(r"```bibtex\n(.*?)\n```", text, re.DOTALL)
    return blocks[-1] if blocks else ""


def _versions(text: str, trainer: Trainer) -> dict[str, str]:
    return {**_own_versions(trainer), **dict(re.findall(r"^- (.+): (.+)$", text, re.MULTILINE))}


def _own_versions(trainer: Trainer) -> dict[str, str]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    used = {
        "trl-cancel": True,
        "PEFT": is_peft_model(model),
        "bitsandbytes": _quantization(model) is not None,
        "vLLM": trainer.args.use_vllm,
    }
    return {name: _installed(LIBRARIES[name]) for name, is_used in used.items() if is_used}


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # vLLM on a server, or this package from a folder
        return __version__ if package == "trl-cancel" else "on a server"


def _license_in(folder: Path | None) -> str | None:
    card = folder / FILE if folder else None
    if card is None or not card.is_file():
        return None
    return ModelCard.load(card, ignore_metadata_errors=True).data.license


# Settings


def _settings(trainer: Trainer) -> dict[str, str]:
    """What differs from TRL's defaults, without paths and secrets."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    of_transformers = {setting.name for setting in fields(TrainingArguments)} - set(OPTIMIZATION)
    defaults = {setting.name: setting for setting in (*fields(CancelGRPOConfig), *fields(GRPOConfig))}
    chosen: dict[str, Any] = {"reward functions": trainer.reward_func_names}
    for name, setting in sorted(defaults.items()):
        value = getattr(args, name)
        if name not in of_transformers and not name.startswith(PLACES) and value != _default(setting):
            chosen[name] = value
    if args.world_size > 1:
        chosen["processes"] = args.world_size
    if is_peft_model(model):
        chosen |= _adapter_config(model)
    chosen["quantization"] = _quantization(model)
    return {_cell(name): _cell(value) for name, value in without_secrets(chosen).items() if _is_showable(value)}


def _default(setting: Any) -> Any:
    if setting.default is not MISSING:
        return setting.default
    return setting.default_factory() if setting.default_factory is not MISSING else MISSING


def _is_showable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_showable(part) for part in value.values())
    if isinstance(value, (list, tuple, set)):
        return all(_is_showable(part) for part in value)
    if isinstance(value, str) and not isinstance(value, Enum):
        return not re.search(r"[/\\]|://|hf_\w{8}", value)  # neither a path nor an address nor a token
    return value is not None and isinstance(value, (bool, int, float, Enum))


def _cell(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (list, tuple, set)):
        value = ", ".join(map(str, sorted(value) if isinstance(value, set) else value))
    if isinstance(value, Mapping):
        value = ", ".join(f"{name}={part}" for name, part in value.items())
    return markdown(value)


def _adapter_config(model: Any) -> dict[str, Any]:
    config = model.peft_config[model.active_adapter]
    chosen = {name: getattr(config, name, None) for name in ADAPTER_SETTINGS}
    chosen["peft_type"] = str(getattr(config.peft_type, "value", config.peft_type)).replace("LORA", "LoRA")
    return {name: value for name, value in chosen.items() if value}


def _quantization(model: Any) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    config = config if isinstance(config, Mapping) else config.to_dict()
    if config.get("load_in_4bit"):
        return f"4 bits, {config.get('bnb_4bit_quant_type')}"
    return "8 bits" if config.get("load_in_8bit") else str(config.get("quant_method"))


# Results


def _metrics(trainer: Trainer) -> dict[str, tuple[str, str]]:
    """First and last tenth of what was logged, in the order of `METRICS`."""
    run = Run(Path(), trainer.state.global_step, trainer.state.log_history, {})
    logged = sorted(run.metrics())
    means = {}
    for wanted in METRICS:
        for name in logged:
            series = run.series(name) if name == wanted or (wanted.endswith("/") and name.startswith(wanted)) else None
            if series is not None:
                means[_cell(name)] = (f"{first_tenth(series):.4g}", f"{last_tenth(series):.4g}")
    return means


def _evaluations(trainer: Trainer) -> list[Evaluation]:
    """Those made, without those of later weights than the ones that the trainer went back to."""
    steps = steps_trained(trainer)
    if steps == trainer.state.global_step:
        return trainer.evaluations
    return [evaluation for evaluation in trainer.evaluations if (evaluation.step or 0) <= steps]


def _by_name(evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    named: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        named.setdefault(evaluation.name, []).append(evaluation)
    return named


def _evaluation_rows(evaluations: Sequence[Evaluation]) -> Iterator[dict[str, Any]]:
    for name, made in _by_name(evaluations).items():
        compared = [made[0], made[-1]] if len(made) > 1 else made
        for metric, estimate in made[-1].metrics.items():
            first = made[0].metrics.get(metric) if len(made) > 1 else None
            yield {
                "name": _cell(_shown(name)),
                "problems": made[-1].problems,
                "metric": _cell(metric),
                "steps": " and ".join("?" if one.step is None else str(one.step) for one in compared),
                "first": shown(first) if first else "",
                "last": shown(estimate),
            }


def _how_evaluated(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    for name, made in _by_name(evaluations).items():
        settings = {key: value for key, value in without_secrets(made[-1].settings).items() if _is_showable(value)}
        if settings:
            yield f"{_cell(_shown(name))}: {_cell(settings)}."


def _eval_results(evaluations: Sequence[Evaluation]) -> Iterator[EvalResult]:
    """The last evaluation on each data set, in the form that the Hub shows."""
    for name, made in _by_name(evaluations).items():
        for metric, estimate in made[-1].metrics.items():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=plain(_shown(name)),
                dataset_name=plain(_shown(name)),
                metric_type=plain(metric),
                metric_name=plain(metric),
                metric_value=round(estimate[0], 4),
            )


def _shown(name: str) -> str:
    """A name of a data set without the folders of this machine."""
    return hub_id(name) or Path(name).name
