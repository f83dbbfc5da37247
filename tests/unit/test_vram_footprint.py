"""The footprint model gives the figures that are known from running these models."""

from __future__ import annotations

import pytest

from controlplane.vram import (
    ARCHITECTURES,
    Architecture,
    ProfileShare,
    check_profile,
    estimate_footprint,
    find_architecture,
    kv_bytes_per_token,
    kv_format,
    reserved_bytes,
    weight_format,
    weights_bytes,
)
from rung.errors import ConfigError, InvalidRequestError, UnknownModelError

GB, GIB, KIB = 10**9, 1 << 30, 1 << 10
#: What a card of 32 GB reports.
CARD_BYTES = 32_607 << 20
LLAMA = find_architecture("llama-3-8b")


def test_an_8b_model_takes_four_and_a_half_gigabytes_in_awq_and_sixteen_in_fp16() -> None:
    assert weights_bytes(8 * GB, weight_format("awq")) == 4.5 * GB
    assert weights_bytes(8 * GB, weight_format("fp16")) == 16 * GB


def test_embeddings_that_stay_at_16_bits_count_in_full() -> None:
    nemotron = find_architecture("nemotron-orchestrator-8b")
    footprint = estimate_footprint(nemotron, weights=weight_format("awq"), kv=kv_format("auto"))

    assert footprint.weights_bytes == pytest.approx(6.4 * GB, rel=0.01)
    whole = weights_bytes(nemotron.parameters, weight_format("q4_0"), nemotron.embedding_parameters)
    assert whole == pytest.approx(nemotron.parameters * 4.5 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "form", "gigabytes"),
    [
        ("Qwen2.5-VL-7B-Instruct-GGUF", "q4_k_m", 4.7),
        ("nomic-ai/nomic-embed-text-v1.5", "fp16", 0.3),
        ("qwen2.5-14b", "fp16", 28.0),
    ],
)
def test_weights_are_as_large_as_people_measured(model: str, form: str, gigabytes: float) -> None:
    found = find_architecture(model)

    size_bytes = weights_bytes(found.parameters, weight_format(form), found.embedding_parameters)
    assert size_bytes == pytest.approx(gigabytes * GB, rel=0.1)


def test_14b_in_awq_with_all_weights_quantised_takes_seven_and_a_half_gigabytes() -> None:
    assert weights_bytes(14_770_033_664, weight_format("awq-g128")) == pytest.approx(7.5 * GB, rel=0.03)


def test_a_token_takes_128_kib_in_fp16_64_in_fp8_and_34_in_tq4() -> None:
    sizes = {name: kv_bytes_per_token(LLAMA, kv_format(name)) for name in ("auto", "fp8_e4m3", "tq-t4nc")}

    assert sizes == {"auto": 128 * KIB, "fp8_e4m3": 64 * KIB, "tq-t4nc": 34 * KIB}


def test_the_same_memory_holds_66k_tokens_in_fp16_and_224k_at_four_bits() -> None:
    cache_bytes = round(8.3 * GIB)
    fp16 = estimate_footprint(LLAMA, weights=weight_format("awq"), kv=kv_format("fp16"))
    int4 = estimate_footprint(LLAMA, weights=weight_format("awq"), kv=kv_format("int4"))
    tq4 = estimate_footprint(LLAMA, weights=weight_format("awq"), kv=kv_format("tq4"))

    assert fp16.tokens_that_fit(cache_bytes) == pytest.approx(66 * KIB, rel=0.01)
    assert int4.tokens_that_fit(cache_bytes) == pytest.approx(224 * KIB, rel=0.01)
    assert tq4.tokens_that_fit(cache_bytes) > 224 * KIB


def test_the_orchestrators_layers_hold_about_224k_tokens_in_tq4_too() -> None:
    nemotron = find_architecture("cyankiwi/Nemotron-Orchestrator-8B-AWQ-4bit")
    footprint = estimate_footprint(nemotron, weights=weight_format("awq"), kv=kv_format("tq-t4nc"))

    assert footprint.tokens_that_fit(round(8.3 * GIB)) == pytest.approx(224 * KIB, rel=0.01)


def test_llama_cpps_cache_types_have_their_blocks() -> None:
    assert kv_bytes_per_token(LLAMA, kv_format("q8_0")) == 2 * 32 * 8 * 128 * 1.0625
    assert kv_bytes_per_token(LLAMA, kv_format("q4_0")) == 2 * 32 * 8 * 128 * 0.5625


def test_a_compressed_cache_counts_its_latent_vector_once() -> None:
    latent = Architecture(name="mla", parameters=0, layers=27, latent_size=512 + 64)

    assert kv_bytes_per_token(latent, kv_format("fp16")) == 27 * 576 * 2


def test_the_parts_add_up_and_contexts_take_whole_blocks() -> None:
    footprint = estimate_footprint(
        LLAMA,
        weights=weight_format("awq"),
        kv=kv_format("fp8"),
        context_tokens=1001,
        sequences=3,
        overhead_bytes=7,
    )

    assert footprint.kv_cache_bytes == 64 * KIB * 1008 * 3
    assert footprint.total_bytes == footprint.weights_bytes + footprint.kv_cache_bytes + 7
    assert footprint.tokens_beside_weights(footprint.total_bytes) == 1008 * 3
    assert footprint.tokens_beside_weights(footprint.weights_bytes) == 0


def test_an_encoder_has_no_cache() -> None:
    nomic = find_architecture("nomic-embed-text")
    footprint = estimate_footprint(
        nomic, weights=weight_format("fp16"), kv=kv_format("auto"), context_tokens=8192, sequences=64
    )

    assert footprint.kv_cache_bytes == 0
    assert footprint.tokens_that_fit(GIB) == 0


def test_vllm_reserves_its_share_of_the_whole_card() -> None:
    assert reserved_bytes(0.40, CARD_BYTES) == pytest.approx(12.8 * GIB, rel=0.01)
    with pytest.raises(InvalidRequestError, match="between 0 and 1"):
        reserved_bytes(1.5, CARD_BYTES)


def test_a_profile_that_promises_more_than_there_is_is_refused_with_the_sum() -> None:
    shares = [
        ProfileShare(deployment_id="nemotron-8b", gpu_memory_utilization=0.35),
        ProfileShare(deployment_id="deepseek-r1-14b", gpu_memory_utilization=0.40),
        ProfileShare(deployment_id="deepseek-coder", gpu_memory_utilization=0.18),
        ProfileShare(deployment_id="qwen2.5-vl-7b", gpu_memory_utilization=0.12),
        ProfileShare(deployment_id="nomic-embed", gpu_memory_utilization=0.05),
    ]

    with pytest.raises(ConfigError) as refused:
        check_profile("dev", shares, total_bytes=CARD_BYTES, reserve_bytes=2 * GIB)

    message = str(refused.value)
    assert "nemotron-8b 11.1 GiB (35%) + deepseek-r1-14b 12.7 GiB (40%)" in message
    assert "2.0 GiB kept free = 37.0 GiB (116%) of 31.8 GiB, 5.2 GiB too much" in message
    assert refused.value.metadata["profile"] == "dev"


def test_a_profile_that_fits_to_the_byte_is_taken_and_one_byte_more_is_not() -> None:
    shares = [
        ProfileShare(deployment_id="nemotron-8b", gpu_memory_utilization=0.5),
        ProfileShare(deployment_id="comfyui", vram_bytes=400),
    ]

    assert check_profile("creative", shares, total_bytes=1000, reserve_bytes=100) == 900
    with pytest.raises(ConfigError):
        check_profile("creative", shares, total_bytes=1000, reserve_bytes=101)


@pytest.mark.parametrize("model", [each.name for each in ARCHITECTURES])
def test_every_architecture_is_found_by_its_own_name_and_whatever_surrounds_it(model: str) -> None:
    assert find_architecture(model).name == model
    assert find_architecture(f"somebody/{model.upper()}-AWQ").name == model


def test_names_that_are_not_known_are_refused_with_those_that_are() -> None:
    with pytest.raises(UnknownModelError, match=r"qwen2\.5-14b"):
        find_architecture("gpt-5")
    with pytest.raises(InvalidRequestError, match="q4_k_m"):
        weight_format("q9")
    with pytest.raises(InvalidRequestError, match="fp8_e4m3"):
        kv_format("fp3")
    with pytest.raises(InvalidRequestError, match="none is less than 0"):
        estimate_footprint(LLAMA, weights=weight_format("awq"), kv=kv_format("fp8"), context_tokens=-1)
