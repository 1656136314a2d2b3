"""Tokens and keys reach no file and no output; nothing is unpickled or run that was not asked for."""

import copy
import json
import re
from collections import OrderedDict, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, fields
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import GenerationConfig
from trl import DatasetMixtureConfig, ModelConfig

from trl_cancel import CancelGRPOConfig, DFPOConfig
from trl_cancel.cli import main
from trl_cancel.evaluation import EvaluationSettings
from trl_cancel.evaluation.models import EngineSettings
from trl_cancel.running.secrets import is_secret, quotable, without_secrets, without_tokens

from .runs import build


SECRETS = {"hub_token": "hf_SECRETOFTHEHUB", "model_init_kwargs": {"token": "hf_SECRETOFTHEMODEL"}}
ENVIRONMENT = {
    "HF_TOKEN": "hf_SECRETOFTHEENVIRONMENT",
    "WANDB_API_KEY": "SECRETOFWANDB" + "0" * 27,
    "OPENAI_API_KEY": "sk-SECRETOFANOTHER",
}
PACKAGE = Path(__file__).parents[1] / "trl_cancel"


def files_with(text, folder):
    return [path.name for path in Path(folder).rglob("*") if path.is_file() and text in path.read_bytes()]


def config(folder, **settings):
    return CancelGRPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)


def test_secrets_stay_in_memory(tmp_path):
    args = config(tmp_path, **copy.deepcopy(SECRETS))
    for other in (copy.copy(args), copy.deepcopy(args)):
        assert other.hub_token == SECRETS["hub_token"]
        assert other.model_init_kwargs == SECRETS["model_init_kwargs"]
    torch.save(args, tmp_path / "training_args.bin")
    assert not files_with(b"SECRET", tmp_path)
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert again.hub_token is None
    assert (again.learning_rate, again.layout) == (args.learning_rate, args.layout)
    assert "SECRET" not in args.to_json_string() + str(args.to_sanitized_dict())
    assert args.hub_token == SECRETS["hub_token"]


SECRET_NAMES = """
    token hub_token hf.token HF_TOKEN slackToken my_token access_tokens auth_token aws_session_token new_hub_token
    api_key API-Key apiKey openai_api_key openai_key OPENAI_KEY wandb_key WANDB_API_KEY my-key ssh_key privateKey
    AWS_ACCESS_KEY_ID aws_secret_access_key github_pat my_pat pat password db_passwd userPassword client_secret mySecret
    credentials authorization creds db_creds DB_PASS pass userPass pw root_pw passkey pass_phrase passWord
    openaikey wandbkey sshkey OPENAIKEY APIkey myopenaiapikey hftoken dbpass rootpw token2 token_2 api_key_prod key2
    openai_key_3 cookie Cookie headers.Cookie session_cookies csrftoken X-CSRF-Token sessionid session_id
    key KEY storage_options.key PIN card_pin otp salt signature X-Signature sas azure_sas auth http_auth basicauth
    slack_webhook webhook_url discordwebhook
    pin_code PIN-Code pincode pinNumber access_code otp_code sid connect.sid TWILIO_SID sig X-Sig login dbLogin
    private_pem privatePem seed_phrase mnemonic
    totp_seed otpSeed recovery_codes recovery_code backupCodes join_code invite_code ssh_private RSA_PRIVATE pkcs12 pfx
    fernet fernet_key hmac_key tkn hf_tkn passwort dbPasswort Kennwort mot_de_passe motDePasse contraseña senha
"""
PLAIN_NAMES = """
    tokenizer tokenizer_name max_tokens num_tokens tokens eos_token pad_token pad_token_id bos_token image_token
    decoder_start_token_id end_of_turn_token think_token stop_tokens additional_special_tokens token_type_ids keys
    keyboard monkey turkey key_value num_key_value_heads key_proj sort_key primary_key public_key prompt_key reward_key
    path pattern patience patch compat dispatch secretary author include_num_input_tokens_seen
    pass_threshold pass_at_k pass@1 passes forward_pass bypass compass whiskey hockey hotkey keyword key_padding
    token_ids attn_implementation pin_memory dataloader_pin_memory spin salted saltiness signature_columns
    input_signature sasquatch authors authority auth_type session session_name cookiecutter webhook_name pwm SESSION user_session
    code error_code code_prompt pin_memory_code sigma sign side sidecar inside signal pem cert login_url relogins
    seed data_seed seeds codes language_code join private access_type hf_type tok tokens_seed pkcs12_path eos_tkn hmac
    password_strength_reward secret_word_rewards token_length password_policy passwordRegex hashing_key routingKey
    private_dataset phrase stop_tokens api_version session_keys_per_step
"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names_of_secrets(name):
    assert without_secrets({name: "abc"}) == {name: None}
    assert without_secrets({"a": [({name: "abc"},)]}, "***") == {"a": [({name: "***"},)]}
    assert without_tokens(f"got {name}='abc' here") == f"got {name}='***' here"


@pytest.mark.parametrize("name", PLAIN_NAMES.split())
def test_names_of_what_is_no_secret(name):
    assert without_secrets({name: "abc"}) == {name: "abc"}
    assert without_tokens(f"got {name}='abc' here") == f"got {name}='abc' here"


def configurations(kind=trl.GRPOConfig):
    """A class and all that are derived from it, but in the tests."""
    derived = {kind}.union(*(configurations(other) for other in kind.__subclasses__()))
    return {other for other in derived if not other.__module__.startswith("tests.")}


USUAL = {
    "model_init_kwargs": {
        "attn_implementation": "sdpa", "dtype": "bfloat16", "key_padding": "left", "num_key_value_heads": "2",
        "quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["key", "lm_head"]},
        "device_map": {"model.layers.0.self_attn.key": "cpu", "encoder.key": "cpu"},
    },
    "chat_template_kwargs": {
        "pad_token": "<pad>", "bos_token": "[BOS]", "eos_token": "</s>", "token_ids": ["a"], "max_tokens": "9",
        "tokenizer": "x", "pass_threshold": "1", "enable_thinking": False, "tools": [{"name": "f", "type": "key"}],
    },
    "generation_kwargs": {"stop_strings": ["pass"], "token_healing": True, "pad_token_id": 1, "begin_suppress": "a"},
    "vllm_server_base_url": "http://localhost:8000/v1",
    "vllm_structured_outputs_regex": "key=(a|b) token=.* pass: [0-9]+",
    "gradient_checkpointing_kwargs": {"use_reentrant": "no"},
    "lr_scheduler_kwargs": {"num_cycles": "2"},
    "optim_args": "betas=(0.9, 0.95), rank=64",
    "run_name": "key: auth=none, pass@1 of sk-learn",
    "hub_model_id": "me/webhooks",
}  # fmt: skip


@pytest.mark.parametrize("kind", [CancelGRPOConfig, DFPOConfig])
def test_usual_settings_stay_readable(kind, tmp_path):
    for settings in ({}, USUAL):
        args = vars(kind(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings))
        assert without_secrets(args) is args


def test_no_setting_is_taken_for_a_secret():
    settings = [*configurations(), ModelConfig, DatasetMixtureConfig, LoraConfig, EvaluationSettings, EngineSettings]
    names = {field.name for kind in settings for field in fields(kind)} | GenerationConfig().to_dict().keys()
    assert {name for name in names if is_secret(name)} == {"hub_token"}


def test_values_of_secrets():
    kept = {"use_auth_token": True, "api_key": None, "user_token": "<|user|>", "hub_token": "<HUB_TOKEN>"}
    assert without_secrets(kept) == kept
    hidden = {"password": "e", "credentials": {"user": "g"}, "secret": "", "api_key": b"x", "keys_of_api": ["a"]}
    assert without_secrets(hidden, "***") == {
        **dict.fromkeys(hidden, "***"),
        "secret": None,
        "keys_of_api": ["a"],
    }
    assert without_secrets(["sk-proj-" + "a1" * 10, "hf_" + "Ab1" * 8, "hf_run"]) == ["***", "***", "hf_run"]


def test_what_secrets_may_be():
    """Passwords may be numbers, those for a service a pair; what is no text opens nothing elsewhere."""
    numbers = {"PIN": 1234, "db_password": 5, "DB_PASS": 6}
    assert without_secrets(numbers, "***") == dict.fromkeys(numbers, "***")
    assert without_tokens(f"{json.dumps(numbers)} otp=12") == f"{json.dumps(dict.fromkeys(numbers, 0))} otp=0".replace(
        "0", "***"
    )
    assert without_secrets({"auth": ("user", "S"), "cookies": {"id": "S"}}, "***") == {"auth": "***", "cookies": "***"}
    assert without_tokens("requests.get(url, auth=('user', 'S'))") == "requests.get(url, auth=***)"
    assert without_tokens("got auth={'a': 'S'} with env={'MY_PW': 'S', 'a': 'b'}") == (
        "got auth=*** with env={'MY_PW': '***', 'a': 'b'}"
    )
    headers = {"headers": [("Cookie", "S"), ["X-Api-Key", "S"], ("Accept", "x")]}
    assert without_secrets(headers, "***") == {"headers": [("Cookie", "***"), ["X-Api-Key", "***"], ("Accept", "x")]}
    kept = {"pass": 3, "pass@1": (0.5, 0.6), "key": {"r": 8}, "auth": False, "salt": None, "target": ["key", "value"]}
    kept |= {"sort": {"key": str.lower}, "ranks": {"query": "int8", "key": "int8"}, "keys": ["cookie", "password"]}
    assert without_secrets(kept) is kept
    tensor = {"key": torch.ones(2), "auth_token": torch.ones(2)}
    assert without_secrets(tensor) is tensor


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://user:s3cr3t@host:8000/v1", "http://***@host:8000/v1"),
        ("https://s3cr3t@host/x?y=1", "https://***@host/x?y=1"),
        ("postgres://user:s3/c@r3t@host:5/db", "postgres://***@host:5/db"),
        (
            "https://host/x?token=s3cr3t&a=1&api_key=s3cr3t#key=s3cr3t",
            "https://host/x?token=***&a=1&api_key=***#key=***",
        ),
        ("https://host/x?X-Amz-Signature=s3cr3t;n=2", "https://host/x?X-Amz-Signature=***;n=2"),
        ("https://hooks.slack.com/services/T01/B01/s3cr3t", "https://hooks.slack.com/***"),
        (
            "https://discord.com/api/v10/webhooks/12/s3cr3t?wait=true",
            "https://discord.com/api/v10/webhooks/***?wait=true",
        ),
        ("https://me.webhook.office.com/webhookb2/s3cr3t", "https://me.webhook.office.com/***"),
        ("https://api.telegram.org/bot1:s3cr3t/send", "https://api.telegram.org/***"),
        ("http://chat.org:8065/hooks/s3cr3t1234567890", "http://chat.org:8065/hooks/***"),
        ("host=db user=me password=s3cr3t", "host=db user=me password=***"),
        ("run.py --api-key=s3cr3t --key=a", "run.py --api-key=*** --key=a"),
        ("user:s3cr3t@host:8000", "***@host:8000"),
        ("user:s3cr3t@my.host.org/x", "***@my.host.org/x"),
    ],
)
def test_addresses(address, shown):
    assert without_secrets({"base_url": address}) == {"base_url": shown}
    assert "s3cr3t" not in without_tokens(f"cannot reach {address}.")


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/a@b",
        "https://host/@me/x?max_tokens=3&sort=a",
        "https://docs.github.com/en/webhooks/using-webhooks/creating-webhooks",
        "https://github.com/me/hooks/blob/main/README.md",
        "https://slack.com/help",
        "beta1=0.9 pad_token=x",
        "git@github.com:a/b",
        "me@host.org",
        "runs/lr:3@0.01",
        "exp:lr@1e-4",
        "12:30@noon",
        "sk-learn-baseline_number_two",
    ],
)
def test_what_is_no_address_with_a_secret(text):
    assert without_secrets([text]) == [text]


LOOKS = ["S3CRET", "s3cr3t", "SECRET", "9f86d081884c7d659a2feaa0c55ad015", "aGVsbG8gd29ybGQ=", "Ab3-xY_9kLm2"]
VOCABULARY = [
    "<think>", "</think>", "[INST]", "<|im_end|>", "<0x0A>", "</s>", "Answer:", "ANSWER", "YES", "###", "\u0120the", "H2O",
    "Final answer", "question", "answer_1", "userName", "q_proj", "int8", "bfloat16", "word2vec", "seq2seq", "layers.10",
    "pass@1", "128k", "10th", "2024-05-01", "1e-4", "~/keys/openai.json", "id_ed25519", "", "fp16", "gpt-4o", "a b1C2d3e",
]  # fmt: skip


@pytest.mark.parametrize("name", ["keys", "tokens", "TOKENS", "spare_keys", "spare-tokens"])
def test_lists_of_secrets_and_of_words(name):
    """Under names that are both, what looks like a secret is one."""
    secrets = [look for look in LOOKS if look != "SECRET"]
    assert without_secrets({name: [*secrets, "<s>", 3]}, "***") == {name: ["***"] * len(secrets) + ["<s>", 3]}
    assert without_secrets({"a": ({name: {"openai": "S3CRET"}},)}) == {"a": ({name: {"openai": None}},)}
    assert without_secrets({name: ",".join(secrets)}) == {name: None}
    assert without_tokens(f"{name}=['S3CRET', 'word']") == f"{name}=['***', 'word']"
    for kept in ({name: VOCABULARY}, {name: [1, 0.5, None]}, {name: {"a": 1}}, {name: torch.ones(2)}, {name: 8}):
        assert without_secrets(kept) is kept
    data = {"stop_tokens": LOOKS, "batch_keys": LOOKS, "max_tokens": "S3CRET", "prompts_tokens": LOOKS}
    data["fingerprint of the prompts' tokens"] = LOOKS[3]
    assert without_secrets(data) is data


def test_a_session_is_a_secret_if_it_looks_like_one():
    for look in LOOKS:
        hidden = {"session": look, "SESSION": look, "nested": [{"user_session": [look]}]}
        assert "None" in repr(without_secrets(hidden))
        assert look not in repr(without_secrets(hidden))
    kept = {"session": "train-2", "SESSION": "exp12", "user_session": 4, "session_name": "S3CRET"}
    assert without_secrets(kept) is kept


FOLDERS = """
    hf_runs hf_models hf_cache hf_experiments2024 hf_baselineexperimentswithgrpo hf_run_Qwen3_seed42 sk-learn-run
    sk-learn-baselineexperiments1 sk-qwen2x5b-lr1e5-seed3 sk-learn-baseline-BalancedGroups xai-explanationsofrewards
    r8_experimentsofgroups2024 dapiexperiments20240501 SG.experimentsofgroups sk-2024-05-01-baselineexperiments
"""
MADE_UP = "Ab3xY9kLm2Qw8Zr5"
TOKENS = f"""
    hf_aBcDeFgHiJkLmN hf_abcdef1ghijkl hf_SECRETOFTHEHUB sk-{MADE_UP} sk-proj-{MADE_UP}_{MADE_UP} sk-0f1e2d3c4b5a69788796
    sk-ant-api03-{MADE_UP}-{MADE_UP}AA sk-or-v1-0f1e2d3c4b5a69788796 r8_{MADE_UP} dapi0f1e2d3c4b5a69788796 xai-{MADE_UP}
    nvapi-{MADE_UP} pplx-{MADE_UP} SG.{MADE_UP}.{MADE_UP} ya29.{MADE_UP} lsv2_pt_{MADE_UP}_0f1e2d3c4b dop_v1_{MADE_UP}
"""


@pytest.mark.parametrize("folder", FOLDERS.split())
def test_folders_are_no_tokens(folder):
    """In messages, or their advice could not be used, and among settings."""
    for text in (folder, f"output_dir=/x/{folder}: is a file", f"push it with trl-cancel push '/x/{folder}/a'"):
        assert without_tokens(text) == text
        assert without_secrets([text]) == [text]


@pytest.mark.parametrize("token", TOKENS.split())
def test_tokens_by_their_looks(token):
    for text in ("{0}", "is {0} one?", "/x/{0}", "{0}."):
        shown = text.format("***")
        assert without_tokens(text.format(token)) == shown
        assert without_secrets({"a": [text.format(token)]}) == {"a": [shown]}


KEY = "-----BEGIN {0}PRIVATE KEY{1}-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,AB\n\nMIIS3CRET\n-----END {0}"


@pytest.mark.parametrize("kind", [("", ""), ("RSA ", ""), ("OPENSSH ", ""), ("PGP ", " BLOCK")])
def test_private_keys_by_any_name(kind):
    """Whole, with the lines about how they are encrypted; certificates may be seen."""
    key = KEY.format(*kind)
    settings = {"pem": key, "cert": [key, key.encode()], "note": f"as {key}", "cut": key[:-12], "path": "S3.pem"}
    assert "S3CRET" not in repr(without_secrets(settings, "***"))
    assert without_secrets(settings)["path"] == "S3.pem"
    assert "S3CRET" not in without_tokens(key)
    public = {"cert": "-----BEGIN CERTIFICATE-----\nMIIxyz\n-----END CERTIFICATE-----", "raw": b"\xff\x00 PRIVATE"}
    assert without_secrets(public) is public


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a=1,token=S3CRET", "a=1,token=***"),
        ("auth: S3CRET", "auth: ***"),
        ("PIN: 1234", "PIN: ***"),
        ("Cookie: theme=dark", "Cookie: ***"),
        ("Authorization: Bearer word", "Authorization: ***"),
        ("x-api-key: word", "x-api-key: ***"),
        ("https://bucket.org/key/" + "9f86d081884c7d65", "https://bucket.org/key/***"),
        ("token=S3CRET,betas=(0.9,0.95)", "token=***,betas=(0.9,0.95)"),
        ("key = S3CRET, auth=hunter2 pin=1234", "key = S3CRET, auth=*** pin=***"),
        ("f(token=S3CRET) session=SECRET", "f(token=*** session=***"),
        ("host=db password='a S3CRET' user=me", "host=db password='***' user=me"),
        ("run.py --token S3CRET --password word -x", "run.py --token *** --password *** -x"),
        ("Cookie: a=S3CRET; b=S3CRET", "Cookie: ***"),
        ("GET /x\nAuthorization: Basic S3CRET\nAccept: y", "GET /x\nAuthorization: ***\nAccept: y"),
        ("curl -H 'X-Api-Key: S3CRET' http://host", "curl -H 'X-Api-Key: ***' http://host"),
        ("with Set-Cookie: S3CRET", "with Set-Cookie: ***"),
        ("db_password: S3CRET\ntoken: S3CRET", "db_password: ***\ntoken: ***"),
        ('{"token": "S3CRET", "PIN": 1234, "a": "b"}', '{"token": "***", "PIN": ***, "a": "b"}'),
        ("[{'name': 'api_key', 'value': 'S3CRET'}]", "[{'name': 'api_key', 'value': '***'}]"),
        (
            "[default]\naws_secret_access_key = S3CRET\nregion = a",
            "[default]\naws_secret_access_key = ***\nregion = a",
        ),
        ('password = "S3CRET"; PASSWORD =word, a = 1', 'password = "***"; PASSWORD =***, a = 1'),
        ("token = S3CRET password= S3CRET", "token = *** password= ***"),
        ("bearer S3CRET, BEARER hf_SECRET and Bearer S3CRET", "bearer *** BEARER *** and Bearer ***"),
        ("Authorization=Basic S3CRET== x", "Authorization=*** x"),
        ("authorization: basic S3CRET==", "authorization: ***"),
        ("curl -u me:S3CRET --proxy-user=me:word http://host", "curl -u *** --proxy-user=*** http://host"),
        ("['curl', '-u', 'me:S3CRET']", "['curl', '-u', '***']"),
        (
            "resume_from_checkpoint=/x/password=S3CRET/checkpoint-2",
            "resume_from_checkpoint=/x/password=***/checkpoint-2",
        ),
    ],
)
def test_secrets_within_texts(text, shown):
    assert without_secrets({"optim_args": text}) == {"optim_args": shown}
    assert without_secrets({"optim_args": shown}) == {"optim_args": shown}


@pytest.mark.parametrize(
    "text",
    [
        "rank=64,proj_type=std,token=word,key=user_name,pass=3,auth=none,token=<s>,key=0.5,token=,keys=None",
        "--key name --tokenizer gpt2 --pass 2 --token",
        "key: the column S3 of a table",
        "pass: [0-9]+ token: .* x-axis: time",
        "The token: S3CRET stands in a sentence",
        '{"token": "<s>", "key": "name", "max_tokens": "S3CRET", "api_key": 8, "sort_key": "S3CRET"}',
        "{'name': 'lr', 'value': 'S3CRET'}, {'name': 'token', 'value': 'word'}",
        "10:30 and https://host/cookie: no",
        "if password == b: password = config.password, a.token = b.get(S3CRET), key = row['key'], password= a=1",
        "the bearer of news, docker run -u 1000:1000 -u host.org:8000 -u http://a, python -u run.py a:b",
        "/data/key=S3CRET/token=word/rows",
        "s3://bucket/key/9f86d081884c7d659a2feaa0c55ad015/token/gs://secret/9f86d081884c7d65",
        "auth: v2run",
        "pin:3",
        "lr=1e-4,pin=3,auth=v2run,token=$HF_TOKEN,api_key=${API_KEY},password=<password>",
        "Cookie: chocolate chip",
        "Answer with Cookie: chocolate chip or Cookie: none",
        "Set Authorization: Bearer <token> and then Authorization: Bearer token",
    ],
)
def test_texts_that_name_no_secret(text):
    settings = {"optim_args": text}
    assert without_secrets(settings) is settings


@dataclass
class Header:
    name: str
    value: Any


def test_names_and_values_beside_each_other():
    """As lists of headers, of variables and of a command's arguments have them."""
    hidden = [
        {"name": "api_key", "value": "S3CRET"},
        {"key": "Authorization", "value": "word"},
        {"Name": "token", "Value": "S3CRET", "type": "env"},
        {"field": "PIN", "val": 1234},
        Header("X-Api-Key", "S3CRET"),
        ("token", "S3CRET"),
        ("Cookie", b"S3CRET"),
    ]
    shown = without_secrets({"headers": hidden, "args": ["run", "--api-key", "word", "--token", "S3CRET"]}, "***")
    assert repr(shown).count("***") == len(hidden) + 2
    assert not re.search("S3CRET|1234", repr(shown))
    assert shown["headers"][2] == {"Name": "token", "Value": "***", "type": "env"}
    kept = [
        {"name": "token", "value": "word"},
        {"name": "lr", "value": "S3CRET"},
        {"name": "pass@1", "value": 0.5},
        {"name": "api_key", "value": None},
        {"key": "name", "value": "S3CRET"},
        Header("pad_token", "S3CRET"),
        ["--tokenizer", "gpt2", "token", "S3CRET"],
        ["key", "value"],
        ("token", 3),
    ]
    assert without_secrets(kept) is kept


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("aws_secret_access_key = S3CRET", "aws_secret_access_key = ***"),
        ("password= 'S3CRET'.", "password= '***'."),
        ("Authorization=Basic S3CRET==", "Authorization=***"),
        ("bearer S3CRET", "bearer ***"),
        ("['-u', 'me:S3CRET']", "['-u', '***']"),
        (
            "resume_from_checkpoint=/x/password=S3CRET/checkpoint-2",
            "resume_from_checkpoint=/x/password=***/checkpoint-2",
        ),
        ("args=--password=S3CRET note='--password=S3CRET'", "args=--password=*** note='--password=***'"),
        ("a=" * 5000, "a=" * 5000),
        ("export HF_TOKEN=$TOKEN", "export HF_TOKEN=$TOKEN"),
        ("no /data/key=S3CRET/rows", "no /data/key=S3CRET/rows"),
    ],
)
def test_secrets_within_messages(text, shown):
    assert without_tokens(text) == shown


def test_users_of_commands_and_addresses_that_are_keys():
    args = ["curl", "-u", "me:S3CRET", "--user", "me:word"]
    assert without_secrets(args, "***") == ["curl", "-u", "***", "--user", "***"]
    kept = {
        "a": ["docker", "-u", "1000:1000", "-u", "note: a", "--user", "me", "x:y"],
        "http://host:80": 1,
        ("a", 2): 3,
    }
    assert without_secrets(kept) is kept
    hosts = {"https://u:S3CRET@h": 1, ("x://S3CRET@h", 0): 2, "https://u:0TH3R@h": 3, "a": 4}
    shown = {"https://***@h": 1, ("x://***@h", 0): 2, "https://***@h'": 3, "a": 4}
    assert list(without_secrets({"x": hosts})["x"].items()) == list(shown.items())
    assert without_secrets(defaultdict(list, hosts)) == shown
    assert without_secrets({"recovery_codes": [12345678, "ab"]}, "***") == {"recovery_codes": "***"}


def test_pairs_of_texts_are_headers_if_they_look_so():
    """By themselves, only with a value that is made up; in a list of pairs, with any."""
    hidden = [
        ["password", "hunter2"],
        ("PIN", "1234"),
        ["Authorization", "Basic X=="],
        ["Authorization", "Bearer S3CRET"],
    ]
    for pair in hidden:
        assert without_secrets({"a": pair}, "***") == {"a": type(pair)([pair[0], "***"])}
    assert without_secrets([("Cookie", "word"), ["Authorization", "Bearer word"], ["a", "b"]]) == [
        ("Cookie", None),
        ["Authorization", None],
        ["a", "b"],
    ]
    kept = [
        *(
            ["Password:", "User2:"],
            ["Authorization: ", "key: value"],
            ["secret", "agent"],
            ["secret", "a number of words"],
        ),
        *(["password", "token"], ["Authorization", "Bearer <token>"], [("auth", "none"), ("key", "value")]),
        ["run", "--password", "--user2"],
    ]
    for values in kept:
        settings = {"stop_strings": values}
        assert without_secrets(settings) is settings
    # Choices that read like arguments are taken for some.
    assert without_secrets({"guided_choice": ["password=abc1", "a=b"]}) == {"guided_choice": ["password=***", "a=b"]}


def test_schemas_stay_readable():
    """Those of tools and of structured outputs; what a parameter is by default may be a secret."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "minLength": 8, "title": "Password"},
        {"type": ["string", "null"], "enum": ["a", "b"]},
        {"$ref": "#/$defs/Password"},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        {"description": "what opens the door"},
        {"type": "object", "properties": {"token": {"type": "string"}}, "required": ["token", "pin"]},
    ]
    for kind in kinds:
        tool = {"name": "login", "parameters": {"properties": {"password": kind, "token": kind, "pin": kind}}}
        settings = {"tools": [{"type": "function", "function": tool}]}
        assert without_secrets(settings) is settings
    assert without_tokens(f"not {json.dumps({'password': kinds[0]})}") == f"not {json.dumps({'password': kinds[0]})}"
    with_default = {"properties": {"password": {"type": "string", "default": "S3CRET", "examples": ["S3CRET"]}}}
    assert without_secrets(with_default) == {
        "properties": {"password": {"type": "string", "default": None, "examples": None}}
    }
    assert "S3CRET" not in without_tokens(json.dumps(with_default))
    account = {"type": "service_account", "client": "S3CRET"}
    described = {"description": "a", "user": "S3CRET", "properties": {"password": "S3CRET"}}
    assert without_secrets({"credentials": account, "auth": described}, "***") == {
        "credentials": "***",
        "auth": {"description": "a", "user": "***", "properties": {"password": "***"}},
    }


def test_names_of_columns_and_fields():
    kept = {"column_names": {"key": "prompt_v2", "token": "t5", "password": "pw"}, "routing_key": "user_id"}
    assert without_secrets(kept) is kept
    assert without_secrets({"columns": {"key": "S3CRET"}, "a": {"hashing_key": "S3CRET"}}) == {
        "columns": {"key": None},
        "a": {"hashing_key": None},
    }


def test_names_that_say_little_without_a_value():
    for name in ("hf_access", "hf_tok", "hmac", "webhook_hmac"):
        assert without_secrets({name: "S3CRET"}) == {name: None}
        kept = {name: "read", "a": {name: "sha256"}}
        assert without_secrets(kept) is kept


class Pair(NamedTuple):
    address: str
    rest: Any


@dataclass(frozen=True)
class Service:
    url: str
    openai_key: str
    size: int = 3


def test_secrets_at_any_depth():
    service = Service("http://u:SECRET@host", "SECRET")
    settings = OrderedDict(a=(Pair("x://SECRET@host", {service}),), b=frozenset({"x://SECRET@host"}))
    settings["c"] = defaultdict(list, my_pat="SECRET", size=1)
    shown = without_secrets(settings)
    assert "SECRET" not in repr(shown)
    assert isinstance(shown, OrderedDict)
    assert shown["a"] == (Pair("x://***@host", {Service("http://***@host", None)}),)
    assert shown["c"].default_factory is list
    assert service.openai_key == settings["c"]["my_pat"] == "SECRET"
    plain = {"a": [1, {"size": Service("http://host", "")}], "b": torch.ones(2)}
    assert without_secrets({**plain})["b"] is plain["b"]
    assert without_secrets(plain["a"][1]["size"]).size == 3
    kept = {"a": [1, ("b", {"path": "c"})]}
    assert without_secrets(kept) is kept, "nothing is copied in vain"


@dataclass
class Derived(CancelGRPOConfig):
    """As a user writes it."""

    other: int = 5
    wandb_key: str | None = None
    services: list = field(default_factory=list)


@pytest.mark.parametrize("kind", [CancelGRPOConfig, DFPOConfig, Derived])
def test_secrets_are_not_printed(tmp_path, kind):
    args = kind(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **copy.deepcopy(SECRETS))
    for text in (repr(args), str(args), f"{args}"):
        assert "SECRET" not in text
        assert text.startswith(f"{kind.__name__}(")
        assert "symmetric_clip=False" in text
    assert ("other=5" in repr(args)) == (kind is Derived)
    assert args.model_init_kwargs == SECRETS["model_init_kwargs"]


def secretive(folder):
    return Derived(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        wandb_key="SECRET",
        vllm_server_base_url="http://user:SECRET@host:8000",
        model_init_kwargs={"proxies": {"https": "http://user:SECRET@proxy:3128"}},
        chat_template_kwargs={"my_pat": "SECRET", "nested": [("x://SECRET@host",)]},
        generation_kwargs={
            "extra": {"openai_key": "SECRET", "sshkey": "SECRET", "token2": "SECRET"},
            "creds": "SECRET",
        },
        services=[Service("http://u:SECRET@host", "SECRET")],
    )


def test_secrets_by_other_names_and_in_addresses(tmp_path):
    args = secretive(tmp_path)
    torch.save(args, tmp_path / "training_args.bin")
    assert not files_with(b"SECRET", tmp_path)
    assert "SECRET" not in repr(args)
    args.services = []  # which are no JSON
    for text in (args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict()), repr(args), str(args)):
        assert "SECRET" not in text
        assert "***@host:8000" in text
    assert (args.wandb_key, args.vllm_server_base_url) == ("SECRET", "http://user:SECRET@host:8000")
    assert args.chat_template_kwargs["nested"] == [("x://SECRET@host",)]


def test_processes_that_are_started_have_the_secrets(tmp_path):
    """What `multiprocessing` pickles is no file."""
    args = secretive(tmp_path)
    args.hub_token = "hf_SECRET"
    again = ForkingPickler.loads(ForkingPickler.dumps((args, {"nested": args})))
    assert type(again[0]) is Derived
    assert {**vars(again[0]), "distributed_state": 0} == {**vars(args), "distributed_state": 0}
    assert again[1]["nested"].hub_token == "hf_SECRET"


def test_tracebacks_and_messages_show_no_secret(tmp_path, monkeypatch, capsys):
    def fails(arguments):
        raise ConnectionError("The server cannot be reached at http://user:SECRET@host:8000/.")

    monkeypatch.setattr("trl_cancel.cli.explain.run", fails)
    assert main(["explain"]) == 1
    error = capsys.readouterr().err
    assert "ConnectionError: The server cannot be reached at http://***@host:8000/." in error
    assert "SECRET" not in error
    monkeypatch.undo()

    (tmp_path / "run.yaml").write_text("env: {1: x, OPENAI_KEY: SECRET}")
    assert main(["explain", "--config", str(tmp_path / "run.yaml")]) == 2
    playground = ["--model_name_or_path", "playground", "--dataset_name", "playground"]
    assert main(["eval", *playground, "--chat_template_kwargs", '{"my_pat": "SECRET"']) == 2
    assert main(["compare", "http://user:SECRET@host/run"]) == 2
    error = capsys.readouterr().err
    assert error.count("***") == 3
    assert "SECRET" not in error


def test_evaluations_and_probes_write_no_secret(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    template = json.dumps({"my_pat": "SECRET", "url": "x://SECRET@host"})
    common = ["--model_name_or_path", "playground", "--dataset_name", "playground", "--chat_template_kwargs", template]
    sizes = ["--num_problems", "2", "--num_samples", "0", "--max_completion_length", "8"]
    for _ in range(2):  # the second time it goes on from there
        assert main(["eval", *common, *sizes]) == 0
    assert main(["eval", *common[:-1], template.replace("SECRET", "OTHERSECRET"), *sizes]) == 0
    assert main(["probe", "residual", *common, "--probe_prompts", "4", "--max_completion_length", "64"]) == 0
    assert {"settings.json", "results.json", "probe.json"} <= {path.name for path in tmp_path.rglob("*")}
    assert not files_with(b"SECRET", tmp_path)
    assert "SECRET" not in "".join(capfd.readouterr())


def test_errors_that_quote_a_token_are_no_causes():
    inner, outer, plain = ValueError("b'Bearer hf_SECRET'"), RuntimeError("no connection"), OSError("no")
    outer.__context__ = inner
    assert quotable(outer) is quotable(inner) is None
    plain.add_note("of hf_SECRETOFTHEHUB")
    assert quotable(plain) is None
    assert quotable(OSError("no answer from http://user:SECRET@host")) is None
    assert isinstance(quotable(OSError("no")), OSError)


@pytest.mark.parametrize("kind", [trl.GRPOConfig, CancelGRPOConfig])
def test_a_token_that_was_read_from_a_file_is_stripped(tmp_path, kind):
    args = kind(str(tmp_path), use_cpu=True, bf16=False, hub_token="hf_token\n")
    assert CancelGRPOConfig.adopt(args).hub_token == "hf_token"


UNDER_OTHER_NAMES = {
    "auth": ["user", "SECRET"],
    "storage_options": {"key": "SECRET", "DB_PASS": "SECRET"},
    "headers": {"Cookie": "id=SECRET"},
    "hook": "https://hooks.slack.com/services/T0/B0/SECRET",
    "PIN": "SECRET",
    "pin_code": "SECRET",
    "SESSION": "SECRET",
    "tokens": ["SECRET1a"],
    "lines": ["Cookie: SECRET", "a=1,token=SECRET"],
    "env": [{"name": "api_key", "value": "SECRET"}],
}


def test_a_run_writes_no_secret(tmp_path, monkeypatch, capfd, caplog):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = {
        "model_name_or_path": "playground",
        "dataset_name": "playground",
        "output_dir": tmp_path / "run",
        "hub_token": SECRETS["hub_token"],
        "vllm_server_base_url": "http://user:SECRET@host:8000",
        "chat_template_kwargs": json.dumps({"my_pat": "SECRET", "size": 3, **UNDER_OTHER_NAMES}),
        "max_steps": 2,
        "save_steps": 1,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
    }
    assert main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]) == 0
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"training_args.bin", "trainer_state.json", "all_results.json", "README.md"} <= written
    assert not files_with(b"SECRET", tmp_path)
    assert "SECRET" not in "".join([*capfd.readouterr(), caplog.text])


MODEL_WITH_CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path(__file__).with_name("ran").touch()
(Path(r"FOLDER") / "ran").touch()
class CodedConfig(PretrainedConfig):
    model_type = "coded"
"""


def test_code_of_a_model_is_run_only_if_asked_for(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "coded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "coded", "auto_map": {"AutoConfig": "coded.CodedConfig"}}')
    (folder / "coded.py").write_text(MODEL_WITH_CODE.replace("FOLDER", str(tmp_path)))
    command = ["train", "--model_name_or_path", str(folder), "--dataset_name", "playground", "--report_to", "none"]
    command += [
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--num_generations",
        "4",
    ]
    command += ["--per_device_train_batch_size", "4"]
    assert main(command) != 0
    assert "trust_remote_code" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()
    with suppress(Exception):  # it is no language model
        main([*command, "--trust_remote_code", "true"])
    assert (tmp_path / "ran").exists()


def test_nothing_is_unpickled_or_run():
    forbidden = re.compile(
        r"\bpickle\b|\btorch\.load\(|os\.system|shell=True|(?<![.`])\b(eval|exec)\(|weights_only=False"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if forbidden.search(line)
    ]
    assert not found


def test_a_checkpoint_cannot_bring_code(tiny_model, tmp_path):
    """States of the optimizer are read as numbers: a pickle with something else in it is refused."""
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    build(tiny_model, **settings).train()
    torch.save({"state": Planted()}, tmp_path / "checkpoint-1/optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        build(tiny_model, **settings).train(resume_from_checkpoint=True)
    assert not Planted.called


class Planted:
    called: list[int] = []

    def __reduce__(self):
        return (plant, ())


def plant():
    Planted.called.append(1)
