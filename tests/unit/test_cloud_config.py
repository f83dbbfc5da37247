"""Cloud providers in the configuration, and where their keys come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from controlplane.cloud import CloudDrawing, CloudProvider, Dialect, ModelPrices, Thinking
from controlplane.cloud._keys import ApiKey, read_key
from controlplane.config import load_config
from rung.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
MODEL = """\
      - id: chat
        max_output_tokens: 8192
        usd_per_million_prompt_tokens: 0.5
        usd_per_million_completion_tokens: 2
"""


def _load(folder: Path, text: str) -> tuple[CloudProvider, ...]:
    path = folder / "rung.yaml"
    path.write_text(text)
    return load_config(path).cloud_providers()


@pytest.mark.parametrize(
    ("name", "url", "dialect", "variable"),
    [
        ("openai", "https://api.openai.com/v1", Dialect.OPENAI, "OPENAI_API_KEY"),
        ("anthropic", "https://api.anthropic.com/v1", Dialect.ANTHROPIC, "ANTHROPIC_API_KEY"),
        ("deepseek", "https://api.deepseek.com", Dialect.OPENAI, "DEEPSEEK_API_KEY"),
        (
            "google",
            "https://generativelanguage.googleapis.com/v1beta/openai",
            Dialect.OPENAI,
            "GEMINI_API_KEY",
        ),
    ],
)
def test_of_known_providers_only_the_models_are_written(
    tmp_path: Path, name: str, url: str, dialect: Dialect, variable: str
) -> None:
    (provider,) = _load(tmp_path, f"cloud:\n  - id: {name}\n    models:\n{MODEL}")

    assert (provider.base_url, provider.dialect, provider.api_key_env) == (url, dialect, variable)
    assert (provider.api_key_file, provider.daily_cap_usd) == (None, 5.0)
    (model,) = provider.models
    assert (model.id, model.provider, model.model) == (f"{name}/chat", name, "chat")
    assert model.prices == ModelPrices(prompt_usd=0.5, completion_usd=2.0, cached_usd=0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"cloud:\n  - id: mine\n    models:\n{MODEL}", "rung.yaml:2: cloud[0].base_url: is missing"),
        (
            f"cloud:\n  - id: mine\n    base_url: http://10.0.0.1/v1\n    models:\n{MODEL}",
            "rung.yaml:3: cloud[0].base_url: 'http://10.0.0.1/v1' would send the key in the clear",
        ),
        (
            f"cloud:\n  - id: mine\n    base_url: ftp://x\n    models:\n{MODEL}",
            "rung.yaml:3: cloud[0].base_url: 'ftp://x' is not an https:// URL",
        ),
        (
            f"cloud:\n  - id: mine\n    base_url: https://a:b@x/v1\n    models:\n{MODEL}",
            "a base URL has scheme, host, port and path",
        ),
        (
            f"cloud:\n  - id: mine\n    base_url: https://x/v1\n    models:\n{MODEL}",
            "cloud[0].api_key_env: give one of api_key_env and api_key_file",
        ),
        (
            f"cloud:\n  - id: openai\n    model: x\n    models:\n{MODEL}",
            "rung.yaml:3: cloud[0].model: there is no",
        ),
        ("cloud:\n  - id: openai\n    models: []\n", "rung.yaml:3: cloud[0].models: "),
        (
            "cloud:\n  - id: openai\n    models:\n" + MODEL.replace("        max_output_tokens: 8192\n", ""),
            "rung.yaml:4: cloud[0].models[0].max_output_tokens: is missing",
        ),
        (
            "cloud:\n  - id: openai\n    models:\n      - {id: a, capabilities: [image]}\n",
            "rung.yaml:4: cloud[0].models[0].images: is missing: what a picture costs at most",
        ),
        (
            "cloud:\n  - id: openai\n    models:\n      - {id: a, capabilities: [image], images: {}}\n",
            "cloud[0].models[0].images.usd_per_image: ",
        ),
        (
            f"cloud:\n  - id: openai\n    models:\n{MODEL}        images: {{usd_per_image: 1}}\n",
            "cloud[0].models[0].images: is for a model with the capability image",
        ),
        (
            "cloud:\n  - id: openai\n    models:\n      - id: a\n        capabilities: [image]\n"
            "        images: {usd_per_image: 1, sizes: ['1024']}\n",
            "cloud[0].models[0].images.sizes[0]: '1024' is not WIDTHxHEIGHT",
        ),
        (
            "cloud:\n  - id: openai\n    models:\n      - id: a\n        capabilities: [chat, image]\n"
            "        images: {usd_per_image: 1}\n",
            "cloud[0].models[0].max_output_tokens: is missing",
        ),
        (
            "cloud:\n  - id: anthropic\n    models:\n      - id: a\n        capabilities: [image]\n"
            "        images: {usd_per_image: 1}\n",
            "cloud[0].models[0].images: are drawn in OpenAI's dialect only",
        ),
        (
            f"cloud:\n  - id: openai\n    models:\n{MODEL}{MODEL}",
            "rung.yaml:8: cloud[0].models[1].id: chat is used twice",
        ),
        (
            f"cloud:\n  - id: openai\n    models:\n{MODEL}  - id: openai\n    models:\n{MODEL}",
            "rung.yaml:8: cloud[1].id: openai is used twice",
        ),
        (
            "cloud:\n"
            f"  - id: openai\n    models:\n{MODEL}        aliases: [best]\n"
            f"  - id: deepseek\n    models:\n{MODEL}        aliases: [best]\n",
            "rung.yaml:15: cloud[1].models[0].aliases: best is a name of openai/chat",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _load(tmp_path, text)

    assert said in raised.value.message


def test_what_only_draws_needs_no_prices_of_tokens(tmp_path: Path) -> None:
    drawing = "{usd_per_image: 0.25, prices: {low: 0.02, medium 1536x1024: 0.06}, qualities: {ultra: high}}"
    text = (
        f"cloud:\n  - id: openai\n    models:\n      - {{id: a, capabilities: [image], images: {drawing}}}\n"
    )
    (provider,) = _load(tmp_path, text)
    (model,) = provider.models
    assert model.drawing == CloudDrawing(
        usd_per_image=0.25,
        prices={"low": 0.02, "medium 1536x1024": 0.06},
        sizes=("1024x1024", "1536x1024", "1024x1536"),
        qualities={"ultra": "high"},
    )
    assert (model.max_output_tokens, model.prices.completion_usd) == (0, 0.0)


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        ((0, 0), "1024x1024"),
        ((512, 0), "1024x1024"),
        ((1920, 1080), "1536x1024"),
        ((0, 300), "1024x1024"),
        ((600, 1600), "1024x1536"),
        ((1200, 1150), "1024x1024"),
        ((3000, 3000), "2048x2048"),
    ],
)
def test_the_nearest_size_is_asked_for(wanted: tuple[int, int], size: str) -> None:
    drawing = CloudDrawing(usd_per_image=1.0, sizes=("1024x1024", "1536x1024", "1024x1536", "2048x2048"))
    assert drawing.size_for(*wanted) == size
    free = replace(drawing, sizes=())
    assert free.size_for(0, 0) == ""
    assert free.size_for(640, 0) == "640x640"


def test_the_most_particular_price_counts() -> None:
    drawing = CloudDrawing(usd_per_image=1.0, prices={"low": 0.1, "9x9": 0.2, "low 9x9": 0.3})
    prices = [drawing.price_usd(*each) for each in (("low", "9x9"), ("low", "1x1"), ("", "9x9"), ("", ""))]
    assert prices == [0.3, 0.1, 0.2, 1.0]


def test_a_model_of_ours_and_one_of_the_cloud_do_not_share_a_name(tmp_path: Path) -> None:
    ours = (
        'nodes: [{id: box, address: "127.0.0.1:8152"}]\n'
        "deployments:\n"
        "  - id: d\n    node: box\n    model: best\n    engine: {kind: llamacpp, model_path: /m}\n"
        "    runtime: {kind: process, executable: x}\n"
    )
    cloud = f"cloud:\n  - id: openai\n    models:\n{MODEL}        aliases: [best]\n"

    with pytest.raises(ConfigError, match="best is a name of a deployment"):
        _load(tmp_path, ours + cloud)


def test_the_example_says_what_it_means() -> None:
    providers = {each.id: each for each in load_config(ROOT / "deploy" / "rung.cloud.yaml").cloud_providers()}

    assert set(providers) == {"openai", "anthropic", "deepseek", "google", "elsewhere"}
    assert providers["anthropic"].dialect is Dialect.ANTHROPIC
    assert providers["anthropic"].models[0].thinking is Thinking.BUDGET
    assert "temperature" in providers["openai"].models[0].drop_fields
    assert providers["elsewhere"].api_key_file is not None
    assert all(model.prices.completion_usd > 0 for each in providers.values() for model in each.models)


# Keys -------------------------------------------------------------------------------------------------

PROVIDER = CloudProvider(
    id="p",
    dialect=Dialect.OPENAI,
    base_url="https://p",
    api_key_env="P_KEY",
    api_key_file=None,
    daily_cap_usd=1.0,
    models=(),
)


def test_a_key_from_the_environment() -> None:
    key = read_key(PROVIDER, {"P_KEY": " sk-1\n"})

    assert isinstance(key, ApiKey)
    assert key.value == "sk-1"
    assert "sk-1" not in f"{key!r} {key}"
    assert key.hide("refused sk-1!") == "refused [key]!"


@pytest.mark.parametrize("environment", [{}, {"P_KEY": ""}, {"P_KEY": "  "}])
def test_no_key_says_what_to_set(environment: dict[str, str]) -> None:
    assert read_key(PROVIDER, environment) == "no key: set P_KEY"


@pytest.mark.parametrize("value", ["sk-1\r\nX: y", "sk 1", "sk-\u00e9", "sk-\x00"])
def test_what_is_no_key_is_refused_without_being_quoted(value: str) -> None:
    refused = read_key(PROVIDER, {"P_KEY": value})

    assert isinstance(refused, str)
    assert "is not one" in refused
    assert value not in refused


def test_a_key_from_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk-1\n")
    provider = replace(PROVIDER, api_key_env="", api_key_file=path)

    path.chmod(0o644)
    assert read_key(provider, {}) == f"the key in {path} can be read by others: chmod 600 {path}"
    path.chmod(0o600)
    key = read_key(provider, {})
    assert isinstance(key, ApiKey)
    assert key.value == "sk-1"
    path.write_text("\n")
    assert read_key(provider, {}) == f"no key: {path} is empty"
    path.unlink()
    assert read_key(provider, {}) == f"no key: {path} cannot be read: No such file or directory"
