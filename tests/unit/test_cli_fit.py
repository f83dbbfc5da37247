"""`rung fit`: an answer before anything is started."""

from __future__ import annotations

import json

import pytest

from controlplane.vram import check_fit, find_architecture, kv_format, weight_format
from rung.cli import ExitCode, main

GIB = 1 << 30


def test_a_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    line = "fit llama-3.1-8b --gpu 32GB --weights awq --context 32768 --kv-dtype fp8"
    assert main(line.split()) == ExitCode.OK
    out = capsys.readouterr().out
    assert "fits in 32.0 GiB with 2.0 GiB kept free" in out
    assert "64 KiB a token, 1 sequence of 32,768" in out
    assert "--gpu-memory-utilization 0." in out


def test_one_that_does_not_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    line = "fit qwen2.5-14b --gpu rtx-4090 --weights bf16 --context 32768 --sequences 4"
    assert main(line.split()) == ExitCode.FAILED
    out = capsys.readouterr().out
    assert "does not fit in 24.0 GiB" in out
    assert "it would with weights in nvfp4" not in out.split("missing")[0]


@pytest.mark.parametrize("gib", [10, 12, 16, 20, 24, 30])
def test_what_is_said_to_help_does(gib: int) -> None:
    model = find_architecture("qwen2.5-14b")
    fit = check_fit(
        model,
        weights=weight_format("fp8"),
        kv=kv_format("fp16"),
        context_tokens=32_768,
        sequences=4,
        total_bytes=gib * GIB,
    )
    assert fit.fits == (fit.footprint.total_bytes <= gib * GIB)
    for remedy in fit.remedies:
        _, option, value = remedy.rsplit(" ", 2)
        changed = {"--kv-dtype": "fp16", "--weights": "fp8", "--context": "32768", "--sequences": "4"}
        changed[option] = value
        again = check_fit(
            model,
            weights=weight_format(changed["--weights"]),
            kv=kv_format(changed["--kv-dtype"]),
            context_tokens=int(changed["--context"]),
            sequences=int(changed["--sequences"]),
            total_bytes=gib * GIB,
        )
        # Whole blocks of 16 tokens are taken: a context may be rounded up past the end by less than one.
        assert again.left_bytes > -4 * 16 * fit.footprint.kv_bytes_per_token, remedy


def test_json_has_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "nemotron-8b", "--weights", "awq", "--kv-dtype", "tq4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "nemotron-orchestrator-8b"
    assert found["fits"] is True
    assert found["fit"]["footprint"]["kv_bytes_per_token"] == 36 * 2 * 8 * (128 * 4 + 32) // 8


def test_a_model_may_be_described(capsys: pytest.CaptureFixture[str]) -> None:
    line = "fit mine --parameters 8B --layers 32 --kv-heads 8 --head-size 128 --context 1024 --json"
    assert main(line.split()) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["footprint"]["weights_bytes"] == 16_000_000_000
    assert found["fit"]["footprint"]["kv_cache_bytes"] == 1024 * 131_072


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("fit nobody-knows-it", "--parameters 8B"),
        ("fit llama-3.1-8b --gpu much", "--gpu"),
        ("fit llama-3.1-8b --weights q9", "no format of weights"),
        ("fit llama-3.1-8b --kv-dtype q9", "no format of a KV cache"),
        ("fit mine --parameters many", "write for instance 8B"),
    ],
)
def test_what_is_not_understood_is_said(
    capsys: pytest.CaptureFixture[str], line: str, complaint: str
) -> None:
    assert main(line.split()) != ExitCode.OK
    assert complaint in capsys.readouterr().err
