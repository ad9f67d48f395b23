"""No secret of a user's reaches the store: not in the configuration, and not in a message."""

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from launcher.data.data import build
from launcher.start import check
from tests.material import Workshop
from trainer.config import Config, assignment, override, parse_config
from trainer.config.secrets import has_credentials, masked, names_secret, refuse_secrets, without_credentials
from trainer.errors import ConfigError
from trainer.run.folder import changes

ENV_VARS = "cluster.ray.runtime_env.env_vars"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Workshop(tmp_path_factory.mktemp("secrets")).config("mine")


@pytest.mark.parametrize(
    ("setting", "value", "way"),
    [
        (f"{ENV_VARS}.HF_TOKEN", "hidden", "ray start"),
        (f"{ENV_VARS}.my-api-key", "hidden", "ray start"),
        (f"{ENV_VARS}.AWS_ACCESS_KEY_ID", "hidden", "ray start"),
        (f"{ENV_VARS}.DBPASSWORD", "/hidden", "ray start"),
        (f"{ENV_VARS}.SECRET_OF_THE_HUB", "hidden", "ray start"),
        (f"{ENV_VARS}.HUB", "hf_hiddenhiddenhiddenhiddenhiddenhidden", "ray start"),
        ("cluster.ray.runtime_env.pip", "[--extra-index-url, 'https://me:hidden@host/simple']", "ray start"),
        ("cluster.ray.runtime_env.pip", "['git+https://hidden@github.com/a/b']", "ray start"),
        ("cluster.ray.runtime_env.image_uri", "https://me:hid/den@host/image", "ray start"),
        ("cluster.slurm.setup", "[module load cuda, export WANDB_API_KEY=hidden]", "sbatch passes on"),
        ("cluster.slurm.setup", "['export HF_TOKEN=\"hidden\"; true']", "sbatch passes on"),
        ("cluster.slurm.setup", "[hf auth login --token hidden]", "sbatch passes on"),
        ("cluster.slurm.extra", "['--export=ALL,HF_TOKEN=hidden']", "sbatch passes on"),
        ("cluster.slurm.container", "[docker, run, -e, HF_TOKEN=hidden]", "sbatch passes on"),
        ("cluster.slurm.container", "[apptainer, exec, --docker-password, hidden]", "sbatch passes on"),
        ("cluster.slurm.container", "[apptainer, exec, --env=HF_TOKEN=hidden]", "sbatch passes on"),
        ("cluster.slurm.setup", f"[wandb login {'0123456789abcdef' * 2}01234567]", "sbatch passes on"),
        ("cluster.slurm.setup", f"[wandb login --relogin {'0123456789abcdef' * 2}01234567]", "sbatch passes on"),
        ("cluster.slurm.setup", "['curl -su me:hidden https://host/a']", "sbatch passes on"),
        ("cluster.slurm.setup", "['curl https://host/a \\\n --user \"me:hidden\"']", "sbatch passes on"),
        ("cluster.slurm.setup", "['curl -H \"PRIVATE-TOKEN: hidden\" https://host']", "sbatch passes on"),
        ("cluster.slurm.setup", "['curl -H \"Authorization: Basic hiddenhidden\" https://host']", "sbatch passes on"),
        ("cluster.slurm.setup", "[docker login -u me -p hidden]", "sbatch passes on"),
        ("cluster.slurm.setup", "[sshpass -p hidden ssh host]", "sbatch passes on"),
        ("cluster.slurm.setup", "[export MYSQL_PWD=hidden]", "sbatch passes on"),
        (f"{ENV_VARS}.DB_PASS", "hidden", "ray start"),
        (f"{ENV_VARS}.AWS_SECRET_ACCESS_KEY", "/hidXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY9", "ray start"),
        ("cluster.slurm.setup", "[export S3_KEY=/hidXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY9]", "sbatch passes on"),
        ("run.store", "s3://AKIA:hidden@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
        ("model.base", "https://host/model?X-Amz-Signature=hidden", "AWS_SECRET_ACCESS_KEY"),
        ("data.train", "[{path: 'az://container/rows.jsonl?sv=2022&sig=hidden'}]", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_setting_with_a_secret_is_refused_with_the_way_to_pass_it(
    config: Config, setting: str, value: str, way: str
) -> None:
    with pytest.raises(ConfigError, match=way) as caught:
        refuse_secrets(override(config, f"{setting}={value}"))
    assert str(caught.value).startswith(setting)
    assert "looks like a secret" in str(caught.value)
    assert "hid" not in str(caught.value)
    assert "0123" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        (f"{ENV_VARS}.TOKENIZERS_PARALLELISM", "'false'"),
        (f"{ENV_VARS}.HF_TOKEN_PATH", "/shared/token"),
        (f"{ENV_VARS}.GOOGLE_APPLICATION_CREDENTIALS", "/etc/keys/me.json"),
        (f"{ENV_VARS}.HF_TOKEN", "'${HF_TOKEN}'"),
        (f"{ENV_VARS}.HF_HUB_DISABLE_IMPLICIT_TOKEN", "'1'"),
        (f"{ENV_VARS}.NCCL_IB_PKEY", "'0x7fff'"),
        ("cluster.slurm.setup", "['export HF_TOKEN=$(cat ~/.hf_token)', 'export MY_KEY=\"$OTHER\"']"),
        ("cluster.slurm.container", "[apptainer, exec, --nv, 'docker://user@host:5000/image@sha256']"),
        ("cluster.slurm.setup", "['wandb login $WANDB_API_KEY', 'wandb login \"$(cat ~/.wandb)\"', wandb offline]"),
        ("cluster.slurm.setup", "['curl -u \"me:$PASSWORD\" https://host', 'curl -fsSL https://host:80/a', cd a:b]"),
        (
            "cluster.slurm.setup",
            "['curl -O https://host/a', 'docker run -u 1000:1000 -p 80:80 image', ssh login -p 22]",
        ),
        ("cluster.slurm.setup", "['curl -H \"X-Token: $TOKEN\" https://host', 'docker login -u me --password-stdin']"),
        ("cluster.slurm.container", "[apptainer, exec, --pwd, work, --pass, three]"),
        (f"{ENV_VARS}.MY_KEY", "/home/somebody/Projects/keys/mine12345678"),  # 40 characters, and a path all the same
        ("cluster.ray.address", "http://head:8265"),
        ("cluster.ray.runtime_env.pip", "['a @ git+ssh://git@host/b.git']"),
        ("model.base", "hf-internal/tiny_token_model"),
    ],
)
def test_what_only_says_where_a_secret_is_or_sounds_like_one_is_allowed(
    config: Config, setting: str, value: str
) -> None:
    refuse_secrets(override(config, f"{setting}={value}"))


SETUP = [
    "export WANDB_API_KEY=${WANDB_API_KEY:-hidden}",
    ": ${HF_TOKEN:=hidden}",
    "export HF_TOKEN=\\\nhidden",
    "HF_TOKEN+=hidden",
    "aws configure set aws_secret_access_key hidden",
    "aws configure set profile.x.aws_access_key_id 'hidden'",
    "echo 'machine api.wandb.ai login user password hidden' > ~/.netrc",
    "printf 'machine h\\n login me\\n password hidden' > ~/.netrc",
    "cat > env.sh <<EOF\nexport HF_TOKEN=hidden\nEOF",
    "cat <<EOF > ~/.aws/credentials\naws_secret_access_key = hidden\nEOF",
    'echo \'{"token": "hidden"}\' > a.json',
    "curl -sSLu me:hidden https://h",
    "curl --header 'Authorization: token hiddenhidden' h",
    "git config http.extraheader 'AUTHORIZATION: hiddenhidden'",
    "huggingface-cli login --add-to-git-credential --token hidden",
    "wandb login --host=https://h local-0123456789hidden0123",
    "setenv HF_TOKEN hidden",
    "set -x HF_TOKEN hidden",
    "read HF_TOKEN <<< hidden",
    "echo hidden | docker login -u me --password-stdin",
    "gh auth login --with-token <<< hidden",
    "printf %s hidden > $HF_TOKEN_PATH",
    "rclone config create r s3 secret_access_key hidden",
    "mc alias set m http://h me hidden",
    "mysql -phidden",
    "openssl enc -pass pass:hidden",
    "vault login hidden",
    "ngc config set apikey hidden",
    "export HF_TOKEN=$(echo hidden | base64 -d)",
    "export HF_TOKEN=`printf '%s' hidden`",
    'hf auth login --token "$(base64 -d <<< hidden)"',
    "read HF_TOKEN <<EOF\nhidden\nEOF",
    "cat > ~/.cache/huggingface/token <<'EOF'\nhidden\nEOF",
    "echo -n hidden | tee ~/.cache/huggingface/token",
    "echo '  password hidden' >> ~/.netrc",
    "kinit me <<< hidden",
    "SSHPASS=hidden sshpass -e ssh h",
    "redis-cli -h host -a hidden ping",
    "unzip -q -Phidden x.zip",
    "smbclient //h/s -U me%hidden",
    "dvc remote modify --local r secret_access_key hidden",
    "npm config set //r/:_authToken hidden",
    "twine upload -u me -p hidden dist/*",
    "curl --oauth2-bearer hidden https://h",
    "export X=nvapi-hiddenhiddenhiddenhidden",
    "export X=eyJhiddenhidden.eyJhiddenhidden.hiddenhidden",
]
HARMLESS = [
    "export HF_TOKEN=${HF_TOKEN:-$(cat ~/.token)}",
    "export HF_TOKEN=${HF_TOKEN:?set it}",
    "export X=${HF_TOKEN:-/run/secrets/token.txt}",
    "echo ${HF_TOKEN:+set}",
    '[ -n "${HF_TOKEN-}" ]',
    "aws configure set region us-east-1",
    'aws configure set aws_secret_access_key "$SECRET"',
    "cat > env.sh <<EOF\nexport HF_TOKEN=$HF_TOKEN\nEOF",
    "machine=$(hostname)",
    "wandb login --host https://h",
    'huggingface-cli login --token "$(cat ~/.t)"',
    "setenv HF_TOKEN $TOKEN",
    "read -s HF_TOKEN",
    "docker login -u me --password-stdin < ~/.pw",
    "vault login -method=aws",
    'printf "%s" "$TOKEN" > ~/.cache/huggingface/token',
    "python train.py --max-tokens 5",
    'export HF_TOKEN="$(vault kv get -field=token secret/hf)"',
    "export HF_TOKEN=$(base64 -d ~/.t || exit)",
    'export HF_TOKEN=$(echo "$LINE" | cut -d: -f2)',
    "read -r HF_TOKEN <<EOF\n$LINE\nEOF",
    'echo "the key is in ~/.t"',
    "kinit -k -t ~/k.keytab me",
    "srun -p gpu -k hostname",
    "unzip -o x.zip",
]


@pytest.mark.parametrize("line", SETUP)
def test_a_secret_in_a_line_of_a_jobs_setup_is_refused_wherever_a_shell_takes_one(config: Config, line: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.slurm\.setup: .* looks like a secret") as caught:
        refuse_secrets(override(config, assignment("cluster.slurm.setup", ["module load cuda", *line.split("\n")])))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("line", HARMLESS)
def test_a_line_that_reads_its_secret_elsewhere_is_allowed(config: Config, line: str) -> None:
    refuse_secrets(override(config, assignment("cluster.slurm.setup", ["module load cuda", *line.split("\n")])))


def test_settings_are_kept_without_the_secrets_of_an_earlier_version(config: Config) -> None:
    tree = override(
        config,
        f"{ENV_VARS}={{HF_TOKEN: hidden, OTHER: shown}}",
        "cluster.slurm.setup=[module load cuda, export WANDB_API_KEY=hidden]",
        "data.train=[{path: 'az://container/rows.jsonl?sv=2022&sig=hidden'}, {path: shown.jsonl}]",
    ).model_dump(mode="json")
    kept = masked(tree)
    assert "hidden" not in json.dumps(kept)
    assert kept["cluster"]["ray"]["runtime_env"]["env_vars"]["OTHER"] == "shown"
    assert kept["data"]["train"][1] == tree["data"]["train"][1]
    assert {name for name in tree if kept[name] != tree[name]} == {"cluster", "data"}
    parse_config(yaml.safe_dump(kept))


def test_a_secret_that_is_no_longer_there_is_named_and_not_shown(config: Config) -> None:
    old = override(config, f"{ENV_VARS}.HF_TOKEN=hidden")
    for before, after in ((old, config), (config, old)):
        (change,) = changes(before.model_dump(mode="json"), after.model_dump(mode="json"))
        assert change.setting == f"{ENV_VARS}.HF_TOKEN"
        assert "hidden" not in change.sentence()
        assert "looks like a secret" in change.sentence()


def test_no_command_that_writes_to_the_store_writes_a_secret(config: Config, tmp_path: Path) -> None:
    config = override(config, f"run.store={tmp_path / 'store'}", f"{ENV_VARS}.HF_TOKEN=hidden")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="HF_TOKEN"):
            check.check(config, resume=resume)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        build(config, dry_run=False, log=print)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("url", "without"),
    [
        ("https://me:hidden@host:8080/a/b.git", "https://host:8080/a/b.git"),
        ("https://hidden@host/a.git", "https://host/a.git"),
        ("https://me:hid@den@host/a", "https://host/a"),
        ("https://me:hid/den@host/a", "https://host/a"),
        ("https://host/a?token=hidden#x", "https://host/a"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("ssh://git@host/a.git", "ssh://host/a.git"),
        ("git@host:a/b.git", "git@host:a/b.git"),
        ("/srv/a.git", "/srv/a.git"),
        ("cannot GET https://host/a?sig=hidden: 403", "cannot GET https://host/a 403"),
    ],
)
def test_a_url_is_shown_without_its_credentials(url: str, without: str) -> None:
    assert without_credentials(url) == without
    assert not has_credentials(without)


def test_names_of_secrets() -> None:
    for name in (
        "KEY",
        "API_KEY",
        "apikey",
        "TOKEN",
        "HF_TOKEN_2",
        "db-password",
        "CLIENT_SECRET",
        "AWS_ACCESS_KEY_ID",
        *("SSH_KEYS", "MY_SECRETS", "GPG_PASSPHRASE", "MYSQL_PASSWD", "X_CREDENTIAL", "GOOGLE_CREDENTIALS"),
        *("CURL_BEARER", "SSHPASS", "DB_PWD", "SMTP_PASS", "SECRET_NAME"),
    ):
        assert names_secret(name), name
    for name in ("", "123", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "KEYBOARD", "TOKEN_FILE", "UCX_IB_PKEY"):
        assert not names_secret(name), name
    for name in ("TOKEN_DIR", "KEY_PATH", "TOKEN_URL", "KEY_MODE", "password-stdin", "PWD", "pass"):
        assert not names_secret(name), name


REMOVED = "(removed, as it looks like a secret)"


@pytest.mark.parametrize(
    "token",
    [
        *("hf_" + "a" * 34, "ghp_" + "a" * 36, "ghs_" + "a" * 36, "github_pat_" + "a" * 22, "glpat-" + "a" * 20),
        *("sk-" + "a" * 40, "sk-proj-" + "a-" * 20, "sk-ant-" + "a-" * 20, "xoxb-1234567890", "xoxp-1234567890"),
        *("AKIA" + "A" * 16, "ASIA" + "A" * 16, "AIza" + "a" * 35, "dapi" + "0" * 32, "npm_" + "a" * 36, "r8_" + "a" * 37),
        *("pypi-" + "a" * 60, "nvapi-" + "a" * 40, "AGE-SECRET-KEY-1A", "wandb_v1_" + "a" * 40),
        *("-----BEGIN RSA PRIVATE KEY", "-----BEGIN PRIVATE KEY", "Bearer " + "a" * 16, "AccountName=a;AccountKey=a"),
        *("eyJ" + "a" * 10 + ".eyJ" + "b" * 10 + "." + "c" * 10, "authorization: Basic " + "a" * 8),
    ],
)  # fmt: skip
def test_a_token_is_known_by_its_form_wherever_it_stands(token: str) -> None:
    given = {
        "run": {"name": f"see {token} there", "other": "see there"},
        "beside": [8, None, [f"see {token}"], ["see"]],
    }
    assert masked(given) == {"run": {"name": REMOVED, "other": "see there"}, "beside": [8, None, [REMOVED], ["see"]]}


@pytest.mark.parametrize(
    "line",
    [
        *("mysqldump -phidden db", "mariadb -phidden", "7z x -phidden a.7z", "7za x -phidden a.7z", "zip -Phidden a.zip b"),
        *("ldapsearch -x -w hidden", "openssl enc -aes256 -k hidden", "openssl rsa -passin pass:hidden -in a"),
        *("openssl rsa -passout pass:hidden", "mount.cifs //h/s /mnt -U me%hidden", "lftp -u me,hidden h"),
        *("podman login -p hidden r", "az login -u me -p hidden", "registry login -p hidden", "vault login hidden"),
        *("mc config host add m http://h me hidden", "gcloud x create api_key hidden", "gcloud x update db_pass hidden"),
        *("echo hidden | sudo -S ls", "gpg --passphrase-fd 0 <<< hidden", "echo h:5432:d:me:hidden > ~/.pgpass"),
        "machine h account me password hidden",
    ],
)  # fmt: skip
def test_a_word_that_a_program_takes_as_a_secret_is_removed(line: str) -> None:
    setup = {"slurm": {"setup": ["module load cuda", line]}, "ray": {"address": "auto"}}
    assert masked({"cluster": setup}) == {"cluster": {"slurm": {"setup": [REMOVED]}, "ray": {"address": "auto"}}}
    assert masked({"cluster.ray.runtime_env": line}) == {"cluster.ray.runtime_env": REMOVED}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        *(("https://hidden@host/a", True), ("http://hidden@host", True), ("s3://me:hidden@host", True)),
        *(("https://h/a?sig=b", True), ("https://h/a?x=1&X-Amz-Signature=b", True), ("https://h/a?AWSAccessKeyId=b", True)),
        *(("https://h/a?token=b", True), ("ssh://git@host/a", False), ("https://h/a?version=2", False)),
    ],
)  # fmt: skip
def test_a_url_has_credentials_by_its_user_and_its_query(url: str, expected: bool) -> None:
    assert has_credentials(f"from {url} on") is expected
    assert has_credentials(f"from https://host/a to {url}") is expected


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "--a",
        "a=",
        "a://b:",
        "curl -u ",
        "wandb login ",
        "curl a\\",
        "docker login -",
        "-----BEGIN A",
        "/.",
        "https://",
        " ",
        "sk-",
        "?a=",
        "$(",
    ],
)
def test_a_long_text_is_looked_through_quickly(config: Config, piece: str) -> None:
    text = piece * (200_000 // len(piece)) + "!"
    changed = config.model_copy(deep=True)
    changed.cluster.ray.runtime_env["env_vars"] = {"OTHER": text}
    began = time.process_time()
    with suppress(ConfigError):
        refuse_secrets(changed)
    without_credentials(text)
    assert time.process_time() - began < 5
